"""Stands in for `lisa-ds train` where a test is about which runs are started, not about training: writes what a run would.

Its loss has its minimum at the learning rate that ``BEST`` names for a method, in this file's environment. ``SLOW`` names a part of
a directory's name whose run waits to be stopped, saving for ``SAVING`` seconds when it is, and ending at once when it is stopped again;
``FAIL`` one whose run fails; ``OTHER`` one that sees other rows.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml  # and nothing of ours: it is to be there at once


def main() -> int:
    words = sys.argv[1:]
    resumed = "--resume" in words
    config: dict[str, Any] = {"method": "lisa", **yaml.safe_load(Path(words[0]).read_text())}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if equals and not key.startswith("-"):
            section, name = key.rpartition(".")[::2]
            (config.setdefault(section, {}) if section else config)[name] = yaml.safe_load(value)
    place = Path(config["training"]["output_dir"])
    place.mkdir(parents=True, exist_ok=True)
    with (place.parent / "started.txt").open("a") as started:
        started.write(f"{place.name} {'resumed' if resumed else 'begun'}\n")
    if os.environ.get("FAIL", "?") in place.name:
        print("error: this one fails")
        return 2
    if os.environ.get("SLOW", "?") in place.name and not resumed:
        (place / "log.jsonl").write_text("")
        return wait_to_be_stopped(place)
    write(place, config)
    return 0


def wait_to_be_stopped(place: Path) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    (place.parent / "waiting").touch()
    for _ in range(600):
        if stopped:
            (place.parent / "saving").touch()
            saved = time.monotonic() + float(os.environ.get("SAVING", "0"))
            while time.monotonic() < saved:
                time.sleep(0.02)
                if len(stopped) > 1:
                    return 1
            (place / "checkpoint-2").mkdir()
            (place / "checkpoint-2/trainer_state.json").write_text("{}")
            return 0
        time.sleep(0.05)
    return 1


def write(place: Path, config: Any) -> None:
    method, rate, seed = config["method"], float(config["training"]["learning_rate"]), config["training"]["seed"]
    best = json.loads(os.environ.get("BEST", "{}")).get(method, 1e-3)
    verdict = config["data"]["eval_part"] == "verdict"
    loss = 1 + 0.1 * math.log(rate / best) ** 2 + 0.05 * (method == "lisa") + 0.01 * seed % 1 + 0.2 * verdict
    loss += 0.001 * seed * (method == "lisa")
    order = {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ranks": 2, "seed": seed},
        "data": {"rows": 18, "tokens": "other" if os.environ.get("OTHER", "?") in place.name else "same"},
    }
    about = {"variant": method, "device": "2 x CPU", "commit": "abc", "versions": {"python": "3"}}
    settings = {"config": config, "seed": seed, "order": order}
    values: list[tuple[str, float, str, float | None]] = [
        ("held_out_loss", 2.0 + 0.2 * verdict, "nats", 0),  # of a resumed run too: the trainer's history is restored
        *([] if math.isinf(loss) else [("held_out_loss", loss, "nats", 6)]),
        *((f"live_bytes/{kind}", 1e6 * size, "B", None) for kind, size in SIZES[method].items()),
        *(("applied_steps", 6, "steps", None), ("skipped_steps", 0, "steps", None)),
        *(("tokens_per_second", 100.0, "1/s", None), ("max_rank_memory_gb", 0.5, "GB", None)),
    ]
    lines = [
        {"name": name, "value": value, "unit": unit, "x": x, "settings": settings, **about}
        for name, value, unit, x in values
    ]
    (place / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = {"forward_s": 0.1, "backward_s": 0.2, "optimizer_s": 0.05, "switch_s": 0.01}
    entries: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0, "eval_loss": 2.2}]
    for step in (2, 4, 6):
        entries.append({"step": step, "seconds": 0.4 * step, "loss": 2 - 0.1 * step, **parts})
        entries.append({"step": step, "seconds": 0.4 * step, "eval_loss": loss + 0.1 * (6 - step)})
    (place / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (place / "model").mkdir(exist_ok=True)
    (place / "checkpoint-6").mkdir(exist_ok=True)


SIZES = {
    "full": {"weights": 40, "gradients": 40, "master": 80, "exp_avg": 80, "exp_avg_sq": 80, "buckets": 5},
    "lisa": {"weights": 40, "gradients": 10, "master": 20, "exp_avg": 20, "exp_avg_sq": 20, "buckets": 2},
}

if __name__ == "__main__":
    sys.exit(main())
