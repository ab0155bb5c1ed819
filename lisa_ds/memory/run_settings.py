"""The settings of a run that decide its memory, and the forecast: bytes of each phase, by part."""

from __future__ import annotations

from dataclasses import dataclass, field

from lisa_ds.config import GaloreConfig, LisaConfig, LoraConfig
from lisa_ds.config.deepspeed import gradient_bytes
from lisa_ds.memory.gather import GatherSettings

PARTS = (
    *("weights", "gradients", "master", "moments"),
    *("buckets", "gathered", "prefetched", "activations", "logits", "gradients in flight", "scratch"),
)
"""Parts of a phase's bytes: first model state, which stays, then what is temporary."""


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that decide its memory; :func:`lisa_ds.memory.settings.from_run` reads them."""

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
    """For a width of 2: whether they are bf16, not fp16."""

    gradient_asked: int | None = None
    """Bytes of the DeepSpeed config's ``grad_accum_dtype``; None if it has none."""

    accumulation: int = 1
    """Micro-batches of a step."""

    checkpointing: bool = False
    fused_loss: bool = False
    """Whether Liger computes head and loss together, if it supports the model."""

    bucket_size: int | None = None
    """Elements of the reduce bucket; None for the engine's own choice."""

    overlap_comm: bool = False
    """Whether buckets are reduced while backward goes on, for which ZeRO-2 has two of them."""

    gather: GatherSettings = field(default_factory=GatherSettings)
    offload_optimizer: bool = False
    offload_param: bool = False
    tensor_parallel: int = 1
    second_copies: int = 1
    """Number of ranks over which hpZ partitions its second copy of every weight; 1 without hpZ."""

    on_cpu: bool = False
    """Whether ranks compute on CPUs, where tensors that DeepSpeed moves to the host during setup count, too."""

    sub_group_size: int = 1_000_000_000
    lora: LoraConfig = field(default_factory=LoraConfig)
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    stage: int = 3
    """ZeRO stage of LoRA; LISA and full fine-tuning have 3, GaLore none."""

    @property
    def gradient_width(self) -> int:
        """Bytes per element of the accumulated gradient."""
        return gradient_bytes(
            self.gradient_asked, self.width, accumulates=self.accumulation > 1, lisa=self.method == "lisa"
        )

    @property
    def tokens(self) -> int:
        """Tokens of a rank's micro-batch."""
        return self.micro_batch * self.sequence


@dataclass(frozen=True)
class Forecast:
    """Bytes on one rank."""

    phases: dict[str, dict[str, int]]
    """Each phase's peak on the device, by part; see :data:`PARTS`."""

    host: dict[str, int]
    """What stays on the host, by part (offload), and what rank 0 gathers there for an export."""

    @property
    def peak(self) -> int:
        """The most bytes of all phases."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase that takes them."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))
