"""What the ranks of tests/zero3/test_controls.py do."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import lisa_ds
from tests.zero3 import trajectory
from tests.zero3.engine_runs import full_parameters
from tests.zero3.trajectory import MICRO_BATCH, Case


def run_stock_toggling() -> dict[str, Any]:
    """What stock ZeRO-3 does when ``requires_grad`` is toggled after initialisation."""
    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("stock", clip=1.0)
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    result: dict[str, Any] = {}

    def steps(engine: Any) -> None:
        for _ in range(3):
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()

    for kind in ("freeze", "unfreeze"):
        model = trajectory.build_model()
        block = model.model.layers[3]
        if kind == "unfreeze":
            block.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=trajectory.deepspeed_config(case, dist.get_world_size())
        )
        steps(engine)
        block.requires_grad_(kind == "unfreeze")
        before = [parameter.ds_tensor.clone() for parameter in block.parameters()]
        steps(engine)
        after = [parameter.ds_tensor for parameter in block.parameters()]
        result[kind] = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        result[f"{kind}, gradients left"] = sum(p.grad is not None for p in block.parameters())
        engine.destroy()
    return result


def run_beside_a_reference_model() -> dict[str, Any]:
    """A policy under LISA and a reference model under a stock engine in one process, as DPO has them."""
    from lisa_ds.engines.zero3 import LisaEngine, armed
    from lisa_ds.engines.zero3.linear import FrozenAwareLinear

    deepspeed.init_distributed(dist_backend="gloo")
    stock_engine = deepspeed.DeepSpeedEngine
    case = Case("dpo")
    config = trajectory.deepspeed_config(case, dist.get_world_size())
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    policy, reference = trajectory.build_model(), trajectory.build_model()

    def build(model: Any) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    with armed(lambda model: model is policy, lisa_ds.LisaConfig(num_sampled_layers=1, interval_steps=2)):
        # While armed, isinstance checks against the rebound name must see both kinds.
        other, engine = build(reference), build(policy)
        seen_as_engines = all(isinstance(each, deepspeed.DeepSpeedEngine) for each in (other, engine))
        late = build(trajectory.build_model())
    restored = deepspeed.DeepSpeedEngine is stock_engine
    try:
        with armed(lambda model: True, lisa_ds.LisaConfig()):
            raise KeyError("anything")
    except KeyError:
        restored_after_error = deepspeed.DeepSpeedEngine is stock_engine
    before = full_parameters(other)
    forgetful: set[int] = set()
    stock_context = FrozenAwareLinear.setup_context

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        forgetful.add(id(inputs[1]))
        stock_context(ctx, inputs, output)

    FrozenAwareLinear.setup_context = staticmethod(remember)
    other.backward(other(input_ids=rows, labels=rows).loss)  # never stepped
    for _ in range(4):
        with torch.no_grad():
            expected = other(input_ids=rows, labels=rows).loss
        engine.backward(engine(input_ids=rows, labels=rows).loss - expected)
        engine.step()
    after = full_parameters(other)
    moved = full_parameters(engine)
    kinds = [type(each).__name__ for each in (engine, other, late)]
    optimizers = [type(each.optimizer).__name__ for each in (engine, other, late)]
    engine.destroy()
    return {
        "kinds": kinds,
        "optimizers": optimizers,
        "lisa": isinstance(engine, LisaEngine),
        "seen_as_engines": seen_as_engines,
        "restored": restored and restored_after_error,
        "reference_unmoved": all(torch.equal(after[n], p) for n, p in before.items()),
        "reference_trainable": all(p.requires_grad for p in reference.parameters()),
        "policy_moved": sum(not torch.equal(moved[n], p) for n, p in before.items()),
        "forgetful_in_reference": len(forgetful.intersection(map(id, reference.parameters()))),
        "forgetful_in_policy": len(forgetful.intersection(map(id, policy.parameters()))),
        "linear_restored": torch.nn.functional.linear.__name__ == "zero3_linear_wrap",
    }


def run_two_stacks() -> dict[str, Any]:
    """T5 and BERT with frozen embeddings: reentrant checkpointing must not change what is learned."""
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    deepspeed.init_distributed(dist_backend="gloo")

    def t5() -> Any:
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=64,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=3,
                num_heads=2,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        )

    def bert() -> Any:
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (2, 8), generator=draw)
    result = {}
    for name, build, labels in (("t5", t5, rows), ("bert", bert, torch.tensor([0, 1]))):
        runs = []
        for checkpointing in ("", "reentrant"):
            torch.manual_seed(0)
            model = build()
            case = Case(name, checkpointing=checkpointing)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": True})
            engine, *_ = lisa_ds.initialize(
                model=model,
                optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, eps=trajectory.EPS),
                config=trajectory.deepspeed_config(case, dist.get_world_size()),
                lisa_config={"num_sampled_layers": 1, "interval_steps": 1, "embeddings": "never", "sampler": "cyclic"},
            )
            before = full_parameters(engine)
            losses = []
            for _ in range(len(engine._stack.layers)):
                loss = engine(input_ids=rows, labels=labels).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            after = full_parameters(engine)
            blocks = {
                engine._stack.unit_of[id(p)]
                for n, p in model.named_parameters()
                if not torch.equal(after[n], before[n])
            }
            runs.append((losses, after, {block for block in blocks if isinstance(block, int)}))
            engine.destroy()
        (plain, first, _), (checkpointed, second, moved) = runs
        result[name] = {
            "loss": max(abs(a - b) for a, b in zip(plain, checkpointed, strict=True)),
            "parameter": max(float((first[n] - second[n]).abs().max()) for n in first),
            "moved": sorted(moved),
        }
    return result
