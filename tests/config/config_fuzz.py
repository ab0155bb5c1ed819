"""Run files spoiled at random, from a seed: values of every kind at every key, keys moved, and text that is broken."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"

# A run of the model and rows of tests/tiny.py with nearly every key that a run can have.
MAXIMAL: dict[str, Any] = {
    "model": {"name_or_path": "model", "task": "causal_lm", "attn_implementation": "eager", "trust_remote_code": False},
    "data": {
        **{"path": "rows.jsonl", "split": "train", "eval_fraction": 0.25, "eval_max_rows": 8, "max_rows": 100},
        **{"format": "auto", "max_length": 64, "packing": False, "loss_on": "answers", "on_too_long": "truncate"},
        **{"seed": 0, "num_workers": 1, "columns": {}},
    },
    "method": "lisa",
    "statistics": "interval",
    "lisa": {
        **{"num_sampled_layers": 1, "interval_steps": 2, "seed": 3, "sampler": {"name": "grad_norm", "floor": 0.2}},
        **{"growth": {"schedule": {3: 2}}, "embeddings": {"every": 2}, "lm_head": "sampled", "rest": "always"},
        **{"embeddings_lr_scale": 0.1, "rewarm_steps": 2, "norm_growth_limit": 1.5, "layers_path": "auto"},
        "optimizer": {"name": "masked_adamw", "precision": "mixed", "moments": "fp32"},
    },
    "training": {
        **{"output_dir": "out", "max_steps": 8, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2},
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 1},
        **{"report_to": "none", "bf16": True, "gradient_checkpointing": True, "lr_scheduler_type": "linear"},
        **{"warmup_steps": 1, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8},
        **{"max_grad_norm": 1.0, "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 1, "seed": 1},
        **{"dataloader_num_workers": 0, "lr_scheduler_kwargs": {}, "gradient_checkpointing_kwargs": {}},
        **{"optim": "adamw_torch", "save_total_limit": 2, "label_smoothing_factor": 0.1, "run_name": "a"},
        **{"early_stopping_patience": 2, "early_stopping_threshold": 0.1, "ddp_timeout": 1800},
    },
    "deepspeed": {
        "zero_optimization": {
            **{"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}},
            **{"reduce_bucket_size": 1000000, "stage3_prefetch_bucket_size": "auto", "overlap_comm": True},
            **{"sub_group_size": 1000000, "stage3_max_reuse_distance": 1000, "zero_hpz_partition_size": 1},
        },
        **{"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"},
        **{"data_types": {"grad_accum_dtype": "fp32"}, "tensor_parallel": {"autotp_size": 1}},
        **{"communication_data_type": "fp32", "wall_clock_breakdown": False, "compile": {"deepcompile": False}},
    },
}

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**4, 10**9, 10**18, 2**63, 10**30, -(10**30), 10**400),
    *(0.5, -0.5, 1.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "é😀\u202e", "x" * 300, "x/" * 3000, "\x00", "a\x00b", "\ud800", "\n", "null", "1e-5", "auto", "no"),
    *("100%", "-1", "0x10", "1_000", "~", "~nobody/x", "1epoch", "0epoch", "1e9epoch", "3.5epochs", "{}", "{", "[1"),
    *(".", "..", "/", "../../etc/passwd", "/dev/null", "/dev/zero", "/proc/self/mem", "rows.jsonl", "model", "model/config.json"),
    *([], [1], [None], ["a", "b"], [[[]]], ["uniform"], {}, {"a": 1}, {"": 1}, {1: 2}, {None: 1}, {"name": "x"}),
    *({"enabled": True}, {"device": "cpu"}, {"device": "nvme"}, {"every": 0}, {"a": {"b": {"c": [1, {"d": None}]}}}),
]  # fmt: skip
_SAMPLERS = ("uniform", "cyclic", "bernoulli", "fixed", "fixed_scores", "weight_norm", "grad_norm", "fisher")
_TRAINING: list[str] = []
_TEXTS = (b"\t", b"{", b"&a ", b"*a", b"<<: ", b"? ", b"- ", b"\x00", b"|\n", b"!!timestamp x", b"!!bool x", b"!!map ",
          b"!!python/object/apply:os.getcwd []", b"\xff", b"2001-99-99", b"!!int x", b"&a [*a]", b"[" * 3000, b"!!binary a", b"=")  # fmt: skip


def bases() -> list[dict[str, Any]]:
    """The maximal run, every shipped one, and every shipped one with a model and rows that are here."""
    shipped = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.rglob("*.yaml"))]
    here = [{**run, "model": {"name_or_path": "model"}, "data": {"path": "rows.jsonl"}} for run in shipped]
    inline = [
        {**run, "deepspeed": yaml.safe_load(path.read_text())} for path in CONFIGS.glob("*.json") for run in here[:1]
    ]
    return [*[MAXIMAL] * (2 * len(shipped)), *shipped, *here, *inline]


def spoiled(rng: random.Random) -> tuple[bytes, str]:
    """A run file with one to three mistakes, and what they are."""
    run = copy.deepcopy(rng.choice(bases()))
    changes = [_spoil(run, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    text = yaml.safe_dump(run, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        return _broken(text, rng), "broken text"
    return text, "; ".join(changes)


def overrides(rng: random.Random) -> list[str]:
    """Command-line overrides, some of them nonsense."""
    if rng.random() < 0.8:
        return []
    key = ".".join(map(str, rng.choice(_paths(MAXIMAL))))
    value = rng.choice(VALUES)
    return [f"{key}={value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()}"]


def training_keys() -> list[str]:
    """Every argument of transformers'."""
    if not _TRAINING:
        from transformers import TrainingArguments

        _TRAINING.extend(TrainingArguments.__dataclass_fields__)
    return _TRAINING


def _spoil(run: dict[str, Any], rng: random.Random) -> str:
    path = rng.choice(_paths(run))
    section: Any = run
    for part in path[:-1]:
        section = section[part]
    key, how = (
        path[-1],
        rng.choice(("set", "set", "set", "set", "drop", "rename", "nest", "wrap", "add", "train", "sampler")),
    )
    if how == "set":
        section[key] = rng.choice(VALUES)
    elif how == "drop":
        del section[key]
    elif how == "rename":
        text = str(key)
        section[rng.choice((text[:-1], text.upper(), f"{text}_", text.replace("_", "-")))] = section.pop(key)
    elif how == "nest":
        section[key] = {key: section[key]}
    elif how == "wrap":
        section[key] = [section[key]]
    elif how == "add":
        section[rng.choice((1, None, True, "é", "a.b", "training", "lisa", "enabled", "x"))] = rng.choice(VALUES)
    elif how == "train" and isinstance(run.get("training"), dict):
        run["training"][key := rng.choice(training_keys())] = rng.choice(VALUES)
        path = ("training", key)
    elif isinstance(run.get("lisa"), dict):
        more = rng.choice(("layers", "file", "lora_norms", "calibration_batches", "temperature", "draw", "every", "x"))
        run["lisa"]["sampler"] = {"name": rng.choice(_SAMPLERS), more: rng.choice(VALUES)}
    return f"{how} {'.'.join(map(str, path))}"


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*at, key))
    return found


def _broken(text: bytes, rng: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.3:
            del data[place : place + rng.randint(1, 20)]
        elif kind < 0.5:
            data[place] = rng.randrange(256)
        elif kind < 0.8:
            place = data.find(b": ", place) + 2  # a value
            data[place:place] = rng.choice(_TEXTS)
        else:
            data[place:place] = rng.choice(_TEXTS)
    return bytes(data)
