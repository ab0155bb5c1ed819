"""The table of segments that one launch updates: runs of consecutive elements, each with its own rate, decay and step.

Note on the table.
    The kernels take no tensors but three small tables: the 64-bit addresses of each segment's tensors, its
    hyperparameters, and on a GPU the segment that each block of :data:`BLOCK` elements belongs to. So one launch covers
    tensors anywhere in memory, its grid holds only the blocks of the segments in the table, and frozen weights are
    neither read nor written. Everything that changes from step to step (rates, step counts, loss scale, clip
    coefficient) is read on the device, and the tables are updated in place: a launch captured in a CUDA graph uses the
    values set later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lisa_ds.config.formats import QUANT_BLOCK as QUANT_BLOCK  # a fact of the tables, too
from lisa_ds.config.formats import Moments
from lisa_ds.errors import EngineError

BLOCK = 2048
"""Elements of a block: the unit of the GPU grid. A multiple of :data:`QUANT_BLOCK`."""

ALIGNMENT = 16
"""Bytes. A segment whose weights, gradients and moments begin at a multiple is read in 128-bit words; others by the element."""

# Columns of `SegmentTable.addresses` (int64). The kernels in csrc/ number them alike.
WEIGHT, GRAD, MASTER, EXP_AVG, EXP_AVG_SQ, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE, STEP = range(8)
NUMEL, FIRST_BLOCK, ALIGNED, SEED = range(8, 12)
ADDRESS_COLUMNS = 12

# Columns of `SegmentTable.hyper` (float32).
LR, WEIGHT_DECAY, BETA1, BETA2, ONE_MINUS_BETA1, ONE_MINUS_BETA2, EPS, LOG_BETA1, LOG_BETA2 = range(9)
HYPER_COLUMNS = 12

# What csrc/ calls the types.
TYPE_CODES = {None: -1, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOMENT_CODES = {"fp32": 0, "bf16": 1, "int8": 2, "none": 3}

_MOMENTS: dict[torch.dtype | None, Moments] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    None: "none",
}
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of a segment, as in ``torch.optim.AdamW``."""

    lr: float | Tensor = 1e-3
    """A number, or a tensor of one element on the segment's device, read there."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    """Factor on ``lr``."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Tensors of one segment: contiguous, of equal ``numel``, on one device.

    With ``master`` the update is made there in fp32 and rounded to ``weight``. Without it ``weight`` is updated in place: in
    fp32, or if it is bfloat16 by stochastic rounding.

    Without moments every step is the first one of AdamW, ``lr * g / (|g| + eps)`` and decay: betas have no effect.
    """

    weight: Tensor | None
    """bfloat16, float16 or float32; None to update ``master`` alone."""

    grad: Tensor
    """bfloat16, float16 or float32."""

    step: Tensor
    """float32, one element: steps taken. Stochastic rounding draws by it, also where there are no moments to correct."""

    exp_avg: Tensor | None = None
    """float32, bfloat16 (without master only) or int8 codes; None for no moments."""

    exp_avg_sq: Tensor | None = None
    """float32, bfloat16 or uint8 codes, as ``exp_avg``; None with it."""

    master: Tensor | None = None
    """float32."""

    exp_avg_scale: Tensor | None = None
    """float32, one for each :data:`QUANT_BLOCK` elements; 8-bit moments only, as the next."""

    exp_avg_sq_scale: Tensor | None = None

    stream: int = 0
    """Number of the segment's random stream, different from those of other segments, on this and on other ranks."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.grad.numel()

    @property
    def tensors(self) -> list[Tensor | None]:
        """Its tensors, in the order of the table's columns."""
        weight, master = (None, self.weight) if self.in_place_fp32 else (self.weight, self.master)
        return [
            *(weight, self.grad, master, self.exp_avg, self.exp_avg_sq, self.exp_avg_scale, self.exp_avg_sq_scale),
            self.step,
        ]

    @property
    def in_place_fp32(self) -> bool:
        """Whether the weight is its own master."""
        return self.master is None and self.weight is not None and self.weight.dtype == torch.float32


@dataclass(frozen=True)
class Layout:
    """Types that all segments of a launch share."""

    grad: torch.dtype
    weight: torch.dtype | None
    """What is written back; None where the fp32 master is the weight itself."""
    has_master: bool
    moments: Moments

    @property
    def bytes_per_element(self) -> int:
        """Bytes read and written for an element, without the scales of 8-bit moments."""
        moments = {"fp32": 16, "bf16": 8, "int8": 4, "none": 0}[self.moments]
        weight = self.weight.itemsize if self.weight is not None else 0
        return self.grad.itemsize + moments + (8 + weight if self.has_master else 2 * weight)


class SegmentTable:
    """The tables of one launch; keeps its tensors alive.

    Args:
        segments: What to update, all of one :class:`Layout` on one device.
        hypers: Hyperparameters of each.
        seed: Of stochastic rounding.

    Raises:
        ValueError: Types, sizes or devices do not go together; the message names the segment.
        EngineError: A CUDA graph is being captured, which would not include the upload of the tables.
    """

    def __init__(self, segments: Sequence[Segment], hypers: Sequence[Hyper], *, seed: int = 0) -> None:
        if not segments:
            raise ValueError("a table holds one segment at least")
        self.layout = layout_of(segments[0], "segment 0")
        self.device = segments[0].grad.device
        for i, segment in enumerate(segments):
            _check(i, segment, self.layout, self.device)
        if capturing(self.device):
            raise EngineError(
                "a table cannot be built while a CUDA graph is captured, which would not upload it; take one step with the same "
                "tensors before you capture"
            )
        self._seed = seed
        self.numels = [segment.numel for segment in segments]
        self.num_blocks = sum(-(-numel // BLOCK) for numel in self.numels)
        self.addresses = torch.zeros(len(segments), ADDRESS_COLUMNS, dtype=torch.int64, device=self.device)
        self._places = [[0] * ADDRESS_COLUMNS for _ in segments]
        self.point_at(segments)
        self.block_segment = self._block_segment()
        self.hyper = torch.zeros(len(segments), HYPER_COLUMNS, dtype=torch.float32, device=self.device)
        self._hypers: tuple[Hyper, ...] = ()
        self._rows: list[tuple[bool, list[float]]] = []
        self.set_hypers(hypers)
        self.one = torch.ones((), dtype=torch.float32, device=self.device)
        self.zero = torch.zeros((), dtype=torch.float32, device=self.device)

    def point_at(self, segments: Sequence[Segment]) -> None:
        """Update these in the next launch: segments of the same types and sizes, at their present addresses.

        Raises:
            ValueError: Types or sizes differ.
        """
        layouts = [layout_of(segment, f"segment {i}") for i, segment in enumerate(segments)]
        if [segment.numel for segment in segments] != self.numels or any(found != self.layout for found in layouts):
            raise ValueError("a table is of segments of the same types and sizes; build another one")
        self.segments = tuple(segments)
        self.steps = list({id(segment.step): segment.step for segment in segments}.values())  # some may share one
        places = self._address_rows(self._seed)
        if places == self._places:
            return
        if capturing(self.device):
            write_by_launches(self.addresses, places, self._places)
        else:
            self.addresses.copy_(self._staged(torch.tensor(places, dtype=torch.int64)), non_blocking=True)
        self._places = places

    def let_go(self) -> None:
        """Drop the references to all tensors until :meth:`point_at` is called again."""
        self.segments, self.steps = (), []

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        """Hyperparameters of each segment."""
        return self._hypers

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Give every segment its hyperparameters for the next launch, or replay of one; uploads what has changed, without waiting.

        Raises:
            ValueError: Not one for each segment, or out of range.
            EngineError: A number has changed while a CUDA graph is captured: every replay would set it again.
        """
        if len(hypers) != len(self.numels):
            raise ValueError(f"{len(self.numels)} segments take as many hyperparameters, got {len(hypers)}")
        rows = [(isinstance(hyper.lr, Tensor), _hyper_row(hyper)) for hyper in hypers]
        if rows != self._rows:
            if capturing(self.device):
                raise EngineError(
                    "hyperparameters cannot change while a CUDA graph is captured, whose every replay would set them again; change "
                    "them before or after, or give lr as a tensor"
                )
            self.hyper.copy_(
                self._staged(torch.tensor([row for _, row in rows], dtype=torch.float32)), non_blocking=True
            )
            self._rows = rows
        self._hypers = tuple(hypers)
        for row, hyper in zip(self.hyper, hypers, strict=True):
            if isinstance(hyper.lr, Tensor):
                torch.mul(hyper.lr.reshape(()), hyper.lr_scale, out=row[LR])

    def _address_rows(self, seed: int) -> list[list[int]]:
        rows, first_block = [], 0
        for segment in self.segments:
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in segment.tensors]
            aligned = all(pointer % ALIGNMENT == 0 for pointer in pointers[:EXP_AVG_SCALE])
            rows.append([*pointers, segment.numel, first_block, int(aligned), seed_word(seed, segment.stream)])
            first_block += -(-segment.numel // BLOCK)
        return rows

    def _block_segment(self) -> Tensor:
        """Which segment each block belongs to: ``(num_blocks,)``, int32. Built where it is used."""
        counts = [-(-numel // BLOCK) for numel in self.numels]
        counted = self._staged(torch.tensor(counts)).to(self.device, non_blocking=True)
        return torch.repeat_interleave(
            torch.arange(len(counts), dtype=torch.int32, device=self.device), counted, output_size=self.num_blocks
        )

    def _staged(self, table: Tensor) -> Tensor:
        """``table`` in memory from which it can be copied to the device without waiting."""
        return table if self.device.type == "cpu" else table.pin_memory()


def capturing(device: torch.device) -> bool:
    """Whether launches are now being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def write_by_launches(table: Tensor, rows: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> None:
    """Write ``rows`` over ``before`` in ``table`` by kernels with the numbers as arguments.

    A captured copy would read host memory again at each replay.
    """
    for i, (row, old) in enumerate(zip(rows, before, strict=True)):
        for column, (new, known) in enumerate(zip(row, old, strict=True)):
            if new != known:
                table[i, column].fill_(new)


def layout_of(segment: Segment, name: str = "a segment") -> Layout:
    """The types of a segment, which messages call ``name``.

    Raises:
        ValueError: No kernel takes them, or there is one moment without the other.
    """
    if (segment.exp_avg is None) != (segment.exp_avg_sq is None):
        missing, there = ("exp_avg", "exp_avg_sq") if segment.exp_avg is None else ("exp_avg_sq", "exp_avg")
        raise ValueError(
            f"{name}: {there} is given and {missing} is None; give both moments, or neither for no moments"
        )
    first = None if segment.exp_avg is None else segment.exp_avg.dtype
    moments = _MOMENTS.get(first)
    weight = None if segment.weight is None else segment.weight.dtype
    if segment.in_place_fp32:
        weight, has_master = None, True
    else:
        has_master = segment.master is not None
    if moments is None:
        raise ValueError(f"moments are float32, bfloat16 or int8, or None, got {first}")
    if segment.grad.dtype not in (*_SIXTEEN_BIT, torch.float32):
        raise ValueError(f"gradients are bfloat16, float16 or float32, got {segment.grad.dtype}")
    if not has_master and weight != torch.bfloat16:
        raise ValueError(f"without a master copy weights are bfloat16 or float32, got {weight}")
    if has_master and moments == "bf16":
        raise ValueError("bfloat16 moments go with stochastic rounding, that is without a master copy")
    if weight not in (None, *_SIXTEEN_BIT, torch.float32):
        raise ValueError(f"weights are bfloat16, float16 or float32, got {weight}")
    return Layout(grad=segment.grad.dtype, weight=weight, has_master=has_master, moments=moments)


def seed_word(seed: int, stream: int) -> int:
    """The 64-bit seed of a segment's random numbers, as a signed integer; splitmix64 of both numbers."""
    word = (seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) & (2**64 - 1)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    word ^= word >> 31
    return word - 2**64 if word >= 2**63 else word


def _hyper_row(hyper: Hyper) -> list[float]:
    lr = 0.0 if isinstance(hyper.lr, Tensor) else hyper.lr * hyper.lr_scale
    beta1, beta2 = hyper.betas
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas are at least 0 and below 1, got {hyper.betas}")
    if not hyper.eps >= 0.0:
        raise ValueError(f"eps is at least 0, got {hyper.eps}")
    # 1 - beta and log(beta) in double precision: in fp32 the first bias corrections would be off by 1e-5.
    logs = [math.log(beta) if beta else -math.inf for beta in hyper.betas]
    return [lr, hyper.weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, hyper.eps, *logs, 0.0, 0.0, 0.0]


def _check(i: int, segment: Segment, layout: Layout, device: torch.device) -> None:
    found = layout_of(segment, f"segment {i}")
    if found != layout:
        raise ValueError(f"segment {i}: all segments of a launch share their types, got {found} and {layout}")
    scales = -(-segment.numel // QUANT_BLOCK) if layout.moments == "int8" else None
    moments = None if layout.moments == "none" else segment.numel
    expected = {
        "weight": segment.numel,
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "master": segment.numel,
        "exp_avg_scale": scales,
        "exp_avg_sq_scale": scales,
        "step": 1,
    }
    for name, numel in expected.items():
        tensor: Tensor | None = getattr(segment, name)
        if name in ("weight", "master") and tensor is None:
            continue
        if (tensor is None) != (numel is None):
            raise ValueError(f"segment {i}: scales go with int8 moments, and int8 moments with scales")
        if tensor is not None and tensor.numel() != numel:
            raise ValueError(f"segment {i}: {name} has {tensor.numel()} elements, should have {numel}")
    types = {"master": torch.float32, "step": torch.float32}
    if segment.exp_avg is not None:
        types["exp_avg_sq"] = torch.uint8 if layout.moments == "int8" else segment.exp_avg.dtype
    types |= dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), torch.float32)
    for name in ("weight", "grad", "exp_avg", *types):
        tensor = getattr(segment, name)
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"segment {i}: {name} is on {tensor.device}, the launch on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"segment {i}: {name} is not contiguous")
        if name in types and tensor.dtype != types[name]:
            raise ValueError(f"segment {i}: {name} should be {types[name]}, got {tensor.dtype}")
