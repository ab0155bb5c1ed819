"""The order of rows: the same after a resume as without it, with evaluations in between; and no other goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from lisa_ds import data
from lisa_ds.errors import CheckpointError
from lisa_ds.integrations.order import RowOrder, SeededLengthSampler, order_of
from lisa_ds.train.resume import check_order
from tests import tiny
from tests.ranks import run_ranks

RANKS, ROWS, STEPS = 2, 21, 9  # an epoch is five steps or six, the last not full
SAVED = (3, 6, 8)  # in the first epoch, and at two places of the second
STRATEGIES = ("random", "group_by_length", "sequential", "batch_rebalance")


def rows(count: int) -> list[dict[str, Any]]:
    """Of many lengths; the first token is the row's number."""
    made = []
    for i in range(count):
        ids = [i + 4, *torch.randint(4, 260, (3 + 7 * i % 16,), generator=torch.Generator().manual_seed(i)).tolist()]
        made.append({"input_ids": ids, "labels": ids})
    return made


def train(folder: Path, strategy: str, resume: int | None = None, **changes: Any) -> dict[int, Any]:
    """The rows of each step on this rank, and the loss."""
    from transformers import AutoModelForCausalLM, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from lisa_ds.integrations import hf
    from lisa_ds.integrations.trainer import LabelLogitsTrainer

    unset_hf_deepspeed_config()
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": strategy,
    }
    args = TrainingArguments(
        str(folder / (strategy if resume is None else f"{strategy}-{resume}")),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=resume is None,
        save_steps=1 if resume is None else 1000,
        deepspeed={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"},
        **settings | changes,
    )
    hf.join_process_group()
    config = tiny.config(attention_dropout=0.2)  # its masks come from the generator that stock samplers draw from
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    trainer = LabelLogitsTrainer(
        model,
        args,
        data.collator(tiny.tokenizer()),
        datasets.Dataset.from_list(rows(ROWS)),
        datasets.Dataset.from_list(rows(5)),
    )
    seen: dict[int, list[int]] = {}
    stock = trainer.training_step

    def watched(model: Any, inputs: Any, *more: Any, **kwargs: Any) -> Any:
        seen.setdefault(trainer.state.global_step + 1, []).extend((inputs["input_ids"][:, 0] - 4).tolist())
        return stock(model, inputs, *more, **kwargs)

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=resume and str(folder / strategy / f"checkpoint-{resume}"))
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {step: (seen[step], losses[step]) for step in seen}


def on_ranks(folder: str) -> dict[Any, Any]:
    place = Path(folder)
    found: dict[Any, Any] = {}
    for strategy in STRATEGIES:
        found[strategy] = train(place, strategy)
        for step in SAVED:
            found[strategy, step] = train(place, strategy, step)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found["split"] = train(place, "random", 3, **split)
    return found


@pytest.mark.nightly
@pytest.mark.multirank
def test_a_run_goes_on_with_the_rows_that_come_next(tmp_path: Path) -> None:
    ranks = run_ranks(RANKS, on_ranks, tmp_path, str(tmp_path), timeout_s=400)
    for strategy in STRATEGIES:
        whole = ranks[0][strategy]
        steps = [sorted(rank[strategy][step][0] for rank in ranks) for step in sorted(whole)]
        assert len(steps) == STEPS
        first = [row for rank in ranks for step in range(1, 6) for row in rank[strategy][step][0]]
        assert len({*first}) >= ROWS - 1, strategy  # an epoch is the data
        for step in SAVED:
            for rank in ranks:
                expected = {at: rank[strategy][at] for at in range(step + 1, STEPS + 1)}
                assert rank[strategy, step] == expected, (strategy, step)
    for step in (4, 5, 7, 8, 9):  # in other micro-batches, the same rows; step 6 is filled up with others
        both = [sorted(row for rank in ranks for row in rank[name][step][0]) for name in ("random", "split")]
        assert {*both[0]} == {*both[1]}, step


ORDER = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "ranks": 2,
    "train_sampling_strategy": "random",
    "seed": 42,
    "dataloader_drop_last": False,
    "accelerator_config": {"split_batches": False, "even_batches": True, "use_seedable_sampler": True},
    "data": {"rows": 24, "digest": "one"},
}
SEQUENTIAL, BY_LENGTH = (ORDER | {"train_sampling_strategy": name} for name in ("sequential", "group_by_length"))
NO_SEED = ORDER["accelerator_config"] | {"use_seedable_sampler": False}  # type: ignore[operator]


def checkpoint(folder: Path, order: dict[str, Any] | None) -> Path:
    state = {} if order is None else {"stateful_callbacks": {"RowOrder": {"args": {"order": order}, "attributes": {}}}}
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("saved", "now", "told"),
    [
        (ORDER, {"per_device_train_batch_size": 4}, "training.per_device_train_batch_size 2, and now it is 4"),
        (ORDER, {"gradient_accumulation_steps": 1}, "training.gradient_accumulation_steps 4, and now it is 1"),
        (
            ORDER | {"dataloader_drop_last": True},  # other rows are left out of the last step
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_drop_last": True},
            "training.per_device_train_batch_size 2, and now it is 4; with training.gradient_accumulation_steps 4, and now it is 2",
        ),
        (ORDER, {"seed": 43}, "training.seed 42, and now it is 43"),
        (BY_LENGTH, BY_LENGTH | {"seed": 43}, "training.seed 42, and now it is 43"),
        (
            ORDER,
            {"train_sampling_strategy": "group_by_length"},
            "training.train_sampling_strategy 'random', and now it is 'group_by_length'",
        ),
        (ORDER, {"dataloader_drop_last": True}, "training.dataloader_drop_last False, and now it is True"),
        (ORDER, {"data": {"rows": 26, "digest": "two"}}, "24 training rows, and now there are 26"),
        (ORDER, {"data": {"rows": 24, "digest": "two"}}, "other training rows than now, though there are 24 in both"),
        (ORDER, {"ranks": 1}, "2 ranks with rows of their own, and now there are 1"),
        (
            ORDER,
            {"accelerator_config": NO_SEED},
            f"training.accelerator_config {ORDER['accelerator_config']!r}, and now it is {NO_SEED!r}",
        ),
    ],
)
def test_another_order_is_refused_and_both_values_are_named(
    saved: dict[str, Any], now: dict[str, Any], told: str, tmp_path: Path
) -> None:
    place = checkpoint(tmp_path / "checkpoint-3", saved)
    with pytest.raises(CheckpointError) as refused:
        check_order(place, ORDER | now, begins_anew=False)
    assert str(refused.value) == (
        f"--resume: {place} was saved with {told}: rows would be left out, or seen twice. Go back to what it was saved with, or "
        "set training.ignore_data_skip: true to go on at the beginning of an epoch"
    )
    check_order(place, ORDER | now, begins_anew=True)
    check_order(None, ORDER | now, begins_anew=False)


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (ORDER, {}),
        (ORDER, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}),  # the same rows in a step
        (SEQUENTIAL, {"train_sampling_strategy": "sequential", "seed": 7}),
        ({key: value for key, value in ORDER.items() if key != "seed"}, {}),  # of a release that did not say so
    ],
)
def test_the_same_order_goes_on(saved: dict[str, Any], now: dict[str, Any], tmp_path: Path) -> None:
    check_order(checkpoint(tmp_path / "checkpoint-3", saved), ORDER | now, begins_anew=False)


def test_a_checkpoint_that_does_not_tell_its_order_goes_on_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_order(checkpoint(tmp_path / "checkpoint-3", None), ORDER, begins_anew=False)
    assert "does not say in what order its rows came" in caplog.text


def arguments_of(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], **changes)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", 3),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy", "group_by_length"),
        ({"seed": 7}, "seed", 7),
        ({"data_seed": 8}, "seed", 8),  # which the samplers take, and not the run's
        ({"dataloader_drop_last": True}, "dataloader_drop_last", True),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "accelerator_config", NO_SEED),
    ],
)
def test_what_decides_the_order_is_kept(changes: dict[str, Any], key: str, value: Any, tmp_path: Path) -> None:
    usual, other = (order_of(arguments_of(tmp_path, **some), ORDER["data"]) for some in ({}, changes))
    assert usual[key] != value
    assert other == usual | {key: value}
    assert usual.keys() == ORDER.keys()


def test_ranks_that_share_a_layer_have_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments_of(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    assert order_of(args, ORDER["data"])["ranks"] == 4
    args.deepspeed_plugin = SimpleNamespace(
        hf_ds_config=SimpleNamespace(config={"tensor_parallel": {"autotp_size": 2}})
    )
    assert order_of(args, ORDER["data"])["ranks"] == 2


def test_the_order_is_saved_also_by_a_run_that_continues_a_checkpoint_without_it() -> None:
    state = TrainerState(stateful_callbacks={})
    RowOrder(ORDER).on_train_begin(None, state, None)
    assert state.stateful_callbacks["RowOrder"]["args"] == {"order": ORDER}


def test_rows_grouped_by_length_come_by_seed_and_epoch_alone() -> None:
    lengths = [len(row["input_ids"]) for row in rows(60)]

    def drawn(seed: int, epoch: int) -> list[int]:
        sampler = SeededLengthSampler(LengthGroupedSampler(2, lengths=lengths), seed)
        sampler.set_epoch(epoch)
        first = list(sampler)
        assert list(sampler) == first
        assert sorted(first) == list(range(60))
        return first

    assert len({tuple(drawn(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (5, 0), (5, 1))}) == 4
    before = drawn(3, 1)
    torch.manual_seed(9)  # as if a dropout or an evaluation had drawn in between
    assert drawn(3, 1) == before


def test_a_digest_tells_rows_apart() -> None:
    made = [rows(ROWS), rows(ROWS - 1), rows(ROWS)[::-1], rows(ROWS)]
    made[3][7] = made[3][7] | {"labels": [-100, *made[3][7]["labels"][1:]]}
    digests = [json.dumps(data.digest(datasets.Dataset.from_list(some))) for some in made]
    assert len({*digests}) == 4
    assert data.digest(datasets.Dataset.from_list(rows(ROWS))) == json.loads(digests[0])
