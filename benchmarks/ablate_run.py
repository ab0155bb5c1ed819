"""One process of ``benchmarks/ablate.py``: loads model and rows once, then trains and measures whatever it is handed.

A run is the product's own path: ``LabelLogitsTrainer``, ``lisa_ds.attach`` and DeepSpeed ZeRO-3 on one rank. Between runs nothing is
read from disk: the weights are copied from a model that is never trained.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100
EVAL_BATCH = 32
LARGE = 2**20


def serve(connection: Any, environment: dict[str, str], log: str, setup: dict[str, Any]) -> None:
    """Answer each settings dict with what was measured, until None comes."""
    with Path(log).open("a", buffering=1) as file:  # an engine tells of every switch: nothing for the console
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    try:
        bench = Bench(**setup)
        connection.send(("ready", None, None))
        while (settings := connection.recv()) is not None:
            try:
                connection.send(("measured", settings, bench.measure(settings)))
            except Exception:
                traceback.print_exc()
                connection.send(("failed", settings, traceback.format_exc()[-1500:]))
                bench.clean()
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(0)  # an orderly exit would wait for the process group


def tokens(source: dict[str, Any], model: str, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a data set as the product makes them: ``train``, and the two held-out parts ``select`` and ``verdict``.

    Kept in ``cache``, a file that says by its name what it holds; with it, neither ``datasets`` nor a tokenizer is needed.

    Args:
        source: Keys of the ``data`` section.
        model: Whose tokenizer.
        cache: File to read, or to write if it is absent.
    """
    if not cache.is_file():
        from lisa_ds import data
        from lisa_ds.config import DataConfig, ModelConfig
        from lisa_ds.models import load_tokenizer

        tokenizer = load_tokenizer(ModelConfig(name_or_path=model))
        train, held_out = data.load_dataset(DataConfig(**source), tokenizer)
        assert held_out is not None
        parts = {
            "train": list(train),
            "select": [row for i, row in enumerate(held_out) if i % 3 == 0],
            "verdict": [row for i, row in enumerate(held_out) if i % 3],
        }
        arrays = {}
        for part, rows in parts.items():
            arrays[f"{part}.lengths"] = np.array([len(row["input_ids"]) for row in rows], dtype=np.int32)
            for key in ("input_ids", "labels"):
                arrays[f"{part}.{key}"] = np.concatenate([np.asarray(row[key], dtype=np.int32) for row in rows])
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(unfinished, **arrays)  # type: ignore[arg-type]
        unfinished.rename(cache)
    stored = np.load(cache)
    return {part: _rows(stored, part) for part in ("train", "select", "verdict")}


def _rows(stored: Any, part: str) -> list[dict[str, Any]]:
    edges = np.cumsum(stored[f"{part}.lengths"])[:-1]
    ids, labels = (np.split(stored[f"{part}.{key}"], edges) for key in ("input_ids", "labels"))
    return [{"input_ids": i.tolist(), "labels": j.tolist()} for i, j in zip(ids, labels, strict=True)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad to the longest, as ``lisa_ds.data.collator`` does, without a tokenizer at hand."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, :length] = 1
        batch["labels"][i, :length] = torch.tensor(row["labels"])
    return batch


def answer_loss(model: Any, batch: dict[str, Any]) -> Any:
    """Mean loss of the labelled tokens; logits are computed for these alone, as ``LabelLogitsTrainer`` does."""
    import torch

    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    kept = labels != IGNORED
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]).float(), labels[kept])


class Bench:
    """What a process keeps from run to run.

    Args:
        model: Name or directory of the model.
        sources: By name of the data set, the keys of its ``data`` section.
        cache: Directory for tokens.
        limits: Rows of ``select`` and ``verdict`` at most.
        device: ``cpu`` or ``cuda``.
        bf16: Whether weights are bf16, with an fp32 master copy; else fp32.
    """

    def __init__(
        self,
        model: str,
        sources: dict[str, dict[str, Any]],
        cache: str,
        limits: dict[str, int],
        device: str,
        bf16: bool,
    ) -> None:
        import torch

        from lisa_ds.config import ModelConfig
        from lisa_ds.models import load_model

        if device == "cuda":
            # As equal as a GPU makes it: what has no deterministic kernel only warns.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.device, self.bf16, self.limits = device, bf16, limits
        self.rows = {
            name: tokens(source, model, token_file(Path(cache), name, source)) for name, source in sources.items()
        }
        # Before any TrainingArguments: under transformers' ZeRO-3 the model would be loaded partitioned.
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.pristine = load_model(ModelConfig(name_or_path=model), dtype).to(device)
        self.pristine.config.use_cache = False
        self.held_out: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def measure(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Train as ``settings`` say; held-out losses per labelled token on both parts, times, and the layers drawn."""
        start = time.perf_counter()
        if settings["method"] == "none":
            return {**self.losses(settings["data"], self._plain_loss), "seconds": time.perf_counter() - start}
        trainer = self._trainer(settings)
        training = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        trainer.deepspeed.eval()
        losses = self.losses(settings["data"], lambda batch: self._engine_loss(trainer, batch))
        done = time.perf_counter()
        drawn = [list(layers) for layers in getattr(trainer.deepspeed, "layer_history", ())]
        trainer.deepspeed.destroy()
        self.clean()
        return {
            **losses,
            "seconds": time.perf_counter() - start,
            "train_seconds": trained - training,
            "eval_seconds": done - trained,
            "drawn": drawn,
        }

    def _trainer(self, settings: dict[str, Any]) -> Any:
        from accelerate.state import AcceleratorState
        from transformers import TrainingArguments, set_seed

        import lisa_ds
        from lisa_ds.integrations import hf
        from lisa_ds.integrations.trainer import LabelLogitsTrainer

        AcceleratorState._reset_state()  # it would keep the DeepSpeed config of the first run
        on_cpu = self.device == "cpu"
        args = TrainingArguments(
            output_dir=settings["scratch"],
            deepspeed={
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": "auto",
                "bf16": {"enabled": "auto"},
                "zero_allow_untested_optimizer": True,
                # With one rank nothing is gained by letting go of a weight and fetching it again.
                "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 2**40},
            },
            bf16=self.bf16,
            use_cpu=on_cpu,
            dataloader_pin_memory=False,
            per_device_train_batch_size=settings["batch"],
            max_steps=settings["steps"],
            learning_rate=settings["lr"],
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings["steps"] // 10),
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=settings["seed"],
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it waits for the device in every step
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        hf.join_process_group()
        set_seed(settings["seed"])
        trainer = LabelLogitsTrainer(
            copy.deepcopy(self.pristine),
            args,
            data_collator=collate,
            train_dataset=self.rows[settings["data"]]["train"],
        )
        if settings["method"] == "lisa":
            lisa_ds.attach(trainer, {**settings["lisa"], "seed": settings["seed"]})
        return trainer

    def losses(self, data: str, loss: Any) -> dict[str, float]:
        """Mean loss per labelled token on each held-out part.

        Args:
            data: Name of the data set.
            loss: From a batch to the mean loss of its labelled tokens.
        """
        import torch

        found = {}
        for part, limit in self.limits.items():
            if (data, part) not in self.held_out:
                rows = self.rows[data][part][:limit]
                rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
                self.held_out[data, part] = [
                    {key: value.to(self.device) for key, value in collate(rows[i : i + EVAL_BATCH]).items()}
                    for i in range(0, len(rows), EVAL_BATCH)
                ]
            total, count = 0.0, 0
            with torch.no_grad():
                for batch in self.held_out[data, part]:
                    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
                    total += float(loss(batch)) * labelled
                    count += labelled
            found[part] = total / count
        return found

    def _engine_loss(self, trainer: Any, batch: dict[str, Any]) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.deepspeed, dict(batch))  # mean of the labelled tokens

    def _plain_loss(self, batch: dict[str, Any]) -> Any:
        self.pristine.eval()
        return answer_loss(self.pristine, batch)

    def clean(self) -> None:
        """Let go of a run's memory.

        An engine that is destroyed stays alive, by references through autograd's hooks that Python cannot see. So its storage is
        taken from it: whatever is large and neither the pristine model nor a held-out batch.
        """
        import torch

        kept = [*self.pristine.parameters(), *self.pristine.buffers()]
        kept += [tensor for batches in self.held_out.values() for batch in batches for tensor in batch.values()]
        places = {tensor.untyped_storage().data_ptr() for tensor in kept}
        gc.collect()
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and not found.is_meta:
                storage = found.untyped_storage()
                if storage.nbytes() >= LARGE and storage.data_ptr() not in places and storage.resizable():
                    storage.resize_(0)
        gc.freeze()  # what stays alive need not be looked through again
        if self.device == "cuda":
            torch.cuda.empty_cache()


def token_file(cache: Path, name: str, source: dict[str, Any]) -> Path:
    """Where the tokens of a data set are kept."""
    cut = f"{source['max_length']}-{source['eval_fraction']}"
    return cache / f"{name}-{cut}.npz"
