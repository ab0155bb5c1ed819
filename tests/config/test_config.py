"""Config files as users write them: what is accepted, and that every mistake of a key or value is told in one readable line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.config import LisaConfig, RunConfig, check_contradictions, load_config
from lisa_ds.config.lisa import ALIASES
from tests.config.written import RUN, file, mistakes

__all__ = ["file"]


def test_defaults() -> None:
    config = LisaConfig()
    assert (config.num_sampled_layers, config.interval_steps, config.sampler.name) == (2, 20, "uniform")
    assert LisaConfig.load(None) == config == LisaConfig.load({}) == LisaConfig.load({"lisa": None})
    assert LisaConfig.load(config) is config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval_step": 3}, "interval_step: unknown key, got 3; did you mean 'interval_steps'?"),
        ({"zzz": 3}, "zzz: unknown key, got 3"),
        ({"seed": True}, "seed: should be a valid integer, got True"),
        ({"seed": "0"}, "seed: should be a valid integer, got '0'"),
        ({"num_sampled_layers": 0}, "num_sampled_layers: should be greater than or equal to 1, got 0"),
        ({"sampling_ratio": 1.5}, "sampling_ratio: should be less than or equal to 1, got 1.5"),
        (
            {"interval_steps": "1 month"},
            "interval_steps: should be a number of optimizer steps, 1 or more, "
            "or epochs as \"1epoch\", got '1 month'",
        ),
        ({"sampler": {"nam": "fixed"}}, "sampler.nam: unknown key, got 'fixed'; did you mean 'sampler.name'?"),
        (
            {"sampler": "cylic"},
            "sampler.name: should be 'uniform', 'cyclic', 'bernoulli', 'fixed', 'fixed_scores', 'weight_norm', 'grad_norm' or "
            "'fisher', got 'cylic'; did you mean 'cyclic'?",
        ),
        ({"sampler": {"name": "fixed", "layers": []}}, "sampler: layers is empty: name at least one, or leave it out to draw them once"),
        ({"sampler": {"layers": [1]}}, "sampler: layers goes with name 'fixed' only, but name is 'uniform'"),
        ({"sampler": {"name": "fixed", "layers": [1, 1]}}, "sampler: layers names a layer twice: [1, 1]"),
        ({"sampler": {"name": "uniform", "floor": 0.2}}, "sampler: floor goes with name 'fixed_scores' or 'weight_norm' or 'grad_norm' or 'fisher' only, but name is 'uniform'"),
        ({"sampler": {"name": "grad_norm", "flor": 0.1}}, "sampler.flor: unknown key, got 0.1; did you mean 'sampler.floor'?"),
        ({"sampler": {"name": "grad_norm", "floor": 1.5}}, "sampler.floor: should be less than or equal to 1, got 1.5"),
        ({"sampler": {"name": "grad_norm", "temperature": 0}}, "sampler.temperature: should be greater than 0, got 0"),
        ({"sampler": {"name": "grad_norm", "score": "ema", "every": 2}}, "sampler: every has no effect with score 'ema'; remove it"),
        ({"sampler": {"name": "grad_norm", "draw": "successive", "floor": 0.2}}, "sampler: floor has no effect with draw 'successive'; remove it"),
        ({"sampler": {"name": "fisher", "probe_blocks": 2}}, "sampler: probe_blocks has no effect with estimator 'empirical'; remove it"),
        ({"sampler": {"name": "fisher", "score": "mean"}}, "sampler: score goes with name 'grad_norm' only, but name is 'fisher'"),
        ({"sampler": {"name": "weight_norm", "lora_norms": "a"}}, "sampler: lora_norms and full_norms go together: the scores are their ratio"),
        ({"sampler": "fixed_scores"}, "sampler: name 'fixed_scores' needs a file of scores; `lisa-ds profile` writes one"),
        ({"growth": {}}, "growth: give either schedule (at which intervals) or patience (when the loss stops falling)"),
        ({"growth": {"patience": 2}}, "growth: max_layers is needed with patience, to plan the memory of the run"),
        ({"growth": {"patiense": 2}}, "growth.patiense: unknown key, got 2; did you mean 'growth.patience'?"),
        ({"growth": {"schedule": {"10": 4}, "add": 2}}, "growth: add goes with patience only, but schedule says when layers are added"),
        ({"growth": {"schedule": {10: 4}}, "sampler": "fixed"}, "growth does not go with sampler 'fixed', whose layers are the same for the whole run"),
        (
            {"embeddings": "sampeld"},
            "embeddings: should be 'always', 'never', 'sampled' or {every: n}, got 'sampeld'; did you mean 'sampled'?",
        ),
        ({"embeddings": 3}, "embeddings: should be 'always', 'never', 'sampled' or {every: n}, got 3"),
        ({"lm_head": {"every": 0}}, "lm_head: every should be a number of intervals, 1 or more, got 0"),
        ({"lm_head": {"every": True}}, "lm_head: every should be a number of intervals, 1 or more, got True"),
        ({"embeddings": {"evry": 3}}, "embeddings: has the one key 'every', got 'evry'; write {every: n}, as in {every: 4}"),
        ({"embeddings": {}}, "embeddings: has the one key 'every', got none; write {every: n}, as in {every: 4}"),
        ({"rest": {"every": 5}}, "rest: should be 'always' or 'never', got {'every': 5}"),
        ({"rest": "sampled"}, "rest: should be 'always' or 'never', got 'sampled'"),
        ({"rewarm_steps": -1}, "rewarm_steps: should be greater than or equal to 0, got -1"),
        ({"norm_growth_limit": 1.0}, "norm_growth_limit: should be greater than 1, got 1.0"),
        ({"on_release": "host"}, "on_release: not built yet, arrives with parking of layer state, got 'host'"),
        ({"nvme_path": "/disk"}, "nvme_path: not built yet, arrives with parking of layer state, got '/disk'"),
        ({"prefetch_steps": 2}, "prefetch_steps: not built yet, arrives with parking of layer state, got 2"),
        (
            {"optimizer": {"moments": "bf16"}},
            "optimizer: moments 'bf16' goes with precision 'stochastic_rounding'; use 'fp32' or 'int8'",
        ),
        (
            {"optimizer": {"name": "adamw", "moments": "int8"}},
            "optimizer: moments 'int8' is masked_adamw's; with name 'adamw' it is 'fp32'",
        ),
        ({"optimizer": {"moments": "int4"}}, "optimizer.moments: should be 'fp32', 'bf16', 'int8' or 'none', got 'int4'; did you mean 'int8'?"),
        ({"lm_head_lr_scale": 0}, "lm_head_lr_scale: should be greater than 0, got 0"),
        ({"num_sampled_layers": 2, "sampling_ratio": 0.1}, "num_sampled_layers (2) and sampling_ratio (0.1) say the same thing: keep one"),
        ({"embeddings": "never", "embeddings_lr_scale": 0.1}, "embeddings_lr_scale has no effect with embeddings: never; remove one of them"),
        ({"lisa_n_layers": 1, "num_sampled_layers": 2}, "num_sampled_layers: given under several names, lisa_n_layers and num_sampled_layers: keep one"),
    ],
)  # fmt: skip
def test_a_mistake_names_key_value_and_remedy(fields: dict[str, object], message: str) -> None:
    assert mistakes(LisaConfig.load, fields) == [f"lisa_config: {message}"]


def test_every_mistake_is_told_at_once() -> None:
    assert len(mistakes(LisaConfig.load, {"interval_steps": 0, "seed": 0.5, "gamma": 2, "sampler": "best"})) == 4


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_names_of_other_tools_are_read_with_one_notice(
    alias: str, key: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lisa_ds.config.lisa._noticed", set())
    value: Any = "encoder.layer" if key == "layers_path" else 7
    with caplog.at_level(logging.WARNING):
        configs = [LisaConfig.load({alias: value}) for _ in range(2)]
    assert getattr(configs[0], key) == getattr(configs[1], key) == value
    assert caplog.messages == [f"lisa_config: {alias}: read as {key!r}, its name here"]


@pytest.mark.parametrize(("written", "epochs"), [(20, None), ("1epoch", 1), ("3epochs", 3), ("2 epochs", 2)])
def test_an_interval_is_steps_or_epochs(written: int | str, epochs: int | None) -> None:
    assert LisaConfig.load({"interval_steps": written}).interval_epochs == epochs


@pytest.mark.parametrize(
    ("fields", "num_layers", "expected"),
    [
        ({"num_sampled_layers": 4}, 4, 4),
        ({"num_sampled_layers": 5}, 4, "num_sampled_layers: the model has 4 layers, got 5; choose 1 to 4"),
        ({"sampling_ratio": 0.1}, 32, 3),
        ({"sampling_ratio": 0.29}, 100, 29),  # 28.999999999999996 in binary
        ({"sampling_ratio": 1.0}, 7, 7),
        ({"sampling_ratio": 0.1}, 9, "sampling_ratio: leaves no layer of the model's 9, got 0.1"),
        ({"sampler": {"name": "fixed", "layers": [0, 3, 5]}}, 6, 3),
        ({"sampler": {"name": "fixed", "layers": [6]}}, 6, "sampler.layers: the model has layers 0 to 5, got [6]"),
    ],
)
def test_how_many_layers_are_sampled(fields: dict[str, object], num_layers: int, expected: int | str) -> None:
    config = LisaConfig.load(fields)
    if isinstance(expected, int):
        assert config.num_sampled(num_layers) == expected
    else:
        assert mistakes(config.num_sampled, num_layers)[0].startswith(f"lisa_config: {expected}")


def test_the_lisa_section_is_read_alone_or_from_a_whole_run(file: Path) -> None:
    file.write_text("seed: 3\n")
    alone = LisaConfig.load(file)
    file.write_text(RUN + "lisa: {seed: 3}\n")
    assert LisaConfig.load("run.yaml") == alone == load_config(file).lisa
    file.write_text("lisa: {seeed: 3}\n")
    assert mistakes(LisaConfig.load, file) == ["run.yaml: lisa.seeed: unknown key, got 3; did you mean 'seed'?"]
    sections = ", ".join(RunConfig.model_fields)
    assert mistakes(LisaConfig.load, {"lisa": {}, "modle": {}}) == [
        f"lisa_config: modle: unknown section; the sections are {sections}"
    ]


@pytest.mark.parametrize(
    ("text", "when"), [("", "interval"), ("on", "interval"), ("off", "off"), ("'off'", "off"), ("5", 5)]
)
def test_statistics_may_be_switched_off_as_yaml_spells_it(file: Path, text: str, when: str | int) -> None:
    file.write_text(RUN + (f"statistics: {text}" if text else ""))
    assert load_config(file).statistics == when


def test_overrides_are_yaml_and_know_scientific_notation(file: Path) -> None:
    file.write_text(RUN + "training: {learning_rate: 2e-5, bf16: true}\nlisa:\n")
    config = load_config(
        file,
        [
            *("training.learning_rate=1e-4", "training.bf16=false", "lisa.lisa_n_layers=4", "method=full"),
            *("lisa.sampler.name=cyclic", "data.columns={question: prompt}", "deepspeed.zero_optimization.stage=3"),
        ],
    )
    assert load_config(file).training == {"learning_rate": 2e-5, "bf16": True}
    assert config.training == {"learning_rate": 1e-4, "bf16": False}
    assert (config.lisa.num_sampled_layers, config.lisa.sampler.name, config.method) == (4, "cyclic", "full")
    assert config.data.columns == {"question": "prompt"}
    assert config.deepspeed_config() == {"zero_optimization": {"stage": 3}}


TRAINING = {
    **{"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0, "bf16": False},
    **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize(
    ("deepspeed", "key"),
    [
        ({}, None),
        ({"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}, None),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4", "betas": [0.9, 0.95], "eps": 1e-6}}}, None),
        ({"gradient_clipping": 1, "bf16": {"enabled": False}, "train_batch_size": 16}, None),
        ({"optimizer": {"params": {"lr": 2e-4}}}, "optimizer.params.lr"),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas"),
        ({"gradient_clipping": 0.5}, "gradient_clipping"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps"),
        ({"train_batch_size": 8}, "train_batch_size"),
    ],
)
def test_one_home_per_fact(deepspeed: dict[str, Any], key: str | None) -> None:
    if key is None:
        check_contradictions(TRAINING, deepspeed, world_size=2)
        return
    (line,) = mistakes(check_contradictions, TRAINING, deepspeed, deepspeed_source="zero3.json", world_size=2)
    assert line.startswith(f"zero3.json: {key}: contradicts training, where ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lisa: {seed: 18446744073709551616}", "lisa.seed: should be a number of 64 bits, got 18446744073709551616"),
        ("lisa: {seed: " + "9" * 200 + "}", "lisa.seed: should be a number of 64 bits, got a number of 665 bits"),
        ("data: {path: x, seed: -9223372036854775809}", "data.seed: should be a number of 64 bits, got -9223372036854775809"),
        ("training: {learning_rate: .nan}", "training.learning_rate: should be a finite number, got nan"),
        ("deepspeed: {a: {b: [1, -.inf]}}", "deepspeed.a.b: should be a finite number, got -inf"),
        ('data: {path: "a\\0b"}', "data.path: should be text without NUL or half characters, got 'a\\x00b'"),
        ('training: {run_name: "\\ud800"}', "training.run_name: should be text without NUL or half characters, got '\\ud800'"),
        ("deepspeed: {a: {null: 1}}", "deepspeed.a: should have text for keys, has None, got {None: 1}"),
        ("data: {path: " + "x" * 256 + "}", "data.path: should be a path, whose parts have at most 255 bytes, got 'xxx"),
        ("deepspeed: " + "x/" * 2048, "deepspeed: should be a path, whose parts have at most 255 bytes, got 'x/x"),
        ("lisa: {sampler: {name: fixed_scores, file: " + "é" * 128 + "}}", "lisa.sampler.file: should be a path, whose"),
        ("a: &a [*a]", "run.yaml: is nested too deeply or refers to itself"),
        ("a: " + "[" * 60 + "]" * 60, "run.yaml: is nested too deeply or refers to itself"),
        ("a: " + "[" * 3000, "run.yaml: is nested too deeply or refers to itself"),
        ("a0: &a0 [1,1,1,1,1,1,1,1]\n" + "\n".join(f"a{i+1}: &a{i+1} [*a{i},*a{i},*a{i},*a{i},*a{i},*a{i},*a{i},*a{i}]" for i in range(9)), "run.yaml: is nested too deeply or refers to itself"),
        ("a: !!timestamp x", "run.yaml: not valid YAML: a value does not fit its type: "),
        ("a: !!bool x", "run.yaml: not valid YAML: a value does not fit its type: 'x'"),
        ("a: !!map [x]", "run.yaml: not valid YAML: a value does not fit its type: "),
        ("a: 2001-99-99", "run.yaml: not valid YAML: a value does not fit its type: month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "run.yaml: line 1: not valid YAML: could not determine a constructor"),
        ("a: " + "1" * 5000, "run.yaml: not valid YAML: a value does not fit its type: Exceeds the limit (4300 digits)"),
    ],
)  # fmt: skip
def test_values_that_would_fail_far_from_here(file: Path, text: str, what: str) -> None:
    file.write_text(f"{text}\n")
    found = [line for line in mistakes(load_config, file) if what in line]
    assert len(found) == 1
    assert len(found[0]) < 300
