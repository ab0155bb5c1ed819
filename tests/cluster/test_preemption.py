"""A run that is signalled saves, leaves with exit code 0 on every rank, and continues as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from lisa_ds.cluster.environment import free_port
from lisa_ds.cluster.preemption import MARKER, SIGNALS, Preempted, Preemption, forget
from lisa_ds.integrations.preemption import PreemptionCallback
from tests.programs import ROOT
from tests.training_runs import write_run


def run(folder: Path, signalled: str = "", *more: str, ranks: int = 2) -> tuple[list[int], str]:
    """Ranks as `srun` starts them: no launcher in between. Returns their exit codes and what they said."""
    port = free_port()
    started = []
    for rank in range(ranks):
        environment = os.environ | {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SIGNALLED": signalled, "OMP_NUM_THREADS": "1"},
            **{"LISA_DS_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        }
        command = [sys.executable, str(ROOT / "tests/cluster/signalled.py"), "--lisa_config", "run.yaml", *more]
        log = (folder / f"{rank}.log").open("w")
        started.append(
            subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        )
    try:
        codes = [process.wait(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, "".join((folder / f"{rank}.log").read_text() for rank in range(ranks))


def history(output_dir: Path) -> list[dict[str, Any]]:
    """Loss and gradient norm of each step, and the evaluations."""
    last = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{key: entry[key] for key in kept if key in entry} for entry in state["log_history"]]


@pytest.mark.nightly
@pytest.mark.multirank
def test_a_run_with_three_preemptions_ends_as_one_with_none(tmp_path: Path) -> None:
    one, many = (write_run(tmp_path / name) for name in ("one", "many"))
    more = ["training.eval_strategy=epoch", "training.report_to=none", "training.dataloader_num_workers=1"]
    codes, said = run(one, "", *more)
    assert codes == [0, 0], said
    shutil.copytree(one / "cache", many / "cache")

    for signalled, step, name in [
        ("1:load:SIGUSR2", 0, "SIGUSR2"),  # one rank, long before the other can be asked
        # One rank amid a step; then both, while they save and when they are done.
        ("1:2:SIGUSR1,0:save:SIGTERM,1:save:SIGUSR2,0:exit:SIGUSR1,1:exit:SIGTERM", 2, "SIGUSR1"),
        ("0:6:SIGTERM,1:6:SIGTERM", 6, "SIGTERM"),  # the last step, and the end of an epoch, which is evaluated
    ]:
        codes, said = run(many, signalled, *more, "--resume", "auto")
        assert codes == [0, 0], said
        checkpoint = f"out/checkpoint-{step}" if step else None
        saved = f"saved to {checkpoint}" if step else "nothing to save"
        assert f"preempted by {name} after step {step}, {saved}; out/{MARKER} says so" in said
        marker = json.loads((many / "out" / MARKER).read_text())
        assert (marker["step"], marker["checkpoint"], marker["signal"]) == (step, checkpoint, name)
        assert datetime.fromisoformat(marker["time"]) < datetime.now(timezone.utc)
        assert not (many / "out/model").exists()

    codes, said = run(many, "", *more, "--resume", "auto")
    assert codes == [0, 0], said
    assert not (many / "out" / MARKER).exists()
    weights, again = (load_file(folder / "out/model/model.safetensors") for folder in (one, many))
    assert weights.keys() == again.keys()
    assert all(weight.equal(again[name]) for name, weight in weights.items())
    steps, again_steps = history(one / "out"), history(many / "out")
    assert (
        [entry["step"] for entry in steps] == [0, 1, 2, 3, 3, 4, 5, 6] == [entry["step"] for entry in again_steps][:-1]
    )
    assert steps == again_steps[:-1]  # and the evaluation after step 6, before which a run that goes on saves


ARGUMENTS = {"report_to": "none", "use_cpu": True}


@pytest.fixture
def heard() -> Iterator[PreemptionCallback]:
    """A callback whose only rank has heard SIGUSR1."""
    with Preemption().listening() as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        yield PreemptionCallback(preemption)


def amid(step: int, epoch: float = 0.5, max_steps: int = 10) -> tuple[TrainerState, TrainerControl]:
    return TrainerState(global_step=step, epoch=epoch, max_steps=max_steps), TrainerControl()


def test_the_save_does_not_depend_on_how_good_the_model_is(heard: PreemptionCallback, tmp_path: Path) -> None:
    args = TrainingArguments(tmp_path, **ARGUMENTS, save_only_model=True)
    args.save_strategy = SaveStrategy.BEST
    state, control = amid(3)
    heard.on_step_end(args, state, control)
    assert control.should_save
    assert control.should_log
    assert args.save_strategy == "steps"
    assert not args.save_only_model
    with pytest.raises(Preempted, match=f"SIGUSR1 after step 3, saved to {tmp_path}/checkpoint-3"):
        heard.on_save(args, state, control)


def test_an_evaluation_is_not_broken_off_but_that_before_training(tmp_path: Path) -> None:
    args, (state, control) = TrainingArguments(tmp_path, **ARGUMENTS), amid(0)
    with Preemption().listening() as preemption:
        callback = PreemptionCallback(preemption)
        callback.on_train_begin(args, state, control)
        callback.on_prediction_step(args, state, control)
        os.kill(os.getpid(), signal.SIGUSR1)
        for begin in (callback.on_prediction_step, callback.on_train_begin):
            with pytest.raises(Preempted, match="after step 0, nothing to save"):
                begin(args, state, control)

    with Preemption().listening() as preemption:
        callback = PreemptionCallback(preemption)
        callback.on_train_begin(args, state, control)
        callback.on_step_begin(args, state, control)
        state, control = amid(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        callback.on_prediction_step(args, state, control)
        assert not control.should_save
        callback.on_evaluate(args, state, control)
        assert control.should_save

        callback = PreemptionCallback(preemption)
        callback.on_train_end(args, state, control)
        state, control = amid(10, max_steps=10)
        callback.on_evaluate(args, state, control)  # that after training
        assert not control.should_save


def test_a_run_that_stops_early_is_let_finish(heard: PreemptionCallback, tmp_path: Path) -> None:
    args, (state, control) = TrainingArguments(tmp_path, **ARGUMENTS), amid(3)
    heard.on_step_end(args, state, control)
    control.should_training_stop = True  # by the evaluation that follows
    heard.on_save(args, state, control)
    heard.on_epoch_end(args, state, control)


def test_a_checkpoint_that_is_written_over_is_incomplete_until_it_is_done(
    heard: PreemptionCallback, tmp_path: Path
) -> None:
    args, (state, control) = TrainingArguments(tmp_path, **ARGUMENTS), amid(3, epoch=1.0)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/trainer_state.json").touch()
    heard.on_save(args, state, control)  # as save_steps says, before the epoch is evaluated
    heard.on_step_end(args, state, control)
    assert not control.should_save
    control.should_evaluate = True
    heard.on_epoch_end(args, state, control)
    assert control.should_save
    assert not (tmp_path / "checkpoint-3/trainer_state.json").exists()
    control.should_evaluate = False
    with pytest.raises(Preempted, match="after step 3"):
        heard.on_epoch_end(args, state, control)  # nothing new: it is there already


def test_signals_are_heard_only_while_listening(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption().listening() as preemption:
        assert preemption.agreed() == 0
        for number in (signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert preemption.agreed() == signal.SIGUSR2  # the first
    assert [signal.getsignal(number) for number in SIGNALS] == before
    preemption.leave(tmp_path, Preempted(0, None, signal.SIGUSR2))
    assert json.loads((tmp_path / MARKER).read_text())["checkpoint"] is None
    for _ in range(2):
        forget(tmp_path)
        assert list(tmp_path.iterdir()) == []
