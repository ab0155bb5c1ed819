"""launch/train.py from end to end, by the stock launcher on two CPU ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisa_ds import records, run_log
from lisa_ds.memory import catalogue
from tests import tiny
from tests.training_runs import TRACKER, launch, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that has trained, and what it printed."""
    folder = write_run(tmp_path_factory.mktemp("train"))
    done = launch(folder, "lisa.seed=3", really=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.multirank
def test_a_run_says_what_it_did_once(finished: tuple[Path, str]) -> None:
    _, output = finished
    before, after = output.split("\nheld-out loss ")[1].split("\n")[0].split(" -> ")
    assert float(after) < float(before)
    for text in (
        "training data: ",
        "held-out data: ",
        "learning rates: 0.01 (layers, embeddings, lm_head, rest)",
        "step 1: interval 0 trains layers [",
        "steps: 6, all applied",
        "; live state ",
        " MB on each of 2 ranks (gradients ",
        "full fine-tuning would hold ",
        " in 3 intervals",
        "tokens/s: ",
        "model: out/model",
    ):
        found = [line for line in output.splitlines() if text in line]
        assert len(found) == (3 if text == "; live state " else 1), (text, output)
    ours = [line for line in output.splitlines() if not line.startswith("[")]  # the launcher's
    assert max(map(len, ours)) <= 100
    stages = [line.removesuffix(" ...") for line in ours if line.endswith(" ...")]
    assert stages == [
        "loading torch, transformers and DeepSpeed",
        "checking the run and planning its memory",
        "reading and tokenising rows.jsonl",
        "joining the process group; DeepSpeed compiles an operator if it is the first time",
        "loading the weights of model",
        "building the engine",
        "measuring the held-out loss before training",
        "training, from step 1 to 6",
        "measuring the held-out loss after training",
        "exporting the trained model to out/model",
    ]


@pytest.mark.multirank
def test_records_hold_what_was_printed_and_what_full_fine_tuning_would_take(finished: tuple[Path, str]) -> None:
    folder, output = finished
    read = {(record.name, record.variant, record.x): record for record in records.read(folder / "out/records.jsonl")}
    losses = [read["held_out_loss", "lisa", step].value for step in (0, 6)]
    assert "held-out loss {:.4f} -> {:.4f}".format(*losses) in output
    assert read["live_bytes/weights", "lisa", None].value == read["live_bytes/weights", "full, planned", None].value
    live, full = (read["live_bytes/exp_avg", variant, None].value for variant in ("lisa", "full, planned"))
    block = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) // 2  # fp32, on one of two ranks
    assert full - live == 3 * block
    assert read["tokens_per_second", "lisa", None].settings["config"]["lisa"]["seed"] == 3


@pytest.mark.multirank
def test_speed_is_in_every_log_entry_in_the_records_and_on_the_console(finished: tuple[Path, str]) -> None:
    folder, output = finished
    history = json.loads((folder / "out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["tokens_per_second"] == pytest.approx(2 * entry["tokens_per_second_per_gpu"], abs=0.2)
        assert 0 < entry["mfu"] < entry["hfu"] < 1  # padding and checkpointing
        assert entry["max_rank_memory_gb"] > 0.1
    read = {record.name: record for record in records.read(folder / "out/records.jsonl")}
    assert 0 < read["mfu"].value < read["hfu"].value
    assert read["max_rank_memory_gb"].value == entries[-1]["max_rank_memory_gb"] or (
        read["max_rank_memory_gb"].value > entries[-1]["max_rank_memory_gb"]  # exporting took more
    )
    rate = read["tokens_per_second_per_gpu"].value
    (line,) = [line for line in output.splitlines() if line.startswith("on each rank: ")]
    assert line.startswith(f"on each rank: {rate:.0f} tokens a second, MFU {read['mfu'].value:.1%}, HFU ")


def read_events(output: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing import event_accumulator

    (folder,) = {events.parent for events in output.rglob("events.*")}
    return event_accumulator.EventAccumulator(str(folder)).Reload()


@pytest.mark.multirank
def test_trackers_see_lisa(finished: tuple[Path, str]) -> None:
    pytest.importorskip("tensorboard")
    read = read_events(finished[0] / "out")
    intervals = [scalar.value for scalar in read.Scalars("train/lisa/interval")]
    assert intervals == [0, 0, 1, 1, 2, 2]
    assert all(scalar.value > 0 for scalar in read.Scalars("train/tokens_per_second"))


@pytest.mark.multirank
def test_the_log_holds_what_trackers_get_and_what_ran(finished: tuple[Path, str]) -> None:
    log = run_log.read(finished[0] / "out")
    assert log.start is not None
    assert (log.start.world_size, log.start.steps, log.start.device) == (2, 6, "2 x CPU")
    assert (log.start.config["lisa"]["seed"], log.start.config["deepspeed"]) == (3, None)
    assert [point.value for point in log.series("lisa/interval")] == [0, 0, 1, 1, 2, 2]
    switches = [point.value for point in log.series("switch_s")]
    assert min(switches[1], switches[3]) > max(switches[0], switches[2]) >= 0  # after the second step of two
    if TRACKER != "none":
        scalars = read_events(finished[0] / "out")
        for tag in scalars.Tags()["scalars"]:
            key = tag.removeprefix("train/") if tag.startswith("train/") else f"eval_{tag.removeprefix('eval/')}"
            told = [(point.step, point.value) for point in log.series(key)]
            seen = {scalar.step: scalar.value for scalar in scalars.Scalars(tag)}  # of a step the last, as the log's
            assert seen == pytest.approx(dict(told), rel=1e-6), tag


@pytest.mark.multirank
def test_the_exported_model_reloads_equal(finished: tuple[Path, str]) -> None:
    model = finished[0] / "out/model"
    assert {path.name for path in model.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    written = load_file(model / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert written.keys() == loaded.keys()
    assert all(weight.equal(loaded[name]) for name, weight in written.items())
    saved = load_file(finished[0] / "out/checkpoint-6/model.safetensors")
    assert all(weight.equal(saved[name]) for name, weight in written.items())
    start = load_file(finished[0] / "model/model.safetensors")
    assert not any(weight.float().equal(start[name]) for name, weight in written.items() if "layers" not in name)
    assert AutoTokenizer.from_pretrained(model).chat_template == tiny.CHAT
    assert json.loads((model / "config.json").read_text())["use_cache"] is True  # off in training, but not for good


@pytest.mark.versions
@pytest.mark.multirank
def test_resume_is_exact_and_passes_over_what_is_incomplete(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, output = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "out/checkpoint-6/trainer_state.json").unlink()  # as if killed while it saved
    done = launch(copy, "lisa.seed=3", "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passing over out/checkpoint-6, which has no trainer_state.json" in done.stderr
    assert "--resume auto: going on from out/checkpoint-3, after step 3\n" in done.stdout
    assert "mismatch" not in done.stderr  # of accelerate, about micro-batches that the trainer counts
    log = run_log.read(copy / "out")
    assert log.begun_at == (0, 3)
    assert [point.step for point in log.series("loss")] == [1, 2, 3, 4, 5, 6]
    first, again = (load_file(at / "out/model/model.safetensors") for at in (folder, copy))
    assert all(weight.equal(again[name]) for name, weight in first.items())
    (summary,) = [line for line in output.splitlines() if line.startswith("held-out loss")]
    assert summary in done.stdout.splitlines()
    # of a run that has all its steps nothing is told that would be of steps
    for events in (copy / "out").rglob("events.*"):
        events.unlink()
    (copy / "out/records.jsonl").unlink()
    done = launch(copy, "lisa.seed=3", "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--resume auto: going on from out/checkpoint-6, after step 6; no step is left\n" in done.stdout
    assert summary in done.stdout.splitlines()
    assert "tokens" not in done.stdout.split("exporting the trained model")[1]
    assert not [record for record in records.read(copy / "out/records.jsonl") if "token" in record.name]
    if TRACKER != "none":
        scalars = read_events(copy / "out").Tags()["scalars"]
        assert "eval/loss" in scalars
        assert "train/train_loss" not in scalars


@pytest.mark.multirank
def test_a_resume_in_another_order_of_rows_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    done = launch(copy, "lisa.seed=3", "--resume", "auto", "training.seed=7")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "out/checkpoint-6 was saved with training.seed 42, and now it is 7: rows would be left out" in done.stderr


def test_a_run_that_cannot_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    huge = catalogue.require(
        "meta-llama/Llama-3.1-405B"
    )  # no weights: had they been looked for, that would be the error
    (tmp_path / "model/config.json").write_text(json.dumps(huge))
    done = launch(tmp_path, "training.report_to=none", ranks=0)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: run.yaml: model.name_or_path: the run needs " in done.stderr
    assert "What to change first" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    forced = launch(tmp_path, "training.report_to=none", "--force", ranks=0)
    assert "going on all the same, as --force says: the run needs " in forced.stderr
    assert "holds a config.json and no weights" in forced.stderr  # further than the memory's check


@pytest.mark.multirank
def test_one_rank_classifies_stops_early_and_keeps_the_best_model(tmp_path: Path) -> None:
    """Without a launcher, by full fine-tuning: the rest of what a run can be."""
    data = {"path": "rows.jsonl", "eval_fraction": 0.25, "max_length": 32}
    write_run(tmp_path, model={"name_or_path": "model", "task": "sequence_classification"}, data=data, method="full")
    tiny.write_rows(tmp_path / "rows.jsonl", lambda i: {"text": f"{i}", "label": "odd" if i % 2 else "even"})
    more = ["training.early_stopping_patience=1", "training.eval_strategy=steps", "training.eval_steps=1"]
    more += ["training.save_steps=1", "training.max_steps=50", "training.learning_rate=3.0", "training.report_to=none"]
    done = launch(tmp_path, *more, ranks=0)
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads(
        max((tmp_path / "out").glob("checkpoint-*"), key=_step).joinpath("trainer_state.json").read_text()
    )
    assert 0 < state["global_step"] < 50
    best, model = (load_file(tmp_path / "out" / at / "model.safetensors") for at in (_best(state), "model"))
    assert all(weight.equal(model[name]) for name, weight in best.items())
    assert sorted(json.loads((tmp_path / "out/model/config.json").read_text())["label2id"]) == ["even", "odd"]
    assert "live state " in done.stdout
    assert "layers visited" not in done.stdout


@pytest.mark.multirank
def test_lisa_stops_early_keeps_the_best_model_and_its_patience(tmp_path: Path) -> None:
    write_run(tmp_path)
    more = ["training.early_stopping_patience=3", "training.eval_strategy=steps", "training.eval_steps=1"]
    more += ["training.save_steps=1", "training.max_steps=50", "training.learning_rate=0.3", "training.report_to=none"]
    done = launch(tmp_path, *more, ranks=0)
    assert done.returncode == 0, done.stdout + done.stderr
    last = max((tmp_path / "out").glob("checkpoint-*"), key=_step)
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["global_step"] == state["best_global_step"] + 3 < 50
    best, model = (load_file(tmp_path / "out" / at / "model.safetensors") for at in (_best(state), "model"))
    assert all(weight.equal(model[name]) for name, weight in best.items())
    intervals = -(-state["global_step"] // 2)
    assert f" in {intervals} intervals" in done.stdout  # of all that trained, not of the best model alone
    (summary,) = [line for line in done.stdout.splitlines() if line.startswith("held-out loss")]

    shutil.rmtree(last)
    again = launch(tmp_path, *more, "--resume", "auto", ranks=0)
    assert again.returncode == 0, again.stdout + again.stderr
    assert max((tmp_path / "out").glob("checkpoint-*"), key=_step) == last  # and not three evaluations later
    assert summary in again.stdout.splitlines()
    assert f" in {intervals} intervals" in again.stdout


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _best(state: dict[str, Any]) -> str:
    return Path(state["best_model_checkpoint"]).name


@pytest.mark.multirank
def test_an_error_found_on_every_rank_is_told_once_and_leaves_nothing(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = sorted(path for path in folder.rglob("*") if "cache" not in path.parts)
    done = launch(folder, "lisa.num_sampled_layers=9", "training.output_dir=new/deep")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert (
        "[rank 0] error: command line: lisa.num_sampled_layers: the model has 4 layers, got 9; choose 1 to 4, "
        "or check that layers_path leads to the block stack\n" in done.stderr
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(path for path in folder.rglob("*") if "cache" not in path.parts) == before
