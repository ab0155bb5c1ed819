"""What a run logs of its speed, against what torch counts while it trains, and against its own parts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks

RANKS, STEPS, ROWS, LENGTH = 2, 6, 2, 24


def rows(rank_rows: int) -> list[dict[str, Any]]:
    """Of different lengths, padded to one; the first part of each has no labels."""
    made = []
    for i in range(rank_rows):
        length = 10 + 3 * (i % 5)
        ids = torch.randint(0, 260, (LENGTH,), generator=torch.Generator().manual_seed(i))
        mask = (torch.arange(LENGTH) < length).long()
        labels = torch.where((torch.arange(LENGTH) < 5) | (mask == 0), -100, ids)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def train(folder: str, embeddings: str, checkpointing: bool, method: str, peak: float | None) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    import lisa_ds
    from lisa_ds.integrations import hf
    from lisa_ds.integrations.clock import Clock
    from lisa_ds.integrations.throughput import Throughput
    from lisa_ds.integrations.trainer import LabelLogitsTrainer

    class Counter(TrainerCallback):
        """Around the steps alone, and around the gathers: what logging costs."""

        def __init__(self) -> None:
            self.modes: list[FlopCounterMode] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.modes.append(FlopCounterMode(display=False))
            self.modes[-1].__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.modes[-1].__exit__(None, None, None)

    unset_hf_deepspeed_config()
    args = TrainingArguments(
        f"{folder}/out",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=STEPS,
        logging_steps=2,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        deepspeed={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"},
    )
    hf.join_process_group()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny.config(), attn_implementation="eager").float()
    counter = Counter()
    trainer = LabelLogitsTrainer(model, args, train_dataset=rows(64), callbacks=[counter])
    clock = Clock(trainer)
    trainer.add_callback(clock)
    throughput = Throughput(trainer, clock, peak)
    trainer.callback_handler.callbacks.insert(0, throughput)
    if method == "lisa":
        lisa = {"num_sampled_layers": 1, "interval_steps": 1, "embeddings": embeddings, "lm_head": embeddings}
        lisa_ds.attach(trainer, lisa)
    trainer.train()
    return {
        "counted": sum(mode.get_total_flops() for mode in counter.modes),
        "tokens": float(trainer.tokens),
        "seconds": clock.training,
        "total": throughput.total(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "history": getattr(trainer.deepspeed, "layer_history", None),
    }


CASES: dict[str, tuple[str, bool, str]] = {
    "lisa": ("always", False, "lisa"),
    "lisa, embeddings frozen": ("never", False, "lisa"),
    "full": ("always", False, "full"),
    "full, checkpointing": ("always", True, "full"),
}
PEAK = 1e6  # FLOP/s, so slow that a share rounded to four digits has many


def on_ranks(folder: str) -> dict[str, Any]:
    seen: dict[str, Any] = {name: train(folder, *case, PEAK) for name, case in CASES.items()}
    seen["no peak"] = train(folder, *CASES["full"], None)
    seen["stalls"] = stall(folder)
    return seen


STALL = 1.5
"""Seconds."""


def stall(folder: str) -> dict[str, Any]:
    """Rank 1 waits for data in step 3; rank 0 in an evaluation after step 4 and in the checkpoint after it; 1 before step 5."""
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, default_data_collator
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from lisa_ds.integrations import hf
    from lisa_ds.integrations.clock import Clock
    from lisa_ds.integrations.throughput import Throughput
    from lisa_ds.integrations.trainer import LabelLogitsTrainer

    class Stalls(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            time.sleep(STALL * (args.process_index == 0))

        def on_step_begin(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            time.sleep(STALL * (state.global_step == 4 and args.process_index == 1))

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    def collate(batch: list[Any]) -> Any:
        if trainer.args.process_index == 1 and trainer.state.global_step == 2 and trainer.model.training:
            time.sleep(STALL / 2)  # two micro-batches
        return default_data_collator(batch)

    unset_hf_deepspeed_config()
    args = TrainingArguments(
        f"{folder}/stalls",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=4,
        eval_steps=4,
        eval_strategy="steps",
        max_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=2,
        deepspeed={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"},
    )
    hf.join_process_group()
    model: Any = AutoModelForCausalLM.from_config(tiny.config(), attn_implementation="eager").float()
    trainer = LabelLogitsTrainer(model, args, collate, rows(64), rows(4), callbacks=[stalls := Stalls()])
    clock = Clock(trainer)
    trainer.add_callback(clock)
    throughput = Throughput(trainer, clock, None)
    trainer.callback_handler.callbacks.insert(0, throughput)
    trainer.train()
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "total": throughput.total(),
        "tokens": float(trainer.tokens),
        "clock": (clock.training, clock.waiting, clock.apart),
        "seconds": stalls.seconds,
    }


@pytest.mark.more
@pytest.mark.multirank
def test_what_is_logged_is_what_was_computed(tmp_path: Path) -> None:
    ranks = run_ranks(RANKS, on_ranks, tmp_path, str(tmp_path), timeout_s=240)
    for name in CASES:
        seen = [rank[name] for rank in ranks]
        seconds = max(rank["seconds"] for rank in seen)
        for rank in seen:
            assert rank["total"] == seen[0]["total"], name  # every rank has the same numbers
            assert rank["logs"] == seen[0]["logs"]
        total = seen[0]["total"]
        tokens = sum(rank["tokens"] for rank in seen)
        assert total["tokens_per_second"] == pytest.approx(tokens / seconds, abs=0.06)
        assert total["tokens_per_second_per_gpu"] == pytest.approx(tokens / seconds / RANKS, abs=0.06)
        computed = total["hfu"] * PEAK * seconds * RANKS
        really = sum(rank["counted"] for rank in seen)
        if "checkpointing" in name:  # torch computes the last matrix of a block not again
            assert 0.9 * computed < really < 1.001 * computed  # the share is rounded
        else:
            assert really == pytest.approx(computed, rel=1e-3), name
        assert 0 < total["mfu"] < total["hfu"]  # without padding
        assert 0.05 < total["max_rank_memory_gb"] < 100
        logs = seen[0]["logs"]
        assert len(logs) == STEPS // 2
        assert all({*total} <= {*entry} for entry in logs)
        # The entries' windows together are the run: the harmonic mean of rates over equal numbers of FLOPs is near.
        assert min(entry["hfu"] for entry in logs) <= total["hfu"] <= max(entry["hfu"] for entry in logs)
    lisa, frozen, full, again = (ranks[0][name] for name in CASES)
    assert len(set(lisa["history"])) > 1  # the layers did change between entries
    per_token = [one["total"]["mfu"] / one["total"]["tokens_per_second"] for one in (frozen, lisa, full)]
    assert per_token == sorted(per_token)
    assert len(set(per_token)) == 3
    # Checkpointing is in the hardware's share alone.
    assert again["total"]["mfu"] / again["total"]["tokens_per_second"] == pytest.approx(per_token[2], rel=0.02)
    assert again["total"]["hfu"] / again["total"]["mfu"] > 1.2 * full["total"]["hfu"] / full["total"]["mfu"]
    assert not {"mfu", "hfu"} & {*ranks[0]["no peak"]["total"]}
    assert "tokens_per_second" in ranks[0]["no peak"]["logs"][-1]
    check_stalls([rank["stalls"] for rank in ranks])


def check_stalls(ranks: list[dict[str, Any]]) -> None:
    entries = {entry["step"]: entry for entry in ranks[0]["logs"]}
    tokens = sum(rank["tokens"] for rank in ranks)
    slowest = 1.5 * tokens / STEPS / STALL  # steps differ in their tokens
    for step in (3, 5):
        assert entries[step]["tokens_per_second"] < slowest, entries
    assert max(entries, key=lambda step: entries[step]["waiting_for_data"]) == 3, entries
    assert max(entries, key=lambda step: entries[step].get("evaluating_and_saving_s", 0)) == 5, entries
    for rank in ranks:  # all the time is accounted for
        training, waiting, apart = rank["clock"]
        assert training + apart == pytest.approx(rank["seconds"], abs=0.1)
        assert 0 < waiting < training
    assert ranks[1]["clock"][1] > STALL > ranks[0]["clock"][1]
    seconds = max(rank["clock"][0] for rank in ranks)
    total = ranks[0]["total"]
    assert total["tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)
    assert total["waiting_for_data"] == pytest.approx(ranks[1]["clock"][1] / seconds, abs=1e-3)
    assert total["evaluating_and_saving_s"] > STALL


def test_counting_a_batch_is_cheap_and_right() -> None:
    from lisa_ds.integrations.trainer import Work

    work = Work()
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, 7, 7, -100, -100], [-100, -100, -100, -100, 7]])
    work.add({"input_ids": ids, "attention_mask": mask, "labels": labels}, labelled_only=True)
    assert work.counts.tolist() == [8, 9 + 25, 3, 10, 50]
    work.add({"input_ids": ids, "labels": labels}, labelled_only=False)
    assert work.counts.tolist() == [18, 34 + 50, 13, 20, 100]
    start = time.perf_counter()
    for _ in range(100):
        work.add({"input_ids": ids, "attention_mask": mask, "labels": labels}, labelled_only=True)
    assert (time.perf_counter() - start) / 100 < 5e-3
