"""Config files and command lines that cannot be read, or name what is not there, are told with file and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_ds.config import LisaConfig, load_config
from tests.config.written import RUN, file, mistakes

__all__ = ["file"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fast", "command line: should be key=value with a dotted key, got 'fast'"),
        ("lisa.seed=x", "command line: lisa.seed: should be a valid integer, got 'x'"),
        ("lisa.sede=1", "command line: lisa.sede: unknown key, got 1; did you mean 'lisa.seed'?"),
        ("lissa.seed=1", "command line: lissa: unknown key, got {'seed': 1}; did you mean 'lisa'?"),
        ("data.eval={rows: 1}", "command line: data.eval: unknown key, got {'rows': 1}; did you mean 'data.eval_path'?"),
        ("learning_rate=1", "command line: learning_rate: unknown key, got 1; did you mean 'training.learning_rate'?"),
        ("seed.x=1", "command line: seed: unknown key, got {'x': 1}; did you mean 'data.seed' or 'lisa.seed'?"),
        ("method.name=full", "command line: method.name: method is 'lisa', which has no keys to set; override it as a whole"),
        ("training.betas=[1", "command line: training.betas: line 1: not valid YAML: expected ',' or ']', but got '<stream end>', for a flow sequence that begins here (column 1), got '[1'"),
    ],
)  # fmt: skip
def test_a_mistake_of_the_command_line_is_named_so(file: Path, override: str, message: str) -> None:
    file.write_text(RUN + "method: lisa\n")
    assert mistakes(load_config, file, [override]) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: model: required, got nothing\nrun.yaml: data: required, got nothing"),
        ("- 1", "run.yaml: should hold keys and values, got list"),
        ("a: 1\nb: [", "run.yaml: line 2: not valid YAML: "),
        ("a: 1\nb: 2\na: 3", "run.yaml: line 3: not valid YAML: key 'a' is given twice (column 1)"),
        ("model: gpt2\ndata: {path: x}", "run.yaml: model: should be a section of keys, got 'gpt2'"),
        (RUN + "training: 3", "run.yaml: training: should be a valid dictionary, got 3"),
        (
            RUN + "method: qlora",
            "run.yaml: method: should be 'lisa', 'full', 'lora' or 'galore', got 'qlora'; did you mean 'lora'?",
        ),
        (RUN + "deepspeed: 3", "run.yaml: deepspeed: should be the path of a DeepSpeed config or its keys, got 3"),
        (
            RUN + "statistics: often",
            "run.yaml: statistics: should be off, interval or a number of steps, 1 or more, got 'often'",
        ),
        (RUN + "statistics: 0", "run.yaml: statistics: should be off, interval or a number of steps, 1 or more, got 0"),
        (RUN + "lisa: {packing: true}", "run.yaml: lisa.packing: unknown key, got True; did you mean 'data.packing'?"),
        (RUN + "lisa: {lr: 1}", "run.yaml: lisa.lr: unknown key, got 1; did you mean 'training.learning_rate'?"),
        (
            "model: {name_or_path: x, num_labels: 2}\ndata: {path: x, eval_split: test, eval_fraction: 0.1}",
            "run.yaml: model: num_labels goes with task 'sequence_classification', but task is 'causal_lm'\n"
            "run.yaml: data: eval_fraction and eval_split both say what is held out: keep one",
        ),
        (
            "model: {name_or_path: x}\ndata: {path: x, format: classification}",
            "run.yaml: data.format is 'classification', but model.task is 'causal_lm'",
        ),
    ],
)
def test_a_bad_file_is_told_with_its_name(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    assert "\n".join(mistakes(load_config, file)).startswith(message)


def test_json_files_are_held_to_the_same(file: Path) -> None:
    path = file.with_suffix(".json")
    path.write_text('{"seed": 1,\n"seed": 2}')
    assert mistakes(LisaConfig.load, path) == ["run.json: line 2: key 'seed' is given twice (column 1)"]
    path.write_text('{"seed": 5}')
    assert LisaConfig.load(path).seed == 5


@pytest.mark.parametrize(("make", "message"), [(None, "no such file"), ("mkdir", "cannot be read as text")])
def test_a_missing_file_is_told_with_where_it_was_looked_for(file: Path, make: str | None, message: str) -> None:
    path = Path("gone.yaml")
    if make:
        path.mkdir()
    assert mistakes(load_config, path)[0].startswith(f"gone.yaml: {message}")


def test_a_config_cannot_be_changed_and_knows_its_origin(file: Path) -> None:
    file.write_text(RUN)
    config = load_config(file, ["lisa.seed=1"])
    with pytest.raises(ValueError, match="frozen"):
        config.lisa.seed = 2
    assert config.source == config.lisa.source == "run.yaml"
    assert config.lisa.where("seed") == "command line: lisa.seed"
    assert config.lisa.sampler.where("name") == "run.yaml: lisa.sampler.name"


def test_a_path_that_is_no_file_is_told(file: Path) -> None:
    file.write_text(RUN)
    for path, message in {
        "/dev/zero": "is a device",
        "x" * 300: "File name too long",
        "a\0b": "embedded null byte",
    }.items():
        (told,) = mistakes(load_config, path)
        assert message in told
    assert mistakes(load_config(file, ["deepspeed=/dev/zero"]).deepspeed_config)
    assert mistakes(load_config(file, ["deepspeed=~nobody/x"]).deepspeed_config)


def test_keys_behind_a_name_or_a_path_can_be_set(file: Path) -> None:
    file.write_text(RUN + "deepspeed: zero.json\nlisa: {optimizer: masked_adamw, sampler: grad_norm, growth: null}\n")
    Path("zero.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": null}}')
    config = load_config(
        file,
        [
            "deepspeed.zero_optimization.offload_param.device=cpu",
            "lisa.optimizer.moments=int8",
            "lisa.sampler.floor=0.2",
        ],
    )
    assert config.deepspeed_config() == {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert (config.lisa.optimizer.name, config.lisa.optimizer.moments) == ("masked_adamw", "int8")
    assert (config.lisa.sampler.name, config.lisa.sampler.floor) == ("grad_norm", 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1\n', "line 1: not valid JSON: Expecting ',' delimiter (column 8)"),
        ('{"a": 1\r\n\r\n', "line 1: not valid JSON: Expecting ',' delimiter (column 8)"),
        ('{"a": 1,\n\n}', "line 1: not valid JSON: Expecting property name enclosed in double quotes (column 8)"),
        ('{"a":\n}', "line 1: not valid JSON: Expecting value (column 6)"),
        ('{\n  "a": 1\n  "b": 2\n}', "line 2: not valid JSON: Expecting ',' delimiter (column 9)"),
        ('{"a": [\n1,\n2\n}\n', "line 3: not valid JSON: Expecting ',' delimiter (column 2)"),
        ('{"a"\n}', "line 1: not valid JSON: Expecting ':' delimiter (column 5)"),
        # What the parser does see is told where it is.
        ('{"a":\n  foo}', "line 2: not valid JSON: Expecting value (column 3)"),
        ('{"a": 1 "b": 2}', "line 1: not valid JSON: Expecting ',' delimiter (column 9)"),
        ('{"a": "x\n"}', "line 1: not valid JSON: Invalid control character at (column 9)"),
        ('{"a": 1}\n}', "line 2: not valid JSON: Extra data (column 1)"),
        ("", "line 1: not valid JSON: Expecting value (column 1)"),
        ('{"a": 1,\n\t"b": {"c": 1,\n\t"c": 2}}', "line 3: key 'c' is given twice (column 2)"),
        ('{"a": {"a": 1},\n"a": 1}', "line 2: key 'a' is given twice (column 1)"),
    ],
)
def test_a_mistake_in_json_is_told_where_it_is(file: Path, text: str, message: str) -> None:
    path = file.with_suffix(".json")
    path.write_text(text, newline="")
    assert mistakes(load_config, path) == [f"run.json: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a: 1\nb: "x\nc: 1\n', "line 2: not valid YAML: found unexpected end of stream, for a quoted scalar that begins here (column 4)"),
        ("a: [\n1,\n2\n", "line 1: not valid YAML: expected ',' or ']', but got '<stream end>', for a flow sequence that begins here (column 4)"),
        ("a: {x: 1,\n  y: {z: 1}\n", "line 1: not valid YAML: expected ',' or '}', but got '<stream end>', for a flow mapping that begins here (column 4)"),
        ("a: {x: 1\nb: 2\n", "line 2: not valid YAML: expected ',' or '}', but got ':', in a flow mapping that begins in line 1 (column 2)"),
        ("a: 1\nbroken\nc: 2\n", "line 2: not valid YAML: could not find expected ':' (column 1)"),
        ("a: 1\nb: x\0y\n", "line 2: not valid YAML: a character that no text holds, '\\x00' (column 5)"),
        ("a: 1\nb: 2\n\na: 3\n", "line 4: not valid YAML: key 'a' is given twice (column 1)"),
        ("a: {x: 1, y: 2,\n x: 3}\n", "line 2: not valid YAML: key 'x' is given twice (column 2)"),
        ("a:\n\t- 1\n", "line 2: not valid YAML: found character '\\t' that cannot start any token (column 1)"),
        ("a: 1\n b: 2\n", "line 2: not valid YAML: mapping values are not allowed here (column 3)"),
    ],
)  # fmt: skip
def test_a_mistake_in_yaml_is_told_where_it_is(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    assert mistakes(load_config, file) == [f"run.yaml: {message}"]
