"""Prints a run's log entries on the console: one line each, and progress bars on a terminal.

Trackers and ``log_history`` get the whole entry; a line has the most important values, as far as they fit.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback

_FIRST: dict[str, Callable[[Any], str]] = {
    "epoch": lambda value: f"epoch {value:.2f}",
    "loss": lambda value: f"loss {value:.4f}",
    "eval_loss": lambda value: f"held-out loss {value:.4f}",
    "grad_norm": lambda value: f"grad {value:.3g}",
    "learning_rate": lambda value: f"lr {value:.2e}",
}
# Between the two comes what has no form of its own: counts of what went wrong, metrics.
_LAST: dict[str, Callable[[Any], str]] = {
    "tokens_per_second": lambda value: f"{_short(value)} tok/s",
    "waiting_for_data": lambda value: f"waiting {value:.0%}" if value >= 0.05 else "",
    "max_rank_memory_gb": lambda value: f"{value:.2f} GB",
    "lisa/interval": lambda value: f"interval {value}",
    "mfu": lambda value: f"MFU {value:.0%}",
    "eval_runtime": lambda value: f"{value:.1f} s",
    "train_runtime": lambda value: f"trained for {value:.1f} s",
    "eval_samples_per_second": lambda value: f"{_short(value)} rows/s",
}
# What the line says already, or another one; and transformers' mean loss, which a resumed run divides by the steps before it, too.
_UNTOLD = {
    *("train_loss", "step", "total_flos", "lisa/state_mb", "tokens_per_second_per_gpu", "hfu", "max_rank_reserved_gb"),
    *("forward_s", "backward_s", "optimizer_s", "switch_s"),
    *("eval_steps_per_second", "train_steps_per_second", "train_samples_per_second", "evaluating_and_saving_s"),
}


def show_lines(trainer: Any) -> None:
    """Have ``trainer`` print its entries by :class:`Console` instead of its own callback."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(Console(bars=not trainer.args.disable_tqdm and sys.stderr.isatty()))


def width() -> int:
    """Columns of a line at most: 100, or those of a narrower terminal."""
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def line(entry: Mapping[str, Any], step: int, steps: int) -> str:
    """A log entry in one line; what does not fit is left out, from the end.

    Example:
        >>> line({"loss": 3.28204, "grad_norm": 2.924, "learning_rate": 4.7658e-4, "epoch": 0.208183}, 10, 400)
        'step  10/400  epoch 0.21  loss 3.2820  grad 2.92  lr 4.77e-04'
    """
    other = {key: value for key, value in entry.items() if key not in _UNTOLD and key not in _FIRST | _LAST}
    parts = [
        *(form(entry[key]) for key, form in _FIRST.items() if key in entry),
        *(
            f"{_name(key)} {value:.4g}" if isinstance(value, float) else f"{_name(key)} {value}"
            for key, value in other.items()
        ),
        *(form(entry[key]) for key, form in _LAST.items() if key in entry),
    ]
    shown = f"step {step:>{len(str(steps))}}/{steps}"
    columns = width()
    for part in filter(None, parts):
        if len(shown) + len("  ") + len(part) > columns:
            break
        shown += f"  {part}"
    return shown


def draw(step: int, interval: int, what: str, live_bytes: int) -> str:
    """A new draw in one line; a long list of layers is cut short.

    Example:
        >>> draw(6, 1, "layers [11, 22]", 247_700_000)
        'step 6: interval 1 trains layers [11, 22]; live state 247.7 MB on a rank'
    """
    head, tail = f"step {step}: interval {interval} trains ", f"; live state {live_bytes / 1e6:.1f} MB on a rank"
    return head + textwrap.shorten(what, max(20, width() - len(head + tail)), placeholder=" ...") + tail


class Console(ProgressCallback):
    """Transformers' progress bars, on a terminal, and :func:`line` for each entry.

    Args:
        bars: Whether to show them; in a file they would be noise.
    """

    def __init__(self, *, bars: bool) -> None:
        super().__init__()
        self._bars = bars
        self._begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce what comes before the first step, and show a progress bar."""
        self._begun = False
        if self._bars:
            super().on_train_begin(args, state, control, **kwargs)
        if args.eval_on_start:
            self._say(state, "measuring the held-out loss before training ...")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce the first step, as the first log entry may be many steps later."""
        if not self._begun:
            self._begun = True
            self._say(state, f"training, from step {state.global_step + 1} to {state.max_steps} ...")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See transformers."""
        if self._bars:
            super().on_step_end(*args, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """See transformers."""
        if self._bars:
            super().on_prediction_step(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print an entry; also of an evaluation after training, when transformers' bar is gone."""
        if logs:
            self._say(state, line(logs, state.global_step, state.max_steps))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """See transformers."""
        if self._bars:
            super().on_train_end(*args, **kwargs)

    def _say(self, state: Any, text: str) -> None:
        if state.is_world_process_zero:
            tqdm.write(text)  # above the bars
            sys.stdout.flush()


def _name(key: str) -> str:
    return key.removeprefix("lisa/").replace("_", " ")


def _short(value: float) -> str:
    """Three digits and a unit: ``82.1``, ``12.3k``, ``1.23M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}{unit}".replace(".k", "k").replace(".M", "M")
    return f"{value:.3g}"
