"""Models whose files name tensors otherwise than transformers does, loaded under ZeRO-3 and written out again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import causal_models

Tensors = dict[str, torch.Tensor]


def _without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _gpt2(tensors: Tensors) -> Tensors:
    """As it was published: without prefix, and with the causal masks."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    return _without("transformer.")(tensors) | masks


def _legacy(tensors: Tensors) -> Tensors:
    """As BERT was published: the gain and offset of a norm under the names of TensorFlow."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    pattern = re.compile("|".join(map(re.escape, names)))
    return {pattern.sub(lambda found: names[found[0]], name): tensor for name, tensor in tensors.items()}


def _tied_twice(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def _tied_as_head(tensors: Tensors) -> Tensors:
    """Only the other of the two names."""
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    return {name: t for name, t in tensors.items() if name != "model.embed_tokens.weight"} | head


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "llama": ("llama", {}, dict),
    "llama tied, both kept": ("llama", {"tie_word_embeddings": True}, _tied_twice),
    "llama tied, the head kept": ("llama", {"tie_word_embeddings": True}, _tied_as_head),
    "gpt2": ("gpt2", {}, dict),
    "gpt2 as published": ("gpt2", {}, _gpt2),
    "bert as published": ("bert", {"is_decoder": True}, _legacy),
    "bert": ("bert", {"is_decoder": True}, dict),
    "mixtral": ("mixtral", {}, dict),
    "qwen2_moe": ("qwen2_moe", {}, dict),
    "bloom as published": ("bloom", {}, _without("transformer.")),
    "opt as published": ("opt", {}, _without("model.")),
    "gpt_neox": ("gpt_neox", {}, dict),
}


def write_input(case: str, directory: Path) -> None:
    name, changes, rename = CASES[case]
    causal_models.build(name, **changes).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(rename(dict(tensors)), directory / "model.safetensors", {"format": "pt"})


def exported(root: str) -> dict[str, dict[str, Any]]:
    """For each case, shapes of tensors: of the input, of what a run exports, of what ``lisa-ds export`` writes; and what changed."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from lisa_ds.checkpoint import export, names
    from lisa_ds.integrations.streaming import inputs_of, streamed

    places = {case: Path(root) / re.sub(r"\W+", "_", case) for case in CASES}
    for case, place in places.items():
        write_input(case, place / "input")
    under_zero3 = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    trained: dict[str, Tensors] = {}
    for case, place in places.items():
        with streamed():
            model: Any = AutoModelForCausalLM.from_pretrained(place / "input")
        weights = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in weights}
        trained[case] = {**weights, **buffers}
        model.save_pretrained(place / "run", state_dict=dict(trained[case]))
        names.restore(place / "run", inputs_of(model), model)
    del under_zero3
    results: dict[str, dict[str, Any]] = {}
    for case, place in places.items():
        (place / "checkpoint").mkdir()
        export(
            place / "checkpoint",
            place / "command",
            lambda *_, case=case: dict(trained[case]),
            model=str(place / "input"),
        )
        found = {part: load_file(place / part / "model.safetensors") for part in ("input", "run", "command")}
        results[case] = {
            part: {name: tuple(tensor.shape) for name, tensor in tensors.items()} for part, tensors in found.items()
        }
        results[case]["changed"] = sorted(
            f"{part}: {name}"
            for part in ("run", "command")
            for name, tensor in found[part].items()
            if name in found["input"] and not torch.equal(tensor, found["input"][name])
        )
    return results


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "LoraConfig", "r": 4},
    "dora": {"kind": "LoraConfig", "r": 4, "use_dora": True},
    "with a head": {
        "kind": "LoraConfig",
        "r": 4,
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "v_proj"],
    },
    "on embeddings": {"kind": "LoraConfig", "r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "ia3": {"kind": "IA3Config"},
}


def adapters_exported(root: str) -> dict[str, Any]:
    """For each adapter, how far the logits of what is exported are from those of the model that was trained; and messages."""
    import deepspeed
    import peft
    from transformers import AutoModelForCausalLM

    import lisa_ds
    from lisa_ds.checkpoint import export
    from lisa_ds.engines.zero3.checkpoint.consolidate import read_weights
    from lisa_ds.errors import CheckpointError

    deepspeed.init_distributed(dist_backend="gloo")
    base = Path(root) / "base"
    causal_models.build("llama").save_pretrained(base)
    ids = torch.arange(5, 21)[None]
    results: dict[str, Any] = {}

    def refused(name: str, *args: Any, **kwargs: Any) -> None:
        try:
            export(*args, read_weights, **kwargs)
            results[name] = "nothing was refused"
        except CheckpointError as error:
            results[name] = str(error)

    for name, fields in ADAPTERS.items():
        settings = {key: value for key, value in fields.items() if key != "kind"}
        place = Path(root) / name.replace(" ", "_")
        model = AutoModelForCausalLM.from_pretrained(base)
        model = peft.get_peft_model(model, getattr(peft, fields["kind"])(task_type="CAUSAL_LM", **settings))
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        config["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        section = {"num_sampled_layers": 1, "interval_steps": 1}
        engine, *_ = lisa_ds.initialize(model=model, optimizer=optimizer, config=config, lisa_config=section)
        for _ in range(4):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.eval()
        with torch.no_grad():
            expected = engine(input_ids=ids).logits
            untrained = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        engine.save_checkpoint(place / "checkpoint")
        if name == "lora":
            refused("no config", place / "checkpoint", place / "none", model=str(base))
        model.peft_config["default"].save_pretrained(place / "checkpoint")  # as a trainer does
        export(place / "checkpoint", place / "adapter", read_weights)
        export(place / "checkpoint", place / "merged", read_weights, merged=True)
        with torch.no_grad():
            adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place / "adapter")
            merged = AutoModelForCausalLM.from_pretrained(place / "merged")
            found = [adapter.eval()(ids).logits, merged.eval()(ids).logits, untrained]
        names = set(load_file(place / "merged" / "model.safetensors"))
        results[name] = [float((logits - expected).abs().max()) for logits in found]
        results[f"names of {name}"] = names == set(load_file(base / "model.safetensors"))
    (Path(root) / "plain").mkdir()
    refused("nothing to merge", Path(root) / "plain", Path(root) / "out", model=str(base), merged=True)
    return results
