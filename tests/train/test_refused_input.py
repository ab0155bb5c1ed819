"""Every way to get the input of launch/train.py wrong: one message, in words, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from lisa_ds import records
from lisa_ds.config import load_config
from lisa_ds.train import arguments, command
from lisa_ds.train.summary import Summary
from tests import tiny
from tests.training_runs import write_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to spoil, in the working directory, on one rank of this process."""
    monkeypatch.chdir(write_run(tmp_path))
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (["training.learning_rat=1"], "command line: training.learning_rat: unknown key, got 1; did you mean 'learning_rate'?"),
        (["training.lr=1"], "command line: training.lr: unknown key, got 1; did you mean 'training.learning_rate'?"),
        (["training.max_steps=x"], "command line: training.max_steps: should be a whole number, got 'x'"),
        (["training.bf16=1"], "command line: training.bf16: should be true or false, got 1"),
        (
            ["training.save_strategy=epochs"],
            "command line: training.save_strategy: should be one of 'no', 'steps', 'epoch', 'best', got 'epochs'; "
            "did you mean 'epoch'?",
        ),
        (["training.learning_rate=-1"], "command line: training.learning_rate: should be 0 or more, got -1"),
        (
            ["training.resume_from_checkpoint=x"],
            "command line: training.resume_from_checkpoint: does not belong here: resuming is asked for on the command "
            "line, --resume auto or --resume PATH, got 'x'",
        ),
        (
            ["training.report_to=comet"],
            "command line: training.report_to: comet is not installed or not known to transformers; there is *",
        ),
        (
            ["data.eval_fraction=0", "training.eval_on_start=true"],
            "command line: training.eval_on_start: needs held-out data; set data.eval_fraction, eval_split or eval_path",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 3, stage3_max_live_params: 3}}"],
            "command line: deepspeed: zero_optimization.stage3_max_live_params: DeepSpeed says: Extra inputs are not permitted, "
            "got 3",
        ),
        (
            ["deepspeed={train_batch_size: 7}"],
            "command line: deepspeed: train_batch_size: contradicts run.yaml: training, where per_device_train_batch_size x "
            'gradient_accumulation_steps on 1 ranks is 4, got 7; write "auto" here',
        ),
        (
            ["deepspeed={tensor_parallel: {autotp_size: 2}}"],
            "command line: deepspeed: tensor_parallel.autotp_size: so many of this run's 1 ranks share each layer, got 2; "
            "choose a number that divides them, or leave it out",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 3}, expert_parallel: {enabled: true}}"],
            "command line: deepspeed: expert_parallel.enabled: AutoEP keeps experts in groups of ranks of their own; *",
        ),
        (["training.report_to=[1]"], "command line: training.report_to: should be nothing or text or a list of text, got [1]"),
        (
            ["training.metric_for_best_model=accuracy"],
            "command line: training.metric_for_best_model: a run measures eval_loss, got 'accuracy'",
        ),
        (
            ["training.output_dir=rows.jsonl/out"],
            "command line: training.output_dir: rows.jsonl/out cannot be made: *rows.jsonl is a file",
        ),
        (
            ["data.eval_fraction=0", "training.early_stopping_patience=2"],
            "command line: training.early_stopping_patience: needs held-out data; set data.eval_fraction, eval_split "
            "or eval_path",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 2}}"],
            "command line: deepspeed: zero_optimization.stage: method 'lisa' shards its state under ZeRO-3, got 2; set it to 3",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 3, offload_param: {device: nvme, nvme_path: x}}, compile: {deepcompile: true}}"],
            "command line: deepspeed: zero_optimization.offload_param.device: 'nvme' is not supported; use 'cpu' or 'none'\n"
            "command line: deepspeed: compile.deepcompile: *",
        ),
        (
            ["deepspeed={gradient_clipping: 0.5}"],
            "command line: deepspeed: gradient_clipping: contradicts run.yaml: training, where max_grad_norm is 1.0, "
            'got 0.5; write "auto" here, the value lives there',
        ),
        (["--deepspeed_config", "no.json"], "no.json: no such file (looked from *"),
        (["--lisa_confg", "x"], "unrecognized arguments: --lisa_confg; see `deepspeed launch/train.py --help`"),
        (["data.path=no.jsonl"], "command line: data.path: no such file or directory: no.jsonl (looked from *"),
        (["model.name_or_path=model/../modl"], "*no such directory*; did you mean 'model/../model'?*"),
        (["--resume", "nowhere"], "--resume: no such directory: nowhere (looked from *"),
        (["--resume", "model"], "--resume: model is not a complete checkpoint of a run: it has no latest"),
        (
            ["training.output_dir=used"],
            "command line: training.output_dir: used holds another run's checkpoint-3; continue it with --resume auto, or choose "
            "another directory",
        ),
        (
            ["training.optim=adafactor"],
            "command line: training.optim: lisa.optimizer 'masked_adamw' computes AdamW, got 'adafactor'; leave it out, or set "
            "lisa.optimizer to 'adamw' to keep the optimizer that is given",
        ),
        (
            ["lisa.optimizer.precision=stochastic_rounding", "training.bf16=false"],
            "command line: lisa.optimizer.precision: 'stochastic_rounding' rounds bf16 weights; set training.bf16 to true, or use "
            "'mixed'",
        ),
        (
            [
                "lisa.optimizer.precision=stochastic_rounding",
                "training.bf16=true",
                'deepspeed={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
            ],
            "command line: lisa.optimizer.precision: 'stochastic_rounding' updates the weights on the device that has the "
            "gradients; use 'mixed', or remove zero_optimization.offload_optimizer",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: list[str], message: str
) -> None:
    (folder / "used/checkpoint-3").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    assert command.main(["--lisa_config", "run.yaml", *spoil]) == 2
    out, err = capsys.readouterr()
    beginning, *rest = message.split("*")
    assert err.startswith(f"[rank 0] error: {beginning}"), err
    assert all(part in err for part in rest)
    assert rest or err == f"[rank 0] error: {message}\n"
    assert all(line.endswith(" ...") for line in out.splitlines())  # what it was at
    assert [path for path in sorted(folder.rglob("*")) if "cache" not in path.parts] == before


def test_a_peak_that_is_no_number_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISA_DS_PEAK_TFLOPS", "fast")
    assert command.main(["--lisa_config", "run.yaml"]) == 2
    assert "error: LISA_DS_PEAK_TFLOPS: should be the dense TFLOP/s of one GPU, a number" in capsys.readouterr().err


def write_checkpoint_of_two_ranks(checkpoint: Path) -> None:
    (checkpoint / "global_step3").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step3")
    (checkpoint / "trainer_state.json").touch()
    for rank in (0, 1):
        (checkpoint / f"global_step3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        (checkpoint / f"rng_state_{rank}.pth").touch()


def test_a_run_continued_elsewhere_overwrites_no_other_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint_of_two_ranks(folder / "theirs/checkpoint-3")
    (folder / "out/model").mkdir(parents=True)
    assert command.main(["--lisa_config", "run.yaml", "--resume", "theirs/checkpoint-3"]) == 2
    assert "run.yaml: training.output_dir: out holds another run's model; " in capsys.readouterr().err
    assert command.main(["--lisa_config", "run.yaml", "--resume", "auto"]) == 2
    assert "--resume auto: out holds a finished run's model and no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["auto", "out/checkpoint-3"])
def test_a_checkpoint_of_more_ranks_is_refused_and_not_passed_over(
    folder: Path, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    write_checkpoint_of_two_ranks(folder / "out/checkpoint-3")
    assert command.main(["--lisa_config", "run.yaml", "--resume", resume]) == 2
    assert "out/checkpoint-3 was saved on 2 ranks and cannot be resumed on 1; run on 2 ranks" in capsys.readouterr().err


def test_every_mistake_of_the_training_section_is_told_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["training"] |= {"optim": "adamwtorch", "seed": 1.5, "warmup": 3}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    assert command.main(["--lisa_config", "run.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("[rank 0] error: run.yaml: training.optim: should be one of 'adamw_torch'")
    assert [line.split(":")[1] for line in lines[1:]] == [" training.seed", " training.warmup"]


def test_a_data_line_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"instruction": 3}\n')
    assert command.main(["--lisa_config", "run.yaml"]) == 2
    assert "rows.jsonl:25: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        (5, ["model.num_labels=2"], "command line: model.num_labels: the data has 5 classes, got 2"),
        (1, [], "run.yaml: data.path: all rows have the same label; there is nothing to tell apart"),
    ],
)
def test_classes_that_no_head_can_tell(
    folder: Path, capsys: pytest.CaptureFixture[str], labels: int, more: list[str], message: str
) -> None:
    tiny.write_rows(folder / "rows.jsonl", lambda i: {"text": f"{i}", "label": i % labels})
    assert command.main(["--lisa_config", "run.yaml", "model.task=sequence_classification", *more]) == 2
    assert capsys.readouterr().err == f"[rank 0] error: {message}\n"


def test_another_rank_speaks_only_if_rank_0_does_not(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command.time, "sleep", slept.append)
    assert command.main(["--lisa_config", "no.yaml"]) == 2
    assert slept == [command.RANK_0_SPEAKS_S]
    assert capsys.readouterr().err.startswith("[rank 1] error: no.yaml: no such file")


def test_early_stopping_brings_what_it_needs(folder: Path) -> None:
    config = load_config("run.yaml", ["training.early_stopping_patience=2", "training.save_strategy=steps"])
    needed = arguments._early_stopping(arguments.check(config))
    assert needed["load_best_model_at_end"]
    assert (needed["eval_strategy"], needed["metric_for_best_model"]) == ("steps", "eval_loss")


def test_what_a_deepspeed_config_leaves_out_is_what_training_says(folder: Path) -> None:
    config = load_config("run.yaml", ["deepspeed={zero_optimization: {stage: 3}}"])
    left_out = load_config("run.yaml")
    assert arguments.deepspeed_config(config) == arguments.deepspeed_config(left_out)
    kept = load_config("run.yaml", ["deepspeed={zero_optimization: {stage: 3}, gradient_clipping: 1.0}"])
    assert arguments.deepspeed_config(kept)["gradient_clipping"] == 1.0


def test_a_bare_no_is_not_false(folder: Path) -> None:
    assert arguments.check(load_config("run.yaml", ["training.save_strategy=no"]))["save_strategy"] == "no"


def test_the_former_name_of_checkpointing_is_understood(folder: Path) -> None:
    given = arguments.check(load_config("run.yaml"))
    known = {field for field in TrainingArguments.__dataclass_fields__}
    assert (
        given["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] is True
    )


@pytest.mark.parametrize(
    ("given", "every"),
    [({}, "epoch"), ({"save_strategy": "steps"}, "steps"), ({"save_strategy": "no"}, "epoch"), ({"eval_strategy": "steps"}, "steps")],
)  # fmt: skip
def test_early_stopping_evaluates_on_the_way(given: dict[str, str], every: str) -> None:
    assert arguments._early_stopping({"early_stopping_patience": 1, **given})["eval_strategy"] == every


def test_a_run_that_diverged_still_leaves_its_records(tmp_path: Path) -> None:
    numbers = dict.fromkeys(("gradients", "master", "exp_avg", "exp_avg_sq"), 1)
    summary = Summary(
        **{"method": "lisa", "steps": 3, "loss_before": 2.0, "loss_after": float("nan"), "live": numbers, "full": numbers},
        **{"num_layers": 4, "layers_visited": (1,), "num_intervals": 1, "tokens": 8, "seconds": 1.0, "world_size": 1},
        **{"device": "CPU", "model": tmp_path / "model", "skipped_steps": 1, "rows_without_labels": 5},
    )  # fmt: skip
    summary.write(tmp_path / "records.jsonl", {})
    read = {(record.name, record.x): record.value for record in records.read(tmp_path / "records.jsonl")}
    assert ("held_out_loss", 3) not in read
    assert read["held_out_loss", 0] == 2.0
    assert read["layers_visited", None] == 1
    assert "held-out loss 2.0000 -> nan" in summary.lines()
    assert (read["applied_steps", None], read["skipped_steps", None], read["rows_without_labels", None]) == (2, 1, 5)
    assert "steps: 3, 2 applied and 1 skipped, as their gradients were not finite" in summary.lines()
    assert "rows without labels: 5; nothing was learned from them" in summary.lines()


def test_a_schedule_without_what_it_needs_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="cosine_with_min_lr", report_to=[])
    with pytest.raises(ValueError, match="min_lr"):
        arguments._try_scheduler(args)
    for kind, settings in (("cosine_with_min_lr", {"min_lr": 1e-6}), ("polynomial", {})):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, lr_scheduler_type=kind, lr_scheduler_kwargs=settings, report_to=[]
        )
        arguments._try_scheduler(args)


def test_fp16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    from lisa_ds.errors import EngineError
    from lisa_ds.integrations import hf

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(EngineError, match=r"^run.yaml: training.fp16: \w+ does not compute in fp16 here; use bf16"):
        hf.check_fp16("run.yaml: training.fp16")
