"""The command line of a rank, as of ``launch/train.py``. Nothing heavy is loaded before the config has been read."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress

from lisa_ds import terminal
from lisa_ds.cluster import environment
from lisa_ds.cluster.preemption import Preempted, Preemption, ignore
from lisa_ds.config import load_config
from lisa_ds.errors import LisaError
from lisa_ds.train import stages

RANK_0_SPEAKS_S = 30.0
"""Seconds that another rank waits, after an error, for the launcher to end it because rank 0 has reported the same.

On a busy host ranks load torch and transformers with more than ten seconds between the first and the last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a config says.

    Returns:
        The exit code: 0, also for a run that a signal has ended in an orderly way, or 2 after an error that the user
        can fix; those of :func:`lisa_ds.terminal.run` after Ctrl-C or a closed pipe. Anything else is raised.
    """

    def rank() -> int:
        try:
            with Preemption().listening() as preemption:  # first of all: loading takes long
                _train(argv, preemption)
        except LisaError as error:
            return tell(error)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") != "0":  # a terminal interrupts all of them: one speaks
                return terminal.INTERRUPTED
            raise
        ignore()  # until the process has ended
        return 0

    return terminal.run(rank, prefix="")


def _train(argv: Sequence[str] | None, preemption: Preemption) -> None:
    _prepare_environment()
    arguments = build_parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides.append(f"deepspeed={arguments.deepspeed_config}")
    config = load_config(arguments.lisa_config, overrides)

    stages.begin("loading torch, transformers and DeepSpeed")
    import torch.distributed

    from lisa_ds.train.run import run

    with suppress(Preempted):
        run(config, resume=arguments.resume, force=arguments.force, preemption=preemption)
    torch.distributed.destroy_process_group()


def tell(error: LisaError) -> int:
    """Print ``error`` once, however many ranks found it, and return its exit code."""
    rank = int(os.environ["RANK"])
    if rank != 0:
        # Mostly rank 0 has found the same, and its exit makes the launcher end this one here. If it has not, speak.
        # Ended, it exits with the same code: srun's is the largest of all, and that of a signal would hide it.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(error.exit_code))
        time.sleep(RANK_0_SPEAKS_S)
        signal.signal(signal.SIGTERM, before)
    print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def build_parser() -> terminal.Parser:
    """The argument parser of a rank."""
    parser = terminal.Parser(
        prog="deepspeed launch/train.py",
        description="Fine-tune a language model by LISA under DeepSpeed ZeRO-3, as one file describes it.",
    )
    parser.add_argument("--lisa_config", required=True, metavar="FILE", help="the run: a YAML or JSON file")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue from the last complete checkpoint of output_dir, or from PATH"
    )
    parser.add_argument("--force", action="store_true", help="try a run that the planner says cannot fit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.learning_rate=1e-4")
    parser.add_argument("--deepspeed", action="store_true", help="accepted for DeepSpeed's sake; always on")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="instead of the run's deepspeed section")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return parser


def _prepare_environment() -> None:
    """Set the environment variables that no launcher has set, before torch reads them."""
    environment.fill()
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    # Ranks that each take every core only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // on_this_node)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it forks after threads have started
    if not sys.stderr.isatty():  # a bar in a file is noise
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, too
    # Every rank's copy of the same warnings is noise, and so are DeepSpeed's calls of names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if os.environ["RANK"] != "0":
        warnings.simplefilter("ignore")
        logging.getLogger("lisa_ds").setLevel(logging.ERROR)
    else:
        logging.getLogger("lisa_ds.scores").setLevel(logging.INFO)
