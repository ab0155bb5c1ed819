"""The base of all config sections: frozen, strict, with mistakes reported as ``file: key: what, got value``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from lisa_ds.errors import ConfigError

NOT_BUILT = "not built yet, arrives with {feature}"

# Written in the wrong place so often that the right one is worth a hint.
_HOMES = {
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    **{
        key: f"training.{key}"
        for key in (
            *("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
            *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
            *("output_dir", "bf16", "fp16", "report_to", "gradient_checkpointing", "lr_scheduler_type"),
        )
    },
}


@dataclass(frozen=True)
class Origin:
    """Where a section was read, so that a message written much later still names file and key."""

    file: str = ""
    prefix: str = ""
    overridden: Mapping[str, str] = field(default_factory=dict)  # dotted keys that were set over the file's, and where
    added: Mapping[str, str] = field(default_factory=dict)  # sections that are there only because of such a key

    def where(self, key: str) -> str:
        """``run.yaml: lisa.seed`` for the key ``seed``, or ``command line: lisa.seed`` if it was overridden there."""
        dotted = ".".join(filter(None, (self.prefix, key)))
        place = self.added.get(dotted, self.file)
        for key, written in self.overridden.items():
            if f"{dotted}.".startswith(f"{key}."):
                place = written
        return ": ".join(filter(None, (place, dotted)))


class Section(BaseModel):
    """A frozen group of keys that knows where it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def source(self) -> str:
        """The file this was read from; empty for one built in code."""
        return self._origin.file

    def where(self, key: str) -> str:
        """File and dotted name of ``key``, as error messages begin."""
        return self._origin.where(key)

    def __eq__(self, other: object) -> bool:
        """Equal settings are equal, wherever they were read."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


SectionT = TypeVar("SectionT", bound=Section)


def validate(kind: type[SectionT], fields: Mapping[str, Any], origin: Origin, problems: Sequence[str] = ()) -> SectionT:
    """Build ``kind`` from ``fields``.

    Args:
        kind: The section to build.
        fields: Its keys and values.
        origin: Where they were read.
        problems: Mistakes found earlier, reported along with those found here.

    Raises:
        ConfigError: Every mistake, one a line.
    """
    problems = [*problems, *unfit(fields, origin)]
    try:
        section = kind.model_validate(dict(fields))
    except ValidationError as error:
        problems = [*problems, *(_explain(problem, kind, origin) for problem in error.errors())]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    _set_origin(section, origin)
    return section


def _set_origin(section: Section, origin: Origin) -> None:
    section._origin = origin
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            prefix = ".".join(filter(None, (origin.prefix, name)))
            _set_origin(value, replace(origin, prefix=prefix))


def not_built(**arrives: str) -> BeforeValidator:
    """A validator that refuses values whose feature is not built yet: ``not_built(host="parking of layer state")``."""

    def check(value: Any) -> Any:
        name = next(iter(value), None) if isinstance(value, Mapping) else value
        if isinstance(name, str) and name in arrives:
            raise PydanticCustomError("not_built", NOT_BUILT, {"feature": arrives[name]})
        return value

    return BeforeValidator(check)


def mistake(what: str, choices: Sequence[str] = ()) -> PydanticCustomError:
    """An error whose text is exactly ``what`` (pydantic would prefix a ValueError's, and expand its braces).

    Of ``choices``, the one that is close to what was given is suggested.
    """
    return PydanticCustomError("mistake", "{what}", {"what": what, "choices": tuple(choices)})


def _explain(problem: ErrorDetails, kind: type[Section], origin: Origin) -> str:
    location = problem["loc"]
    where = origin.where(".".join(str(part) for part in location)) or kind.__name__
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key, got {show(problem['input'])}" + _meant(_suggest(kind, location, origin.prefix))
    if problem["type"] == "missing":
        return f"{where}: required, got nothing"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: should be a section of keys, got {show(problem['input'])}"
    what = problem["msg"].removeprefix("Input ")
    about_keys = isinstance(problem["input"], Mapping) and problem["type"] == "mistake"
    if about_keys and not what.startswith("should be"):
        return f"{where}: {what}"  # about several keys, which the text names: the whole section would say nothing
    choices = problem.get("ctx", {}).get("choices", ())
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    return f"{where}: {what}, got {show(problem['input'])}" + _meant(_closest(problem["input"], choices))


def _suggest(kind: type[Section], location: tuple[int | str, ...], prefix: str) -> list[str]:
    """The keys that were probably meant: the same one in its right place, or a close one of the same section."""
    *path, key = location
    section: Any = kind
    for part in path:
        section = _without_none(section.model_fields[part].annotation)
    homes = [
        f"{title}.{key}"
        for title, field in kind.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Section)
        and key in field.annotation.model_fields
    ]
    if not homes and ("training" in kind.model_fields or prefix) and key in _HOMES:
        homes = [_HOMES[str(key)]]
    known = [name for name, field in section.model_fields.items() if not field.exclude]
    return homes or [".".join(str(part) for part in (*path, near)) for near in _closest(key, known)]


def fits_a_path(value: str) -> str:
    """Refuse a name that no file can have, on any file system of Linux.

    Raises:
        PydanticCustomError: A part of it has more than 255 bytes, or the whole more than 4095.
    """
    encoded = value.encode("utf-8", "surrogatepass")
    if len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise mistake("should be a path, whose parts have at most 255 bytes")
    return value


PathName = Annotated[str, Field(min_length=1), AfterValidator(fits_a_path)]
"""The path of a file or directory, which need not exist."""


def unfit(fields: Mapping[str, Any], origin: Origin, *, text_keys: bool = False) -> list[str]:
    """Find values that no key can mean: they would fail much later, in arithmetic, in a system call or when printed.

    Args:
        fields: Keys and values, nested.
        origin: Where they were read.
        text_keys: Whether keys that are numbers are refused, too.

    Returns:
        What is wrong with each, in the order in which they are written.
    """
    problems: list[str] = []
    left: list[tuple[tuple[str, ...], Any]] = [((), fields)]
    while left:
        path, value = left.pop()
        what = ""
        if isinstance(value, Mapping):
            left += [((*path, str(key)), inner) for key, inner in value.items()]
            odd = [key for key in value if not isinstance(key, str if text_keys else (str, int))]
            what = f"should have text for keys, has {odd[0]!r}" if odd else ""
        elif isinstance(value, (list, tuple)):
            left += [(path, inner) for inner in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            what = "should be a number of 64 bits"
        elif isinstance(value, float) and not math.isfinite(value):
            what = "should be a finite number"
        elif isinstance(value, str) and not _writable(value):
            what = "should be text without NUL or half characters"
        if what:
            problems.append(f"{origin.where('.'.join(path))}: {what}, got {show(value)}")
    return problems[::-1]


def _writable(text: str) -> bool:
    """Whether ``text`` can be written to a file, and name one."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _without_none(annotation: Any) -> Any:
    """The section type in the annotation of a key that may also be None."""
    return next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)


def _closest(value: object, choices: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []


def _meant(suggestions: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else ""


def show(value: object) -> str:
    """``value`` as messages quote it: its beginning, if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"  # Python does not write out thousands of digits
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
