"""Chooses the chat template: the tokenizer's own, or one that ``data.chat_template`` names."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from lisa_ds.config import DataConfig
from lisa_ds.errors import ConfigError

_TRAINING = "_training"  # how TRL names a template with generation marks, beside the one that a model comes with


def set_chat_template(tokenizer: Any, config: DataConfig) -> None:
    """Give a tokenizer the template of ``data.chat_template``; it keeps it, and is saved with it.

    Raises:
        ConfigError: There is no such file or name, or it holds no template.
    """
    if config.chat_template is None:
        return
    key, name = config.where("chat_template"), config.chat_template
    text = _find(tokenizer, name, key)
    try:
        _compile_jinja_template(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{key}: not a chat template, line {error.lineno}: {error.message}, got {name!r}") from error
    tokenizer.chat_template = text


def training_template(template: str) -> tuple[str, str] | None:
    """Name and text of TRL's training variant of a template, if it has one."""
    for path in _of_trl():
        if path.read_text(encoding="utf-8") == template:
            training = path.with_stem(path.stem + _TRAINING)
            return (training.stem, training.read_text(encoding="utf-8")) if training.exists() else None
    return None


def _find(tokenizer: Any, name: str, key: str) -> str:
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in own:
        return str(own[name])
    if "/" in name or name.endswith(".jinja"):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key}: not text in UTF-8, got {name!r}") from error
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ConfigError(f"{key}: {what.lower()}, got {name!r}") from error
        if not text.strip():
            raise ConfigError(f"{key}: the file is empty, got {name!r}")
        return text
    of_trl = {path.stem: path for path in _of_trl()}
    if name in of_trl:
        return of_trl[name].read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, [*own, *of_trl], n=3)
    trl = "such as qwen3_training" if of_trl else "of a release that has them: pip install -U 'lisa-ds[trl]'"
    raise ConfigError(
        f"{key}: should be the path of a .jinja file, a name of the tokenizer's own templates "
        f"({', '.join(own) or 'it has none by name'}) or of TRL's ({trl}), got {name!r}"
        + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
    )


def _of_trl() -> list[Path]:
    """The templates that TRL comes with, for many models and for training them."""
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    return sorted(path for place in places or () for path in Path(place, "chat_templates").glob("*.jinja"))
