"""The phases of a step, against phases that are known to last: each engine, and none."""

from __future__ import annotations

import functools
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.shortened import shortened

STEPS, ACCUMULATION = 2, 2
LASTS = {"forward_s": 0.4, "backward_s": 0.6, "optimizer_s": 0.8, "switch_s": 1.0}
"""Seconds that each is made to last, of an optimizer step."""

SLOW = 0.35
"""Seconds that a phase may last longer on a busy machine: less than any phase, which would be seen in the wrong place."""

ZERO: dict[str, int | None] = {"lisa": 3, "full": 3, "ZeRO-2": 2, "no DeepSpeed": None}


def train(folder: str, case: str) -> list[dict[str, Any]]:
    """The entries of a run whose phases are made longer by what :data:`LASTS` says."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    import lisa_ds
    from lisa_ds.integrations import hf
    from lisa_ds.integrations.phases import Phases

    class Slow(TrainerCallback):
        """Before the others: what it puts on the engine is inside of what is timed."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine = trainer.deepspeed
            if engine is None:
                sleep_in(trainer.optimizer, "step", LASTS["optimizer_s"])
            else:
                sleep_in(engine, "_take_model_step", LASTS["optimizer_s"])
            if case == "lisa":
                sleep_in(engine, "train_units", LASTS["switch_s"])

    unset_hf_deepspeed_config()
    zero = ZERO[case]
    ours = {"zero_optimization": {"stage": zero}, "train_micro_batch_size_per_gpu": "auto"}
    args = TrainingArguments(
        f"{folder}/{case}", use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", eval_strategy="steps",
        eval_steps=1, max_steps=STEPS, logging_steps=1, per_device_eval_batch_size=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATION, deepspeed=None if zero is None else ours,
    )  # fmt: skip
    if zero is not None:
        hf.join_process_group()
    model: Any = AutoModelForCausalLM.from_config(tiny.config(), attn_implementation="eager").float()
    rows = [{"input_ids": torch.arange(9), "labels": torch.arange(9)}] * 16
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:4])
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: slowly(output))
    trainer.callback_handler.callbacks[:0] = [Slow(), Phases(trainer)]
    if case == "lisa":
        lisa_ds.attach(trainer, {"num_sampled_layers": 1, "interval_steps": 1, "sampler": "cyclic"})
    trainer.train()
    assert not {"step", "count_step"} & vars(trainer.deepspeed or object).keys()  # all is let go of
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def slowly(output: Any) -> None:
    """Forward, also that of an evaluation, which does not count."""
    time.sleep(LASTS["forward_s"] / ACCUMULATION)
    if output.requires_grad:
        output.register_hook(lambda gradient: time.sleep(LASTS["backward_s"] / ACCUMULATION))


def sleep_in(owner: Any, name: str, seconds: float) -> None:
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return stock(*args, **kwargs)

    setattr(owner, name, slow)


def check(entries: list[dict[str, Any]], case: str) -> None:
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry in entries[1:]:  # the first holds what comes only once
        for key, seconds in LASTS.items():
            if key == "switch_s" and case != "lisa":
                assert key not in entry
                continue
            assert seconds <= entry[key] < seconds + SLOW, (case, key, entry)


@pytest.mark.multirank
@pytest.mark.parametrize("case", shortened([case for case, stage in ZERO.items() if stage is not None], "lisa"))
def test_each_phase_is_timed_under_each_engine(tmp_path: Path, case: str) -> None:
    for entries in run_ranks(2, train, tmp_path, str(tmp_path), case, timeout_s=240):
        check(entries, case)


def test_without_deepspeed(tmp_path: Path) -> None:
    check(train(str(tmp_path), "no DeepSpeed"), "no DeepSpeed")


def test_a_gpu_is_read_when_an_entry_is_logged_and_not_waited_for_before(tmp_path: Path) -> None:
    from lisa_ds.integrations.phases import Phases

    class Device:
        """Whose work is over only when it is waited for."""

        def __init__(self) -> None:
            self.moments, self.waits = 0, 0

        def now(self) -> int:
            self.moments += 1
            return self.moments

        def is_over(self, moment: int, *, wait: bool) -> bool:
            self.waits += wait
            return wait

        def between(self, begin: int, end: int) -> float:
            return end - begin

    class State:
        global_step = 0
        log_history = ({},)

    phases: Any = object.__new__(Phases)
    device = Device()
    phases._stopwatch, phases._phase, phases._spans, phases._logged = device, None, deque(), 0
    phases._seconds = {"backward_s": 0.0, "optimizer_s": 0.0}
    for _ in range(2):
        with phases._during("backward_s"), phases._during("optimizer_s"):
            pass
        phases.on_step_end()
    assert device.waits == 0
    State.global_step = 2
    logs = {"loss": 1.0}
    phases.on_log(None, State, None, logs)
    assert logs == {"loss": 1.0, "backward_s": 2.0, "optimizer_s": 1.0}  # of four moments a step
    assert device.waits > 0
