"""The memory plan of a run beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from lisa_ds.config import from_fields
from lisa_ds.errors import LisaError
from lisa_ds.memory import PARTS_OF_STATE
from lisa_ds.memory.run_settings import Forecast
from lisa_ds.memory.settings import forecast_of
from lisa_ds.report.runs import Run

ON_CPU = "process"
PEAK = "peak"


@dataclass(frozen=True)
class Line:
    """Bytes of one part on a rank."""

    part: str
    planned: float | None
    measured: float | None

    @property
    def difference(self) -> float | None:
        """Of what was measured from what was planned, as a share of the plan."""
        if self.part == ON_CPU or not self.planned or self.measured is None:
            return None
        return self.measured / self.planned - 1


def compare(run: Run) -> tuple[list[Line], str]:
    """The lines of a table, and a sentence about what is missing or cannot be compared, or nothing.

    Live state is of the last interval, the plan is of the largest draw.
    """
    planned, why = _forecast(run)
    live = run.live
    lines = []
    for part, kinds in PARTS_OF_STATE.items():
        expected = None if planned is None else _most(planned, part)
        measured = sum(live[kind] for kind in kinds if kind in live) if live else None
        if expected or measured:
            lines.append(Line(part, expected, measured))
    on_cpu = (run.device or "").endswith("CPU")
    if planned is not None or run.memory is not None:
        if on_cpu:
            lines.append(Line(PEAK, None if planned is None else planned.peak, None))
            lines.append(Line(ON_CPU, None, run.memory))
            why += " Without a GPU the measured peak is that of the process, Python and libraries (about 0.5 GB) included: no measure of the plan."
        else:
            lines.append(Line(PEAK, None if planned is None else planned.peak, run.memory))
    if not live:
        why += " Live state is measured at the end of a run."
    return lines, why.strip()


def _forecast(run: Run) -> tuple[Forecast | None, str]:
    if run.config is None:
        return None, "There is no plan: the run's config is not known."
    if run.world_size is None:
        return None, "There is no plan: the number of ranks is not known."
    try:
        config = from_fields(run.config, str(run.directory))
        return forecast_of(config, num_ranks=run.world_size, on_cpu=(run.device or "").endswith("CPU")), ""
    except LisaError as error:
        return None, f"There is no plan: {' '.join(str(error).split())}."


def _most(planned: Forecast, part: str) -> float:
    """The most bytes of a part in any phase, and those of it on the host."""
    return max(parts.get(part, 0) for parts in planned.phases.values()) + planned.host.get(part, 0)
