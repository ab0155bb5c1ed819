"""What of a run decides its memory, and what is planned of it: the bytes of each phase, by part."""

from __future__ import annotations

from dataclasses import dataclass, field

from lisa_ds.config import LisaConfig
from lisa_ds.config.deepspeed import gradient_bytes
from lisa_ds.memory.gather import GatherSettings

PARTS = (
    *("weights", "gradients", "master", "moments"),
    *("buckets", "gathered", "prefetched", "activations", "logits", "gradients in flight", "scratch"),
)
"""What the bytes of a phase are: model state that stays, then what comes and goes."""


@dataclass(frozen=True)
class RunSettings:
    """What of a run decides its memory. See :func:`lisa_ds.memory.settings.from_run` for where it is read."""

    world_size: int
    """Ranks that share the state: all ranks, or those of one tensor-parallel share."""

    micro_batch: int = 8
    sequence: int = 1024
    """Tokens of a row; a batch is planned as full of them."""

    method: str = "lisa"
    """One of :data:`lisa_ds.memory.methods.METHODS`."""

    lisa: LisaConfig = field(default_factory=LisaConfig)
    width: int = 2
    """Bytes of an element of weights and activations."""

    bf16: bool = True
    """Of 2: whether they are bf16, not fp16."""

    gradient_asked: int | None = None
    """Bytes of the type that the DeepSpeed config asks gradients to be added up in; None if it asks for none."""

    accumulation: int = 1
    """Micro-batches of a step."""

    checkpointing: bool = False
    fused_loss: bool = False
    """Whether Liger computes head and loss together, of a model that it knows."""

    bucket_size: int | None = None
    """Elements of the reduce bucket; None for the engine's own choice."""

    gather: GatherSettings = field(default_factory=GatherSettings)
    offload_optimizer: bool = False
    offload_param: bool = False
    tensor_parallel: int = 1
    second_copies: int = 1
    """In how many parts hpZ keeps every weight a second time; 1 for not at all."""

    on_cpu: bool = False
    """Whether ranks compute on CPUs, where what DeepSpeed moves to the host while it builds counts, too."""

    sub_group_size: int = 1_000_000_000
    lora_rank: int = 16
    galore_rank: int = 256

    @property
    def gradient_width(self) -> int:
        """Bytes of an element of the gradient that waits for the step."""
        return gradient_bytes(
            self.gradient_asked, self.width, accumulates=self.accumulation > 1, lisa=self.method == "lisa"
        )

    @property
    def tokens(self) -> int:
        """In a rank's micro-batch."""
        return self.micro_batch * self.sequence


@dataclass(frozen=True)
class Forecast:
    """Bytes on one rank."""

    phases: dict[str, dict[str, int]]
    """Each phase's peak on the device, by part; see :data:`PARTS`."""

    host: dict[str, int]
    """What stays on the host, by part (offload), and what rank 0 collects there for an export."""

    @property
    def peak(self) -> int:
        """The most bytes of all phases."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase that takes them."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))
