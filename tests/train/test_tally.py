"""What log entries are means of: against one process that takes the same steps and knows which were skipped."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.ranks import run_ranks

RANKS, ROWS, ACCUMULATION, STEPS, EVERY, LENGTH = 2, 2, 2, 14, 3, 12
RATE = 1e-2
OF_STEP = RANKS * ROWS * ACCUMULATION
FAULTS: dict[int, tuple[str, int]] = {
    1: ("loss", 1),  # before anything has been added up: the trainer would log this step as 0
    4: ("gradient", 0),  # a finite loss, whose step is skipped all the same
    6: ("loss", 0),  # the last of an entry, and the second in it
    7: ("gradient", 1),
    9: ("loss", 1),  # with step 8, all of an entry
    14: ("loss", 0),  # after the last entry
}
"""Steps from 1, what becomes NaN or infinite there, on which rank."""
NO_LABELS = {
    8: range(OF_STEP),  # nothing to learn on any rank
    10: (2, 3),  # the first micro-batch of rank 1
    11: (0, 1, 4, 5),  # both of rank 0
    12: (3,),  # one row
}
SKIPPED = {*FAULTS}
NO_LOSS = {*SKIPPED, 8}  # the gradient of step 8 is 0, which torch's AdamW and ZeRO-3 take for one
EVALUATED, NOT_EVALUATED = 7, (0, 1, 6)  # the last batch of the ranks is one row, filled up with the first


def rows(count: int, without_labels: set[int]) -> list[dict[str, Tensor]]:
    made = []
    for i in range(count):
        ids = torch.randint(4, 260, (LENGTH,), generator=torch.Generator().manual_seed(i))
        labels = torch.where(torch.arange(LENGTH) < (LENGTH if i in without_labels else 2 + i % 5), -100, ids)
        if i in without_labels:
            labels[0] = ids[0]  # nothing predicts it
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def training_rows() -> list[dict[str, Tensor]]:
    return rows(STEPS * OF_STEP, {(step - 1) * OF_STEP + row for step, some in NO_LABELS.items() for row in some})


def model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.config(), attn_implementation="eager").float()


def summed_loss(net: Any, batch: list[dict[str, Tensor]]) -> tuple[Tensor, int]:
    ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
    logits, targets = net(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    summed = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return summed, int((targets != -100).sum())


def reference() -> tuple[dict[int, float], Any]:
    """The losses of the applied steps, and the model after them: one process of torch."""
    net, data = model(), training_rows()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, eps=1e-4, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda applied: 1 - applied / STEPS)
    losses = {}
    for step in range(1, STEPS + 1):
        if step in SKIPPED:
            continue
        summed, items = summed_loss(net, data[(step - 1) * OF_STEP : step * OF_STEP])
        (summed / items).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step not in NO_LOSS:
            losses[step] = (summed / items).item()
    return losses, net


def train(folder: str, kind: str, **changes: Any) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    import lisa_ds
    from lisa_ds.integrations import hf
    from lisa_ds.integrations.trainer import LabelLogitsTrainer

    unset_hf_deepspeed_config()  # under it, a model is drawn in another order
    net = model()
    settings: dict[str, Any] = {"max_steps": STEPS, "logging_steps": EVERY, "max_grad_norm": 1e9}
    settings |= {"learning_rate": RATE, "adam_epsilon": 1e-4, "train_sampling_strategy": "sequential"}
    settings |= {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATION}
    args = TrainingArguments(
        f"{folder}/out",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_eval_batch_size=2,
        deepspeed={
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
        **settings | changes,
    )
    hf.join_process_group()
    built = {"attached": Trainer, "stock": Trainer, "run": LabelLogitsTrainer}[kind]
    trainer = built(net, args, train_dataset=training_rows(), eval_dataset=rows(EVALUATED, set(NOT_EVALUATED)))
    broken = []

    def break_logits(head: Any, inputs: Any, logits: Tensor) -> Tensor | None:
        fault = FAULTS.get(trainer.state.global_step + 1)
        if not net.training or fault is None or fault[1] != args.process_index:
            return None
        broken.append(trainer.state.global_step + 1)
        if fault[0] == "loss":
            return logits * math.nan
        logits.register_hook(lambda gradient: gradient * math.inf)
        return None

    net.get_output_embeddings().register_forward_hook(break_logits)
    if kind == "attached":
        lisa_ds.attach(trainer, {"num_sampled_layers": 4, "interval_steps": 100})
    output = trainer.train()
    evaluated = trainer.evaluate()
    import deepspeed

    weights = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters(weights):
        weights = [weight.detach().clone() for weight in weights]
    return {
        "logs": trainer.state.log_history,
        "train_loss": (output.training_loss, output.metrics["train_loss"]),
        "evaluated": evaluated,
        "weights": weights,
        "broken": broken,
        "engine_skipped": trainer.deepspeed.skipped_steps,
    }


def on_ranks(folder: str) -> dict[str, Any]:
    seen = {kind: train(folder, kind) for kind in ("attached", "run", "stock")}
    seen["every step"] = train(folder, "run", logging_steps=1)
    seen["rare"] = train(folder, "attached", logging_steps=50)
    return seen


def held_out_loss(net: Any) -> float:
    """The trainer's mean over rows of the losses of their batches; one of two ranks without labels counts as 0 there."""
    net.eval()
    data, losses = rows(EVALUATED, set(NOT_EVALUATED)), []
    for first in range(0, EVALUATED, 2 * RANKS):
        batches = [[data[(first + 2 * rank + i) % EVALUATED] for i in range(2)] for rank in range(RANKS)]
        with torch.no_grad():
            sums = [summed_loss(net, batch) for batch in batches]
        items = sum(count for _, count in sums)
        losses += [RANKS * summed.item() / items for summed, _ in sums for _ in range(2)]
    return sum(losses[:EVALUATED]) / EVALUATED


@pytest.mark.more
@pytest.mark.multirank
def test_skipped_steps_and_rows_without_labels_are_counted_and_in_no_mean(tmp_path: Path) -> None:
    ranks = run_ranks(RANKS, on_ranks, tmp_path, str(tmp_path), timeout_s=300)
    losses, net = reference()
    parameters = list(net.parameters())
    after = held_out_loss(net)
    for rank, name in itertools.product(range(RANKS), ("attached", "run", "every step", "rare")):
        seen = ranks[rank][name]
        assert {*seen["broken"]} == {step for step, (_, where) in FAULTS.items() if where == rank}, name
        every = {"every step": 1, "rare": 50}.get(name, EVERY)
        entries = [entry for entry in seen["logs"] if "loss" in entry]
        assert len(entries) == STEPS // every
        for entry in entries:
            window = range(entry["step"] - every + 1, entry["step"] + 1)
            applied = [losses[step] for step in window if step in losses]
            expected = sum(applied) / len(applied) if applied else math.nan
            assert entry["loss"] == pytest.approx(expected, rel=2e-5, nan_ok=True), (name, entry)
            assert entry.get("skipped_steps") == (len(SKIPPED & {*window}) or None)
            assert entry.get("rows_without_labels") == (sum(len(NO_LABELS.get(step, ())) for step in window) or None)
        mean = sum(losses.values()) / len(losses)
        assert seen["train_loss"] == pytest.approx((mean, mean), rel=2e-5 if every < 50 else 0.2), name
        assert seen["engine_skipped"] == len(SKIPPED)
        for ours, theirs in zip(seen["weights"], parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
        assert seen["evaluated"]["eval_loss"] == pytest.approx(after, rel=1e-4)
        entry = next(entry for entry in reversed(seen["logs"]) if "eval_loss" in entry)
        assert entry["eval_rows_without_labels"] == len(NOT_EVALUATED)
        assert "eval_rows_not_finite" not in entry
    # The control: stock averages skipped steps in, as if they were low, and says nothing.
    stock = [entry for entry in ranks[0]["stock"]["logs"] if "loss" in entry]
    assert stock[0]["loss"] < 0.9 * min(losses[2], losses[3])
    assert not any("skipped_steps" in entry for entry in stock)


def test_an_evaluation_tells_which_rows_its_mean_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each time the same ones, whatever was predicted in between; what a count means is told once."""
    from transformers import Trainer, TrainingArguments

    from lisa_ds.integrations.tally import keep_tally

    net, data = model().eval(), rows(6, {0, 1, 5})
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=2)
    trainer = Trainer(net, args, eval_dataset=data)
    assert keep_tally(trainer) is keep_tally(trainer)
    stock = net.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        output = stock(input_ids=input_ids, **kwargs)
        if torch.equal(input_ids[0], data[2]["input_ids"]):
            output.loss = output.loss * math.inf
        return output

    net.forward = forward
    for predicts in (False, True, False):
        trainer.evaluate()
        assert trainer.state.log_history[-1]["eval_rows_without_labels"] == 3
        assert trainer.state.log_history[-1]["eval_rows_not_finite"] == 2
        if predicts:
            trainer.predict(data)  # type: ignore[arg-type]
    told = [message for message in caplog.messages if message.startswith("step 0: ")]
    assert told == [
        "step 0: eval_rows_without_labels: 3, whose labels are all -100: nothing is learned from them",
        "step 0: eval_rows_not_finite: 2, in batches whose loss is not finite, left out of the mean",
    ]


def test_a_batch_without_labels_has_no_loss_in_a_model_that_is_not_told_their_number(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    from lisa_ds.integrations.tally import keep_tally

    class Own(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    net, data = Own(tiny.config()), rows(6, set())
    for row in data[2:4]:  # the second of three micro-batches
        row["labels"].fill_(-100)
    sums = [summed_loss(super(Own, net).forward, data[first : first + 2]) for first in (0, 4)]
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        logging_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    trainer = Trainer(net, args, train_dataset=data)  # type: ignore[arg-type]
    keep_tally(trainer)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(sum(summed.item() / items for summed, items in sums) / 2, rel=1e-5)
    assert entry["rows_without_labels"] == 2
