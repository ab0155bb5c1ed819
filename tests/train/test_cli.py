"""`lisa-ds`: exit codes, messages, and that what export writes is the model that was trained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lisa_ds
from lisa_ds.cli import main
from tests import tiny
from tests.ranks import run_ranks

TAG = "global_step3"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A checkpoint of a bf16 model with odd sizes, tied and untied, and its weights as the engine gathered them."""
    folder = tmp_path_factory.mktemp("export")
    for name, tied in (("tied", True), ("untied", False)):
        tiny.write_model(folder / name, tie_word_embeddings=tied, intermediate_size=63)
    _, live = run_ranks(2, train_and_save, folder, str(folder))
    return folder, live


def train_and_save(folder: str) -> dict[str, dict[str, Tensor]]:
    import deepspeed

    live = {}
    for name in ("tied", "untied"):
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.bfloat16)
        zero = {"stage": 3, "reduce_bucket_size": 100000, "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
        engine, *_ = lisa_ds.initialize(
            model=model,
            config=config | {"zero_allow_untested_optimizer": True},
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
            lisa_config={"num_sampled_layers": 1, "interval_steps": 2},
        )
        for _ in range(3):
            ids = torch.randint(0, 260, (1, 16))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(f"{folder}/checkpoint-{name}")
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            live[name] = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return live


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("tag", ["", TAG])
def test_an_exported_checkpoint_reloads_as_the_live_model(saved: Any, tmp_path: Path, name: str, tag: str) -> None:
    folder, live = saved
    out = tmp_path / "not yet" / "model"
    assert (
        main(["export", str(folder / f"checkpoint-{name}" / tag), str(out), "--model", str(folder / name), *BF16]) == 0
    )
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    loaded = model.state_dict()
    assert loaded.keys() == live[name].keys()
    for key, value in live[name].items():
        assert loaded[key].dtype == torch.bfloat16
        assert loaded[key].equal(value), key
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT
    assert [path.name for path in out.parent.iterdir()] == ["model"]


BF16 = ("--dtype", "bfloat16")


@pytest.mark.multirank
def test_config_and_tokenizer_come_from_the_checkpoint_if_it_has_them(saved: Any, tmp_path: Path) -> None:
    folder, live = saved
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "checkpoint-untied", checkpoint)
    for path in (folder / "untied").glob("*.json"):
        shutil.copy(path, checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "model")]) == 0
    written = load_file(tmp_path / "model/model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}  # as this config says
    # What was training comes from its fp32 master copy: more digits than the bf16 weight, which is it rounded.
    assert all(value.bfloat16().equal(live["untied"][key]) for key, value in written.items())
    assert not all(value.equal(live["untied"][key].float()) for key, value in written.items())
    assert main(["generate", str(tmp_path / "model"), "--prompt", "1 + 1?", "--max_new_tokens", "3"]) == 0


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        ("cut optim 1", [], f"checkpoint/{TAG}/*rank_1*optim_states.pt: is truncated or not a checkpoint"),
        ("remove model 1", [], f"checkpoint/{TAG}: has 1 *_model_states.pt and 2 *_optim_states.pt; a run writes one"),
        ("remove both 1", [], f"checkpoint/{TAG}: cannot be read: Expected 2 of '*_optim_states.pt'"),
        ("remove latest", [], "checkpoint/latest: no such file"),
        ("another model", ["--model", "tied"], "its weights are not those of the model in"),
        ("no config", [], "checkpoint: holds no config.json; say which model was trained, --model"),
        ("taken", [], "out: exists already; choose a new directory"),
    ],
)
def test_nothing_is_exported_from_a_bad_checkpoint(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str, more: list[str], message: str
) -> None:
    folder, _ = saved
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(folder / "checkpoint-untied", checkpoint)
    if spoil != "no config" and not more:
        more = ["--model", str(folder / "untied")]
    elif more:
        tiny.write_model(tmp_path / "tied", hidden_size=64)
        more = ["--model", str(tmp_path / "tied")]
    match spoil.split():
        case ["cut", *_]:
            (path,) = (checkpoint / TAG).glob("*rank_1*optim_states.pt")
            path.write_bytes(path.read_bytes()[:-100])
        case ["remove", "latest"]:
            (checkpoint / "latest").unlink()
        case ["remove", what, _]:
            for path in (checkpoint / TAG).glob("*rank_1*"):
                if what == "both" or f"{what}_states" in path.name:
                    path.unlink()
        case ["taken"]:
            out.mkdir()
            (out / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(checkpoint), str(out), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lisa-ds: error: ")
    position = 0
    for part in message.split("*") if "rank_1*" in message else [message]:
        position = error.index(part, position) + len(part)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "out"], "nowhere: no such directory (looked from "),
        (
            ["generate", "x", "--prompt", "x", "--max_new_tokens", "0"],
            "argument --max_new_tokens: should be a whole number, 1 or more, got '0'",
        ),
        (["export", ".", "out", "--model", "no-such-model"], "no-such-model: no config of a model could be loaded: "),
        (["frobnicate"], "argument COMMAND: invalid choice: 'frobnicate'"),
        (["plan", "--gpu-mem", "8GB"], "unrecognized arguments: --gpu-mem; see `lisa-ds --help`\n"),
        (["export"], "the following arguments are required: checkpoint, out; see `lisa-ds export --help`\n"),
        (
            ["check", "a.yaml", "b.yaml"],
            "command line: should be key=value with a dotted key, got 'b.yaml' after 'a.yaml'\n",
        ),
        (
            ["generate", "builtin:smollm", "--prompt", "x"],
            "builtin:smollm: no such built-in model; did you mean",
        ),
    ],
)
def test_a_wrong_command_line_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # without a network the hub is tried for half a minute
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err[: len(message) + 16]) == ("", f"lisa-ds: error: {message}")


def test_the_version_is_told_without_loading_torch() -> None:
    code = "import sys, lisa_ds.cli; 'torch' in sys.modules and sys.exit('torch'); lisa_ds.cli.main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lisa-ds {lisa_ds.__version__}\n"), done.stderr
