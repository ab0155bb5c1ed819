"""The commands `init` and `recipes`: a run file from a few answers, or one of those that come with the package."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from contextlib import suppress
from pathlib import Path

import lisa_ds
from lisa_ds.cli import values
from lisa_ds.config import load_config
from lisa_ds.errors import ConfigError


def add(commands: values.Commands) -> None:
    """Declare `init` and `recipes`."""
    init = commands.add_parser("init", help="write the file of a run, from flags or from a few questions")
    init.add_argument("file", nargs="?", type=Path, default=Path("run.yaml"), help="default: run.yaml")
    init.add_argument("--model", metavar="NAME", help="a directory, a hub name or builtin:smollm2-135m")
    init.add_argument("--data", metavar="PATH", help="a file, a directory of files, a hub name or builtin:stdlib-docs")
    init.add_argument("--method", choices=("lisa", "full", "lora", "galore"), default="lisa", help="default: lisa")
    init.add_argument("--gpus", type=values.count, metavar="N", help="default: those of this host")
    init.add_argument("--gpu-memory", type=values.memory, metavar="SIZE", help="of each, such as 24GB")
    init.add_argument("--force", action="store_true", help="write over a file that exists")
    init.set_defaults(command=_init)

    recipes = commands.add_parser("recipes", help="list the runs that come with lisa_ds, or copy one")
    recipes.add_argument("name", nargs="?", help="which to print; without it, list all")
    recipes.add_argument("--out", type=Path, metavar="FILE", help="write it to a new file")
    recipes.add_argument("--force", action="store_true", help="write over a file that exists")
    recipes.set_defaults(command=_recipes)


def _init(arguments: argparse.Namespace) -> None:
    from lisa_ds.cli import template
    from lisa_ds.train.launcher import num_devices

    _check_new(arguments.file, force=arguments.force)
    devices = num_devices()
    gpus, memory = arguments.gpus or devices, arguments.gpu_memory
    if memory is None and devices:
        memory = template.memory_of_device()
    model, data = arguments.model, arguments.data
    if not any((model, data, arguments.gpus, arguments.gpu_memory)) and sys.stdin.isatty():
        model = _ask("model: a directory, or a name on the Hugging Face hub", "builtin:smollm2-135m")
        data = _ask(
            "data: a file (jsonl, json, parquet, csv, txt), a directory, or a name on the hub", "builtin:stdlib-docs"
        )
        memory = _ask_memory(memory)
    if not model or not data:
        raise ConfigError("init: say --model NAME and --data PATH; on a terminal, `lisa-ds init` alone asks for them")
    run = template.make(model, data, arguments.method, (gpus or 1) if memory else gpus, memory)
    _write(arguments.file, template.text(run))
    print(*run.notes, f"wrote {arguments.file}", "next:", sep="\n")
    for command in next_commands(arguments.file, gpus or (1 if memory else 0), memory):
        print(f"  {command}")


def next_commands(file: Path, gpus: int, memory: int | None) -> list[str]:
    """The commands to try next with a run file, a line each."""
    room = f" --gpu-memory {memory / 2**30:g}GB" if memory else ""
    return [
        f"lisa-ds preview {file}",
        f"lisa-ds plan {file} --world-size {gpus or 1}{room}",
        f"lisa-ds train {file}",
    ]


def _ask(what: str, default: str) -> str:
    try:
        return input(f"{what} [{default}]: ").strip() or default
    except EOFError:
        print()
        raise ConfigError("init: a question was not answered; nothing has been written") from None


def _ask_memory(found: int | None) -> int | None:
    default = f"{found / 2**30:.0f}GB" if found else "none"
    while True:
        answer = _ask("memory of a GPU, such as 24GB; none: on the CPU", default)
        if answer == "none":
            return None
        try:
            return values.memory(answer)
        except argparse.ArgumentTypeError as error:
            print(error)


def _recipes(arguments: argparse.Namespace) -> None:
    files = _shipped()
    if arguments.name is None:
        if arguments.out is not None:
            raise ConfigError("recipes: say which one, as in `lisa-ds recipes NAME --out FILE`")
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:{width}}  {file.read_text().partition(chr(10))[0].lstrip('# ')}")
        return
    name = arguments.name.removesuffix(".yaml")
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "; `lisa-ds recipes` lists them"
        raise ConfigError(f"recipes: there is none of the name {arguments.name!r}{meant}")
    text = files[name].read_text()
    if arguments.out is None:
        print(text, end="")
        return
    _check_new(arguments.out, force=arguments.force)
    folder = "configs/recipes" if files[name].parent.name == "recipes" else "configs"
    _write(arguments.out, text.replace(f"{folder}/{name}.yaml", str(arguments.out)))
    print(f"wrote {arguments.out}")


def _shipped() -> dict[str, Path]:
    """Recipes by name, from ``configs``: beside the package in a checkout, inside it when installed."""
    package = Path(lisa_ds.__file__).parent
    for place in (package / "configs", package.parent / "configs"):
        if (place / "recipes").is_dir():
            return {path.stem: path for path in [*sorted(place.glob("*.yaml")), *sorted(place.glob("recipes/*.yaml"))]}
    raise ConfigError(f"recipes: configs is neither in {package} nor beside it; install lisa_ds anew")


def _check_new(file: Path, *, force: bool) -> None:
    if file.is_dir() or (file.exists() and not force):
        raise ConfigError(
            f"{file}: exists already; choose another name" + ("" if file.is_dir() else ", or say --force")
        )
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: is written as YAML; choose a name that ends in .yaml")


def _write(file: Path, text: str) -> None:
    """Write a run file, which the loader has accepted; it appears whole or not at all."""
    unfinished = file.with_name(f".{file.stem}.unfinished-{os.getpid()}{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        load_config(unfinished)
        unfinished.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(unfinished), str(file))) from None
    finally:
        with suppress(OSError):  # it has been renamed, or could not be made
            unfinished.unlink()
