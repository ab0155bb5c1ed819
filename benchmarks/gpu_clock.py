"""A clock for work on a GPU, which also tells the memory that was held at most."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds and peak bytes of phases, on a device that is waited for."""

    def __init__(self, dry_run: bool) -> None:
        self._dry_run = dry_run
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}

    def measure(self, name: str, phase: Callable[[], object], *, counts: bool = True) -> None:
        import torch

        if not self._dry_run:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        phase()
        if not self._dry_run:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if counts:
            self.seconds.setdefault(name, []).append(seconds)
            peak = 0 if self._dry_run else torch.cuda.max_memory_allocated()
            self.peaks[name] = max(peak, self.peaks.get(name, 0))

    def reserved(self) -> int:
        import torch

        return 0 if self._dry_run else torch.cuda.memory_reserved()
