"""Stage c of the GPU proof: time of a masked AdamW step in every format, beside a copy of its traffic and other implementations.

All variants run interleaved in one process, as in benchmarks/masked_adamw.py, which has most of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from benchmarks.gpu_claims import Claim, Report, at_least
from benchmarks.masked_adamw import BYTES, SEGMENTS, Step, measure, variants
from lisa_ds import records
from lisa_ds.ops import unavailable

OURS = ("fp32", "mixed", "sr_fp32_moments", "sr_16bit", "int8_master", "int8_sr")
UNCLAIMED = ("none_master", "none_sr")  # measured as well, and held to nothing: they have not run on a GPU yet
BACKENDS = ("triton", "cuda")
OF_ROOFLINE = {
    (backend, name): at_least("c", f"{backend}, {name}: share of a copy's bandwidth", 0.85 if BYTES[name] > 20 else 0.7)
    for backend in BACKENDS
    for name in OURS
}
OF_PEERS = {
    "torch_fused": at_least("c", "fp32 against torch's fused AdamW", 1.0, "times as fast"),
    "deepspeed_fused_adam": at_least("c", "fp32 against DeepSpeed's FusedAdam", 1.0, "times as fast"),
}
FEW = at_least("c", "2 of 32 segments against all of them", 12, "times as fast")
CLAIMS: list[Claim] = [*OF_ROOFLINE.values(), *OF_PEERS.values(), FEW]


def main() -> None:
    """Measure, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="a few thousand elements on the CPU")
    parser.add_argument("--limit-s", type=float, default=60)
    arguments = parser.parse_args()
    report = Report(arguments.out, "c", dry_run=arguments.dry_run)
    device = "cpu" if arguments.dry_run else "cuda"
    numel = 2**15 if arguments.dry_run else 2**29
    # A GPU is measured while it has nothing else to do; here it is only seen that everything runs.
    rounds, threads = (2, 0) if arguments.dry_run else (50, 1)
    steps: dict[str, Step] = {}
    with report.part("variants"):
        steps |= {"copy": _copy(numel, device)}
        steps |= {f"triton {name}" if name in (*OURS, *UNCLAIMED, "mixed_2_of_32") else name: made
                  for name, made in variants(numel, device, _known(device)).items()}  # fmt: skip
    with report.part("cuda"):
        if device == "cuda" and (reason := unavailable("cuda")) is not None:
            raise RuntimeError(reason)
        chosen = "cuda" if device == "cuda" else None
        names = [*OURS, *UNCLAIMED]
        steps |= {f"cuda {name}": made for name, made in variants(numel, device, names, backend=chosen).items()}
    with report.part("FusedAdam"):
        if device == "cuda":
            steps["deepspeed_fused_adam"] = _deepspeed_fused_adam(numel)
    start = time.monotonic()
    times = measure(steps, rounds, device, threads)
    print(f"measured in {time.monotonic() - start:.0f} s", file=sys.stderr)
    value = {}
    for name, samples in times.items():
        bytes_moved = 28 if name in ("copy", "deepspeed_fused_adam") else BYTES[name.partition(" ")[2] or name]
        rates = [bytes_moved * numel / seconds / 1e9 for seconds in samples]
        value[name] = sorted(rates)[len(rates) // 2]
        settings = {"bytes_per_element": bytes_moved, "numel": numel, "rounds": rounds}
        report.write("traffic", name, 0, "GB/s", rates, **settings)
        report.write("step_time", name, 0, "ns per element", [1e9 * seconds / numel for seconds in samples], **settings)
    for (backend, name), claim in OF_ROOFLINE.items():
        if f"{backend} {name}" in value:
            report.judge(claim, value[f"{backend} {name}"] / value["copy"])
    for name, claim in OF_PEERS.items():
        if name in value:
            report.judge(claim, value["triton fp32"] / value[name], "times as fast")  # both move the same bytes
    few, every = (sorted(times[f"triton {name}"])[rounds // 2] for name in ("mixed_2_of_32", "mixed"))
    report.judge(FEW, every / few, "times as fast", segments=SEGMENTS)


def _known(device: str) -> list[str]:
    return [name for name in BYTES if not name.startswith("deepspeed") and (device == "cuda" or name != "probe")]


def _copy(numel: int, device: str) -> Step:
    """Moves 28 bytes an element, half of them read."""
    source = torch.zeros(14 * numel, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _deepspeed_fused_adam(numel: int) -> Step:
    from deepspeed.ops.adam import FusedAdam

    leaf = torch.nn.Parameter(torch.randn(numel, device="cuda"))
    leaf.grad = torch.randn(numel, device="cuda").mul_(1e-3)
    step: Step = FusedAdam([leaf], lr=1e-8, weight_decay=0.1).step
    return step


def table(found: Sequence[records.Record]) -> list[str]:
    """A line of Markdown for every variant."""
    of = {(record.name, record.variant): record for record in found}
    lines = ["| | GB/s | of a copy | ns for an element | bytes |", "|---|---|---|---|---|"]
    for (name, variant), record in of.items():
        if name == "traffic":
            copy, time_of = of["traffic", "copy"].value, of["step_time", variant]
            lines.append(
                f"| {variant} | {record.value:.0f} | {record.value / copy:.2f} "
                f"| {time_of.value:.5f} ({time_of.low:.5f} to {time_of.high:.5f}) | {record.settings['bytes_per_element']:g} |"
            )
    return lines


if __name__ == "__main__":
    main()
