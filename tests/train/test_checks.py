"""What is asked of a run before its weights are loaded: packages, and model and data held against each other."""

from __future__ import annotations

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.training_args import OptimizerNames

from lisa_ds.config import load_config
from lisa_ds.errors import LisaError
from lisa_ds.models.positions import most_positions, trained_positions
from lisa_ds.train import arguments, checks
from tests import tiny
from tests.train.run_to_spoil import RUN, folder, made, refusal, refused_run

__all__ = ["folder", "made"]

# ---- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_that_is_not_installed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused_run(capsys, "training.use_liger_kernel=true") == (
        "command line: training.use_liger_kernel: needs liger-kernel 0.3.0 or newer, which is not installed, got True; pip install "
        "liger-kernel, or set it to false"
    )


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_is_there_or_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch, optim: str) -> None:
    """Refused is what transformers itself cannot make, and what does not work on slices."""
    from transformers import Trainer

    config = load_config("run.yaml", ["lisa.optimizer=adamw", f"training.optim={optim}"])
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable)
    args = TrainingArguments("none", optim=optim, use_cpu=True, report_to=[])
    try:
        checks.packages.check(arguments.check(config), arguments.origin(config))
        refused = ""
    except LisaError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("command line: training.optim: ")
        assert repr(optim) in refused
    if "whole matrices" in refused:
        return
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, None)
        assert not refused
    except (ImportError, ValueError, RuntimeError):
        assert refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attn_implementation=flash_attention_2", "model.attn_implementation: cannot be had for 'model' here, got 'flash_attention_2'; leave it out, or"),
        ("model.attn_implementation=flash", "model.attn_implementation: cannot be had for 'model' here, got 'flash'; leave it out"),
        ("training.torch_compile_backend=inductr", "training.torch_compile_backend: should be one of "),
        ("training.torch_compile_mode=fast", "training.torch_compile_mode: should be one of default, "),
        ("training.push_to_hub=true", "training.push_to_hub: needs a token of the hub, got True; set HF_TOKEN, or hub_token"),
        ("training.label_names=[x]", "training.label_names: rows have labels under one name: leave it out, got ['x']"),
        ("training.train_sampling_strategy=longest", "training.train_sampling_strategy: should be one of random, sequential, group_by_length, got 'longest'"),
        ("training.dataloader_persistent_workers=true", "training.dataloader_persistent_workers: takes dataloader_num_workers of 1 or more, got True"),
        ("training.dataloader_multiprocessing_context=x", "training.dataloader_multiprocessing_context: should be one of "),
        ("training.accelerator_config={split_batches: true}", "training.accelerator_config: split_batches would divide a rank's rows among all"),
        ("training.accelerator_config={use_seedable_sampler: false}", "training.accelerator_config: use_seedable_sampler false would have a resumed run see other"),
        ("training.accelerator_config={gradient_accumulation_kwargs: {num_steps: 3}}", "training.accelerator_config: gradient_accumulation_kwargs.num_steps is what"),
        ("training.bf16_full_eval=true", "training.bf16_full_eval: would cast the model that trains; set bf16, or leave it out, got True"),
        ("training.enable_jit_checkpoint=true", "training.enable_jit_checkpoint: does not belong here: a run saves itself when it is signalled"),
        ("deepspeed={zero_optimization: {stage: 3}, bf16: [1]}", "deepspeed: DeepSpeed cannot read it: "),
        ("deepspeed={zero_optimization: {stage: 3}, communication_data_type: fp23}", "deepspeed: DeepSpeed cannot read it: "),
        (
            "deepspeed={zero_optimization: {stage: 3}, bf16_: {enabled: auto}}",
            "deepspeed: bf16_.enabled: 'auto' is filled in for some keys, and this is none of them; write a value, or "
            "'bf16.enabled'",
        ),
        (
            "deepspeed={zero_optimization: {stage: 3, stage3_max_live_parameters: auto}}",
            "deepspeed: zero_optimization.stage3_max_live_parameters: 'auto' is filled in for some keys, and this is none of",
        ),
        (
            "deepspeed={zero_optimization: {stage: 3}, train_batch: auto}",
            "deepspeed: train_batch: 'auto' is filled in for some keys, and this is none of them; write a value, or 'train_batch",
        ),
        ("deepspeed={zero_optimization: {stage: 3, 7: 1}}", "deepspeed.zero_optimization: should have text for keys, has 7"),
        ("deepspeed={zero_optimization: {stage: 3}, gradient_clip: 1.0}", "deepspeed: gradient_clip: DeepSpeed "),
        ("deepspeed={zero_optimization: {stage: 3}, compile: 1.5}", "deepspeed: DeepSpeed cannot read it: "),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if override.split("=")[0].split(".")[-1] not in TrainingArguments.__dataclass_fields__ and override.startswith(
        "training"
    ):
        pytest.skip("this transformers has no such argument")
    assert f"command line: {message}" in refusal(override)


# ---- model and data ---------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
FAMILIES: dict[str, tuple[dict[str, Any], int | None]] = {
    "gpt2": (GPT, 16),
    "gpt_neo": ({"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 16, "window_size": 4}, 16),
    "opt": ({**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16}, 16),
    "gpt_bigcode": (GPT, 16),
    "biogpt": (SIZES, 16),
    "gptj": ({**GPT, "rotary_dim": 4}, 16),
    "codegen": ({**GPT, "n_head": 4, "n_ctx": 16, "rotary_dim": 4}, 16),
    "ctrl": ({**GPT, "dff": 16}, 16),
    "mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 16}, 16),
    "openai-gpt": (GPT, 16),
    "xglm": ({"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 16}, None),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    "falcon": ({**SIZES, "alibi": True, "new_decoder_architecture": False}, None),
    "llama": (SIZES, None),
    "gpt_neox": (SIZES, None),
    "gemma2": ({**SIZES, "num_key_value_heads": 1, "head_dim": 8}, None),
    "bert": (SIZES, 16),
    "roberta": (SIZES, 14),  # its first two rows are for padding
    "distilbert": ({"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}, 16),
    "mpnet": (SIZES, 14),
    "modernbert": (SIZES, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_table_of_positions_ends_where_the_model_does(kind: str) -> None:
    sizes, limit = FAMILIES[kind]
    config = CONFIG_MAPPING[kind](vocab_size=40, pad_token_id=1, bos_token_id=2, eos_token_id=3, **sizes)
    classifies = kind in ("bert", "roberta", "distilbert", "mpnet", "modernbert")
    build = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with torch.device("meta"):
        assert most_positions(build.from_config(config)) == limit
    model = build.from_config(config).eval()

    def reads(length: int) -> bool:
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))
        except (IndexError, RuntimeError):
            return False
        return True

    assert reads(limit or 16)
    assert reads((limit or 16) + 1) == (limit is None)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4}}, 8192),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4}}, 131072),
    ],
)  # fmt: skip
def test_rotary_positions_reach_as_far_as_their_scaling(changes: dict[str, Any], longest: int) -> None:
    assert trained_positions(tiny.config(**changes)) == longest


def write_other(kind: str, sizes: dict[str, Any]) -> None:
    shutil.rmtree("model")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=260, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "codegen"])
def test_rows_longer_than_a_table_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    sizes, most = FAMILIES[kind]
    write_other(kind, sizes)
    assert refused_run(capsys, "data.max_length=17") == (
        f"command line: data.max_length: 'model' has a table of {most} positions and reads no longer row, got 17; set it to {most} or less"
    )
    run = {**RUN, "data": {"path": "rows.jsonl"}}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    assert "run.yaml: data.max_length: 'model' has a table of 16 positions, and a row has " in refused_run(capsys)
    checks.check(load_config("run.yaml", ["data.max_length=16"]))


def test_rows_beyond_what_a_rotary_model_has_seen_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lisa_ds"):
        checks.check(load_config("run.yaml", ["data.max_length=4096"]))
        checks.check(load_config("run.yaml", ["data.max_length=2048"]))
    (told,) = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
    assert told.startswith("command line: data.max_length: 4096 is beyond the 2048 positions that 'model' was made for")


def test_tokens_without_a_row_in_the_embedding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_model(folder / "model", vocab_size=60)
    line = refused_run(capsys)
    assert line.startswith(
        "run.yaml: model.name_or_path: the embedding of 'model' has 60 rows, but its tokenizer makes token "
    )
    assert line.endswith(
        "of the data, of 260 that it knows; add rows with resize_token_embeddings and save the model, or use the tokenizer that "
        "belongs to it"
    )


def test_a_token_added_to_the_tokenizer_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens(["make"])
    tokenizer.save_pretrained("model")
    tiny.write_rows(folder / "rows.jsonl", lambda i: {"instruction": f"make {i}", "input": "", "output": "yes"})
    assert "tokenizer makes token 260 ('make') of the data, of 261 that it knows" in refused_run(capsys)


def test_a_padding_token_added_to_the_tokenizer_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained("model")
    assert (
        "the embedding of 'model' has 260 rows, and its tokenizer pads with token 260 ('[PAD]'); add rows"
        in refused_run(capsys)
    )


ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "d_model": 16}, "an encoder and a decoder (t5), and task 'causal_lm' would train its decoder without"),
        ({"model_type": "bart", **ENCODER_DECODER}, "an encoder and a decoder (bart)"),
        ({"model_type": "marian", **ENCODER_DECODER}, "an encoder and a decoder (marian)"),
        ({"model_type": "whisper", **ENCODER_DECODER}, "an encoder and a decoder (whisper)"),
        ({"model_type": "bert"}, "a 'bert' model for masked language modelling: each of its tokens sees those that it is to predict"),
        ({"model_type": "roberta"}, "a 'roberta' model for masked language modelling"),
        ({"model_type": "xlm"}, "a 'xlm' model for masked language modelling"),
        ({"model_type": "llava"}, "a 'llava' model, for which transformers has no causal language model; it reads images beside text"),
        ({"model_type": "clip"}, "a 'clip' model, for which transformers has no causal language model; it reads images beside text"),
        ({"model_type": "wav2vec2"}, "a 'wav2vec2' model, for which transformers has no causal language model; name a decoder-only"),
        ({"model_type": "distilbert"}, "a 'distilbert' model, for which transformers has no causal language model"),
    ],
)  # fmt: skip
def test_models_that_are_for_something_else(folder: Path, config: dict[str, Any], message: str) -> None:
    Path("model/config.json").write_text(json.dumps(config))
    assert refusal().startswith(f"run.yaml: model.name_or_path: 'model' is {message}")


def test_a_processor_without_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path("model").glob("tokenizer*"):
        file.unlink()
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    Path("model/preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    assert refused_run(capsys).startswith("run.yaml: model.name_or_path: no tokenizer could be loaded from 'model': ")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "model holds a config.json and no weights; it lacks model.safetensors, or its index and shards"),
        ({"model.safetensors": b"<html>"}, "model/model.safetensors: is truncated or no safetensors file (6 bytes)"),
        ({"model.safetensors": None}, "model/model.safetensors: is truncated: "),
        ({"pytorch_model.bin": b"\0" * 100}, "model/pytorch_model.bin holds no weights as torch writes them"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'}, "model/model-1.safetensors is missing, which the index of"),
        ({"model.safetensors.index.json": b"{}"}, "model/model.safetensors.index.json is damaged: it has no weight_map"),
        ({"pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1.bin"}}'}, "model/pytorch_model-1.bin is missing"),
    ],
)  # fmt: skip
def test_weights_that_are_not_whole(folder: Path, files: dict[str, bytes | None], message: str) -> None:
    whole = Path("model/model.safetensors").read_bytes()
    Path("model/model.safetensors").unlink()
    for name, content in files.items():
        (Path("model") / name).write_bytes(whole[:-100] if content is None else content)
    assert message in refusal()


def test_a_quantised_checkpoint(folder: Path) -> None:
    fields = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(
        json.dumps({**fields, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "the weights of 'model' are quantised and cannot be trained" in refusal()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": 3}', '{"model_type": "nope"}', '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "llama", "num_attention_heads": 7}'])  # fmt: skip
def test_a_config_of_a_model_that_cannot_be_read(folder: Path, content: str) -> None:
    Path("model/config.json").write_text(content)
    assert refusal().startswith("run.yaml: model.name_or_path: ")
