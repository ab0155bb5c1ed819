"""Every mistake in what is asked of `lisa-ds compare` is refused in a line, before anything is run or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_ds import cli
from tests.compare.campaigns import compare, folder, started, write_run

__all__ = ["folder"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "full"], "compare: takes two arms or more; name them by --methods full,lisa or by --arms FILE"),
        (["--methods", "full,full"], "compare: the arm 'full' is given twice"),
        (["--methods", "full,lsia"], "--methods: method: should be 'lisa', 'full', 'lora' or 'galore', got 'lsia'; did you mean 'lisa'?"),
        (["--methods", "full,lisa", "--seeds", "0,one"], "--seeds: should be whole numbers, 0 or more, with commas, such as 0,1,2, got '0,one'"),
        (["--methods", "full,lisa", "--seeds", "0,1,0"], "--seeds: should be different numbers, got '0,1,0'"),
        (["--methods", "full,lisa", "--seeds", "1,1000"], "--screen-seed: 1000 is among --seeds: what chose the learning rates must not judge them"),
        (["--methods", "full,lisa", "--against", "lora"], "--against: should be one of full, lisa, got 'lora'"),
        (["--methods", "full,lisa", "--rates", "0"], "argument --rates: should be a whole number, 1 or more, got '0'; see `lisa-ds compare --help`"),
        (["--methods", "full,lisa", "--arms", "none.yaml"], "none.yaml: no such file (looked from {folder})"),
        (["--methods", "full,lisa", "training.learning_rate=1e-4"], "command line: training.learning_rate: is not for a comparison to be given: each arm searches its own; see --rates, and the key rates of a file of arms"),
        (["--methods", "full,lisa", "training.seed=1"], "command line: training.seed: is not for a comparison to be given: --seeds says which"),
        (["--methods", "full,lisa", "training.output_dir=x"], "command line: training.output_dir: is not for a comparison to be given: each run has a directory of its own in --out"),
        (["--methods", "full,lisa", "training.data_seed=1"], "command line: training.data_seed: would give the rows of all seeds one order; leave it out"),
        (["--methods", "full,lisa", "data.eval_part=verdict"], "command line: data.eval_part: is not for a comparison to be given: learning rates are chosen on select, and the verdict is read on verdict"),
        (["--methods", "full,lisa", "data.eval_fraction=0"], "run.yaml: data: nothing is held out to compare by; set data.eval_fraction, eval_split or eval_path"),
        (["--methods", "full,lisa", "training.early_stopping_patience=2"], "command line: training.early_stopping_patience: a run would choose by the rows that judge it, got 2; leave it out of a comparison"),
        (["--methods", "full,lisa", "training.load_best_model_at_end=true"], "command line: training.load_best_model_at_end: a run would choose by the rows that judge it, got True; leave it out of a comparison"),
        (["--methods", "full,lisa", "training.max_stepz=3", "lisa.sed=3"], "command line: lisa.sed: unknown key, got 3; did you mean 'lisa.seed'?"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(
    words: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told.format(folder=folder) if "{folder}" in told else told
    words = words if "--seeds" in words else [*words, "--seeds", "0,1"]
    assert cli.main(["compare", "run.yaml", "--out", "out", "--num-gpus", "2", *words]) == 2
    assert capsys.readouterr().err == f"lisa-ds: error: {told}\n"
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ("[full, lisa]", "arms.yaml: should hold keys and values, got list"),
        ("A: full", "arms.yaml: A: should hold keys of a run, such as {method: lisa}, got 'full'"),
        ("A: {method: full}\nB: {methd: lisa}", "arms.yaml: B: methd: unknown key, got 'lisa'; did you mean 'method'?"),
        ("A: {method: full}\nB: {lisa.num_layers: 2}", "arms.yaml: B: lisa.num_layers: unknown key, got 2; did you mean 'lisa.num_sampled_layers'?"),
        ("A: {method: full}\nB: {lisa.interval_steps: 0}", "arms.yaml: B: lisa.interval_steps: should be a number of optimizer steps, 1 or more, or epochs as \"1epoch\", got 0"),
        ("A: {method: full}\nB: {data.max_length: 8}", "arms.yaml: B: data.max_length: does not belong to an arm: all arms see the same rows"),
        ("A: {method: full}\nB: {data: {path: x}}", "arms.yaml: B: data: does not belong to an arm: all arms see the same rows"),
        ("A: {method: full}\nB: {lisa.seed: 8}", "arms.yaml: B: lisa.seed: does not belong to an arm: --seeds says which"),
        ("A: {method: full}\nB: {training: {}}", "arms.yaml: B: training: does not belong to an arm: write its keys with dots, such as training.weight_decay"),
        ("A: {method: full}\nB: {training.learning_rate: 1}", "arms.yaml: B: training.learning_rate: does not belong to an arm: the learning rates that an arm tries are its rates"),
        ("A: {method: full}\nB: {model.name_or_path: x}", "arms.yaml: B: model.name_or_path: does not belong to an arm: all arms train the same model"),
        ("A: {method: full}\nB: {rate: [1.0]}", "arms.yaml: B: rate: unknown key; did you mean 'rates'?"),
        ("A: {method: full}\nB: {rates: []}", "arms.yaml: B: rates: should be a list of different learning rates, got []"),
        ("A: {method: full}\nB: {rates: [1, x]}", "arms.yaml: B: rates: should be a list of learning rates above 0, got [1, 'x']"),
        ("A: {method: full}\nB: {rates: [1, 1.0]}", "arms.yaml: B: rates: should be a list of different learning rates, got [1, 1.0]"),
        ("A: {method: full, rates: [1, 2]}\nB: {rates: [1]}", "arms.yaml: B: rates: each arm tries equally many; 'A' tries 2, and here are 1"),
        ("A: {method: full}\nB: {training.gradient_accumulation_steps: 1}", "arms.yaml: B: 2 rows of a rank in a step (per_device_train_batch_size times gradient_accumulation_steps), and 4 without this arm's changes: all arms see the same rows in a step"),
        ("A: {method: full}\nB: {training.per_device_eval_batch_size: 1}", "arms.yaml: B: training.per_device_eval_batch_size: does not belong to an arm: held-out loss is a mean over batches of this size"),
        ("A: {method: full}\nB: {training.lr_scheduler_type: reduce_lr_on_plateau}", "arms.yaml: B: training.lr_scheduler_type: a run would choose by the rows that judge it, got 'reduce_lr_on_plateau'; leave it out of a comparison"),
        ("A: {}\nB: {method: lisa}", "arms.yaml: B: 'B' is the same run as 'A': nothing would be compared"),
        ("A: {method: full}\nB: {method: full, lisa.interval_steps: 7}", "arms.yaml: B: 'B' is the same run as 'A': nothing would be compared"),
        ("'a|b': {method: full}\nB: {}", "arms.yaml: 'a|b': the name of an arm should be text without | and line breaks"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_of_arms(arms: str, told: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "arms.yaml").write_text(arms)
    assert compare("--arms", "arms.yaml", methods="") == 2
    assert capsys.readouterr().err == f"lisa-ds: error: {told}\n"
    assert not (folder / "out").exists()


def test_a_mistake_in_the_run_itself_is_told_as_the_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(folder, method="lsia")
    assert compare() == 2
    assert capsys.readouterr().err.startswith("lisa-ds: error: run.yaml: method: should be ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", "--methods", "full,lisa"], "compare: name a directory: --out DIR"),
        (["compare", "--out", "out", "--methods", "full,lisa"], "compare: name the FILE of a run; or --report-only for the report of a comparison that has been made"),
        (["compare", "--out", "out", "--report-only"], "out/comparison.jsonl: no records can be read: No such file or directory"),
    ],
)  # fmt: skip
def test_what_has_to_be_named(words: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"lisa-ds: error: {told}\n"


def test_another_file_of_records_is_no_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    (folder / "out/comparison.jsonl").write_text("")
    assert compare() == 2
    told = "out/comparison.jsonl: should begin with a record 'comparison', as `lisa-ds compare` writes it\n"
    assert capsys.readouterr().err == f"lisa-ds: error: {told}"


def test_an_arm_of_a_method_that_runs_without_deepspeed_has_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "arms.yaml").write_text(
        "r 8: {method: galore, galore.rank: 8}\nown: {method: galore, deepspeed: x.json}\n"
    )
    (folder / "x.json").write_text("{}")
    assert compare("--arms", "arms.yaml", "--dry-run", "deepspeed=x.json", methods="galore,lora") == 0
    said = capsys.readouterr().out
    assert "galore: {method: galore, deepspeed: None}; " in said
    assert "lora: {method: lora}; " in said
    assert "r 8: {method: galore, galore.rank: 8, deepspeed: None}; " in said
    assert "own: {method: galore, deepspeed: x.json}; " in said  # which is refused by the checks before the first run


def test_a_dry_run_tells_what_would_be_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "arms.yaml").write_text("K 5: {method: lisa, lisa.interval_steps: 5, rates: [3e-3, 1e-3]}\n")
    assert compare("--arms", "arms.yaml", "--dry-run", methods="full") == 0
    assert capsys.readouterr().out == (
        "full: {method: full}; learning rates 8.7e-05, 0.00026\n"
        "K 5: {method: lisa, lisa.interval_steps: 5}; learning rates 0.001, 0.003\n"
        "8 runs: of each arm 2 learning rates with seed 1000, then seeds 0, 1; compared with full\n"
    )
    assert started(folder) == []
    assert not (folder / "out").exists()
