"""The command `train`: checks a run file, and starts DeepSpeed's launcher with it."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.config import load_config
from lisa_ds.errors import ConfigError


def add(commands: values.Commands) -> None:
    """Declare `train`."""
    train = commands.add_parser("train", help="start a run on all GPUs, or on the CPU, by DeepSpeed's launcher")
    values.add_run(train)
    train.add_argument("--resume", metavar="auto|PATH", help="go on from output_dir's last checkpoint, or from PATH")
    train.add_argument("--force", action="store_true", help="try a run that the planner says cannot fit")
    train.add_argument("--deepspeed_config", metavar="FILE", help="instead of the run's deepspeed section")
    train.add_argument("--num-gpus", type=values.count, metavar="N", help="or CPU ranks where there are no GPUs")
    train.add_argument("--hostfile", type=Path, metavar="FILE", help="several hosts over ssh: `name slots=N` a line")
    train.add_argument("--num-nodes", type=values.count, metavar="N", help="use the first N hosts of it")
    train.add_argument("--master-addr", metavar="HOST", help="where ranks meet; default: the first host")
    train.add_argument("--master-port", type=values.count, metavar="PORT", help="default: a free one on a single host")
    train.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> int:
    file, overrides = values.run_file(arguments)
    if file is None:
        raise ConfigError("train: name the FILE of a run; `lisa-ds init` writes one, `lisa-ds recipes` has some")
    if arguments.deepspeed_config:
        overrides.append(f"deepspeed={arguments.deepspeed_config}")
    _check_file(file, overrides)

    from lisa_ds.train import launcher
    from lisa_ds.train.remote import check_hosts, exports

    where = launcher.Where(
        arguments.num_gpus, arguments.hostfile, arguments.num_nodes, arguments.master_addr, arguments.master_port
    )
    devices = launcher.num_devices() if where.hostfile is None else 0
    options = launcher.options(where, devices, os.environ)
    remote = where.hostfile is not None and check_hosts(where.hostfile) > 1
    words = ["--lisa_config", file, *(["--resume", arguments.resume] if arguments.resume else [])]
    words += [*(["--force"] if arguments.force else []), *overrides]
    environ = dict(os.environ)
    if where.hostfile is None and not devices:
        environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, with many warnings
        ranks = where.num_gpus or 1
        more = "" if where.num_gpus else "; --num-gpus 2 starts two"
        print(f"no GPU here: {ranks} {'rank' if ranks == 1 else 'ranks'} on the CPU{more}")
    with tempfile.NamedTemporaryFile("w", prefix="lisa-ds-env-") as file_of_exports:
        if remote and "DS_ENV_FILE" not in environ:
            file_of_exports.writelines(f"{line}\n" for line in exports(environ))
            file_of_exports.flush()
            environ["DS_ENV_FILE"] = file_of_exports.name
        return launcher.launch(options, words, environ, remote=remote)


def _check_file(file: str, overrides: list[str]) -> None:
    """Report mistakes before a rank is started; rank 0 reads the file again, and prints the notices about it."""
    log = logging.getLogger("lisa_ds")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        load_config(file, overrides)
    finally:
        log.setLevel(level)
