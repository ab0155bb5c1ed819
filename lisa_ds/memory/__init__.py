"""The planner: memory of a run on one rank before anything is launched, from configs alone and without torch."""

from __future__ import annotations

from lisa_ds.memory.architectures import Architecture as Architecture
from lisa_ds.memory.forecast import forecast as forecast
from lisa_ds.memory.methods import METHODS as METHODS
from lisa_ds.memory.probe import probe_bytes as probe_bytes
from lisa_ds.memory.run_settings import Forecast as Forecast
from lisa_ds.memory.run_settings import RunSettings as RunSettings
from lisa_ds.memory.state import KINDS as KINDS
from lisa_ds.memory.state import PARTS_OF_STATE as PARTS_OF_STATE
from lisa_ds.memory.state import SAMPLED_KINDS as SAMPLED_KINDS
from lisa_ds.memory.state import ModelShape as ModelShape
from lisa_ds.memory.state import Plan as Plan
from lisa_ds.memory.state import Precision as Precision
from lisa_ds.memory.state import default_bucket as default_bucket
from lisa_ds.memory.state import full_state_bytes as full_state_bytes
from lisa_ds.memory.state import plan as plan
from lisa_ds.memory.state import state_bytes as state_bytes

__all__ = [
    "KINDS",
    "METHODS",
    "PARTS_OF_STATE",
    "SAMPLED_KINDS",
    "Architecture",
    "Forecast",
    "ModelShape",
    "Plan",
    "Precision",
    "RunSettings",
    "default_bucket",
    "forecast",
    "full_state_bytes",
    "plan",
    "probe_bytes",
    "state_bytes",
]
