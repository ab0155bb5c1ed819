"""`lisa.adapters`: a run that trains them beside what is drawn, what it exports, resumes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lisa_ds
from lisa_ds.cli import main
from lisa_ds.config import LisaConfig, load_config
from lisa_ds.engines.common.adapters import Rule, merged
from lisa_ds.errors import ConfigError
from lisa_ds.layers import LayerStack
from lisa_ds.memory import Architecture
from lisa_ds.memory.matrices import shape_of
from lisa_ds.models import skeleton
from lisa_ds.train import fit
from tests.models import causal_models
from tests.training_runs import launch, write_run

RUN = {"unit": "matrix", "num_sampled_layers": 1, "interval_steps": 1, "adapters": {"rank": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained, and one that was resumed from its middle."""
    folder = write_run(tmp_path_factory.mktemp("adapters"), lisa=RUN)
    done = launch(folder, "training.report_to=none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning rates: 0.01 (matrices, embeddings, lm_head, rest, block_rest), 0.1 (adapters)" in done.stdout
    (folder / "out").rename(folder / "first")
    done = launch(folder, "training.report_to=none", "--resume", "first/checkpoint-3")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.multirank
@pytest.mark.more
def test_the_export_is_a_plain_model_with_the_adapters_added(folder: Path) -> None:
    weights = load_file(folder / "first/model/model.safetensors")
    before = load_file(folder / "model/model.safetensors")
    assert weights.keys() == before.keys()
    assert all(not torch.equal(weights[name].float(), before[name].float()) for name in weights if "_proj" in name)
    model = AutoModelForCausalLM.from_pretrained(folder / "first/model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert main(["export", str(folder / "first/checkpoint-6"), str(folder / "exported")]) == 0
    exported = load_file(folder / "exported/model.safetensors")
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():  # from master copies, rounded once; those above from weights already rounded
        assert (exported[name].float() - weight.float()).abs().max() <= 2**-6 * weight.float().abs().max(), name


@pytest.mark.multirank
@pytest.mark.more
def test_a_resumed_run_ends_with_the_same_bits(folder: Path) -> None:
    first, resumed = (load_file(folder / name / "model/model.safetensors") for name in ("first", "out"))
    assert first.keys() == resumed.keys()
    assert all(torch.equal(first[name], resumed[name]) for name in first)


@pytest.mark.multirank
@pytest.mark.more
@pytest.mark.parametrize("changed", ["rank=4", "alpha=5"])
def test_a_run_with_other_adapters_is_not_gone_on_with(folder: Path, changed: str) -> None:
    given = [f"lisa.adapters.{changed}", "training.output_dir=other", "training.report_to=none"]
    done = launch(folder, *given, "--resume", "first/checkpoint-3")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "lisa.adapters" in done.stderr
    assert "rank 3, alpha 6, on all-linear" in done.stderr


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("unit", ["block", "matrix"])
def test_adapters_are_a_role_and_merging_adds_what_forward_adds(kind: str, unit: str) -> None:
    model = causal_models.build(kind).eval()
    config = LisaConfig.load({"unit": unit, "num_sampled_layers": 1, "adapters": {"rank": 2, "alpha": 3.0}})
    before = LayerStack.of_run(model, config.model_copy(update={"adapters": None}))
    names, sizes = list(model.state_dict()), [unit.name for unit in before.units]
    assert lisa_ds.add_adapters(model, config, seed=5) is model
    stack = LayerStack.of_run(model, config)
    assert [unit.name for unit in stack.units] == sizes
    assert stack.numels()["adapters"]
    assert sum(map(len, stack.numels().values())) == len(list(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in stack.adapters:
            parameter.normal_(std=0.1)
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    rule = Rule(**model.lisa_adapters)
    assert rule == Rule(scaling=1.5, transposed=kind == "gpt2")
    plain = causal_models.build(kind).eval()
    found = merged(model.state_dict(), rule)
    assert list(found) == names
    plain.load_state_dict(found)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-5)


def test_ranks_begin_with_the_same_adapters_and_another_seed_with_others() -> None:
    def first(seed: int) -> Any:
        model = lisa_ds.add_adapters(causal_models.build("llama"), {"adapters": {"rank": 2}}, seed=seed)
        return next(p.detach() for name, p in model.named_parameters() if ".lora_A." in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_the_planner_knows_them_without_the_model(tmp_path: Path) -> None:
    config = load_config(
        write_run(tmp_path / "run", lisa=RUN) / "run.yaml", [f"model.name_or_path={tmp_path}/run/model"]
    )
    model = skeleton(config.model)
    by_name = Architecture.from_config(model.config.to_dict())
    assert shape_of(by_name, config.lisa).adapters == fit.shape_of(model, config).adapters
    assert len(fit.shape_of(model, config).adapters) == 2 * 7 * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapters": {"rank": 0}}, "lisa.adapters.rank"),
        ({"adapters": {"rank": 2, "targets": ["nothing"]}}, "lisa.adapters.targets: names no linear of"),
        ({"adapters": {"rank": 2, "learning_rate_scale": 0}}, "lisa.adapters.learning_rate_scale"),
        ({"adapters": {"ranks": 2}}, "lisa.adapters.ranks: unknown key"),
    ],
)
def test_mistakes_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    folder = write_run(tmp_path / "run", lisa={"num_sampled_layers": 1, **given})
    monkeypatch.chdir(folder)

    def planned() -> None:
        config = load_config("run.yaml")
        fit.shape_of(skeleton(config.model), config)

    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        planned()


def test_a_model_without_them_is_refused_and_so_is_a_config_without_them() -> None:
    model = causal_models.build("llama")
    with pytest.raises(ConfigError, match=r"adapters: should be a section with a rank"):
        lisa_ds.add_adapters(model, yaml.safe_load("{num_sampled_layers: 1}"))
    config = LisaConfig.load({"num_sampled_layers": 1, "adapters": {"rank": 2}})
    twice = lisa_ds.add_adapters(causal_models.build("llama"), config)
    with pytest.raises(ConfigError, match=r"adapters: LlamaForCausalLM has them already"):
        lisa_ds.add_adapters(twice, config)
    with pytest.raises(lisa_ds.LisaError, match=r"has none; build them before the engine .*lisa_ds\.add_adapters"):
        LayerStack.of_run(model, config)
