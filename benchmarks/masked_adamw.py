"""Time of one masked AdamW step, for every mode, beside a memory probe of the same traffic and beside other implementations.

Usage: python benchmarks/masked_adamw.py --out docs/results/masked_adamw.jsonl [--figure docs/results/masked_adamw.png]

All variants run interleaved in one process. On the CPU a sample counts only if all threads had a core for the whole of it
(CPU time / wall time), so that other work on the machine drops samples instead of distorting them. A record's value is the median
time over the elements of the model: for `mixed_2_of_32`, which updates 2 of 32 equal segments, too.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lisa_ds import ops, records
from lisa_ds.config.formats import QUANT_BLOCK
from lisa_ds.ops import Hyper, Segment, SegmentTable

BYTES = {  # read and written for an element
    "probe": 28,
    "torch_fused": 28,
    "deepspeed_cpu_adam": 28,
    "deepspeed_pipeline": 48,
    "fp32": 28,
    "mixed": 28,
    "sr_fp32_moments": 22,
    "sr_16bit": 14,
    "int8_master": 16,
    "int8_sr": 10,
    "none_master": 12,
    "none_sr": 6,
    "mixed_2_of_32": 28 / 16,
}
OTHERS = ("probe", "torch_fused", "deepspeed_cpu_adam", "deepspeed_pipeline")
LABELS = {  # in the figure
    "probe": "memory probe: 4 arrays read, 3 written",
    "torch_fused": "torch AdamW, fused: fp32",
    "deepspeed_cpu_adam": "DeepSpeedCPUAdam: fp32",
    "deepspeed_pipeline": "cast, scale, DeepSpeedCPUAdam, cast: bf16",
    "fp32": "fp32",
    "mixed": "bf16, fp32 master and moments",
    "sr_fp32_moments": "bf16, fp32 moments, no master",
    "sr_16bit": "bf16, bf16 moments, no master",
    "int8_master": "bf16, fp32 master, 8-bit moments",
    "int8_sr": "bf16, 8-bit moments, no master",
    "none_master": "bf16, fp32 master, no moments",
    "none_sr": "bf16, no master, no moments",
    "mixed_2_of_32": "bf16, fp32 master and moments, 2 of 32 layers",
}
SEGMENTS = 32
CLEAN = 0.975  # of the threads' time must have been spent computing
Step = Callable[[], object]


def main() -> None:
    """Measure, print, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; replaced if it exists")
    parser.add_argument("--figure", type=Path, help="also draw the records")
    parser.add_argument("--numel", type=int, default=3 * 2**24, help="elements of the model (50.3M)")
    parser.add_argument(
        "--rounds", type=int, default=60, help="samples of each variant, before unclean ones are dropped"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=BYTES, help="these variants; default: all that can run here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = variants(arguments.numel - arguments.numel % (SEGMENTS * QUANT_BLOCK), device, arguments.only)
    times = measure(steps, arguments.rounds, device, arguments.threads)
    arguments.out.unlink(missing_ok=True)
    measured = []
    for name, samples in times.items():
        if not samples:
            sys.exit(f"{name}: no clean sample in {arguments.rounds} rounds; the machine is too busy to measure on")
        spread = records.spread([1e9 * sample / arguments.numel for sample in samples])
        record = records.Record(
            name="masked_adamw",
            variant=name,
            value=spread.value,
            low=spread.low,
            high=spread.high,
            n=spread.n,
            unit="ns per element",
            device=torch.cuda.get_device_name() if device == "cuda" else f"CPU, {arguments.threads} threads",
            commit=records.commit(),
            versions=records.versions(),
            settings={"numel": arguments.numel, "bytes_per_element": BYTES[name], "rounds": arguments.rounds},
        )
        records.append(arguments.out, record)
        measured.append(record)
    print(table(measured))
    if arguments.figure:
        draw(measured, arguments.figure)


def variants(numel: int, device: str, only: list[str] | None, backend: ops.Backend | None = None) -> dict[str, Step]:
    """The steps to time, by name, over tensors that they share: what they compute does not matter."""
    wanted = set(only or BYTES)
    cuda = device == "cuda"
    torch.manual_seed(0)

    def floats(scale: float = 1.0) -> Tensor:
        return torch.randn(numel, device=device).mul_(scale)

    parameter, gradient, exp_avg, exp_avg_sq = floats(), floats(1e-3), floats(1e-4), floats(1e-3).square_()
    weight, gradient16 = parameter.bfloat16(), gradient.bfloat16()
    moments16 = (exp_avg.bfloat16(), exp_avg_sq.bfloat16())
    codes = (torch.zeros(numel, dtype=torch.int8, device=device), torch.zeros(numel, dtype=torch.uint8, device=device))
    scales = (torch.zeros(numel // QUANT_BLOCK, device=device), torch.zeros(numel // QUANT_BLOCK, device=device))

    def ours(
        *, grad: Tensor, moments: tuple[Tensor, Tensor] | None, only: int = SEGMENTS, **tensors: Tensor | None
    ) -> Step:
        size = numel // SEGMENTS
        segments = []
        for i in range(only):
            cut = slice(i * size, (i + 1) * size)
            segments.append(
                Segment(
                    grad=grad[cut],
                    exp_avg=None if moments is None else moments[0][cut],
                    exp_avg_sq=None if moments is None else moments[1][cut],
                    exp_avg_scale=scales[0][i * size // QUANT_BLOCK : (i + 1) * size // QUANT_BLOCK]
                    if moments is codes
                    else None,
                    exp_avg_sq_scale=scales[1][i * size // QUANT_BLOCK : (i + 1) * size // QUANT_BLOCK]
                    if moments is codes
                    else None,
                    step=torch.tensor(10.0, device=device),
                    weight=None if tensors["weight"] is None else tensors["weight"][cut],
                    master=None if tensors.get("master") is None else tensors["master"][cut],  # type: ignore[index]
                    stream=i,
                )
            )
        # A rate so low that weights stay what they are however often it runs.
        launch = SegmentTable(segments, [Hyper(lr=1e-8, weight_decay=0.1)] * len(segments))
        return lambda: ops.masked_adamw_(launch, backend=backend)

    fp32 = (exp_avg, exp_avg_sq)
    made: dict[str, Callable[[], Step]] = {
        "probe": lambda: gpu_probe(parameter, gradient, *fp32) if cuda else cpu_probe(parameter, gradient, *fp32),
        "torch_fused": lambda: torch_fused(parameter, gradient),
        "deepspeed_cpu_adam": lambda: deepspeed_cpu_adam(parameter, gradient),
        "deepspeed_pipeline": lambda: deepspeed_pipeline(parameter, weight, gradient16),
        "fp32": lambda: ours(weight=parameter, grad=gradient, moments=fp32),
        "mixed": lambda: ours(weight=weight, grad=gradient16, master=parameter, moments=fp32),
        "sr_fp32_moments": lambda: ours(weight=weight, grad=gradient16, moments=fp32),
        "sr_16bit": lambda: ours(weight=weight, grad=gradient16, moments=moments16),
        "int8_master": lambda: ours(weight=weight, grad=gradient16, master=parameter, moments=codes),
        "int8_sr": lambda: ours(weight=weight, grad=gradient16, moments=codes),
        "none_master": lambda: ours(weight=weight, grad=gradient16, master=parameter, moments=None),
        "none_sr": lambda: ours(weight=weight, grad=gradient16, moments=None),
        "mixed_2_of_32": lambda: ours(weight=weight, grad=gradient16, master=parameter, moments=fp32, only=2),
    }
    if cuda:
        del made["deepspeed_cpu_adam"], made["deepspeed_pipeline"]
    return {name: make() for name, make in made.items() if name in wanted}


def cpu_probe(*tensors: Tensor) -> Step:
    """Four arrays read, three written, compiled for this machine."""
    folder = Path(tempfile.mkdtemp())
    source, library = Path(__file__).with_name("memory_probe.cpp"), folder / "memory_probe.so"
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    function = ctypes.CDLL(str(library)).memory_probe
    threads = ctypes.c_int(torch.get_num_threads())

    def probe() -> None:  # holds the tensors, whose memory it is
        function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_int64(tensors[0].numel()), threads)

    return probe


def gpu_probe(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Step:
    """The same by Triton."""
    import triton
    from gpu_probe import traffic  # beside this script

    grid = (triton.cdiv(a.numel(), 2048),)
    return lambda: traffic[grid](a, b, c, d, a.numel(), BLOCK=2048, num_warps=8)


def torch_fused(parameter: Tensor, gradient: Tensor) -> Step:
    """``torch.optim.AdamW(fused=True)``, fp32."""
    leaf = torch.nn.Parameter(parameter)
    leaf.grad = gradient
    optimizer = torch.optim.AdamW([leaf], lr=1e-8, weight_decay=0.1, fused=True)
    return optimizer.step


def deepspeed_cpu_adam(parameter: Tensor, gradient: Tensor) -> Step:
    """``DeepSpeedCPUAdam``, fp32."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    leaf = torch.nn.Parameter(parameter)
    leaf.grad = gradient
    optimizer = DeepSpeedCPUAdam([leaf], lr=1e-8, weight_decay=0.1)
    return optimizer.step


def deepspeed_pipeline(master: Tensor, weight: Tensor, gradient16: Tensor) -> Step:
    """What a ZeRO step does for one sub-group: cast the gradient, scale it, step, cast the weight."""
    gradient = torch.empty_like(master)
    step = deepspeed_cpu_adam(master, gradient)

    def passes() -> None:
        gradient.copy_(gradient16)
        gradient.mul_(0.5)
        step()
        weight.copy_(master)

    return passes


def measure(steps: dict[str, Step], rounds: int, device: str, threads: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each clean sample, by variant. One sample of each variant a round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-warmup, rounds):
        for name, step in steps.items():
            seconds, clean = timed_on_gpu(step) if device == "cuda" else timed_on_cpu(step, threads)
            if index >= 0 and clean:
                times[name].append(seconds)
        if index >= 0 and (index + 1) % 10 == 0:
            kept = min(len(samples) for samples in times.values())
            print(f"round {index + 1} of {rounds}: {kept} clean samples of each variant at least", file=sys.stderr)
    return times


def timed_on_cpu(step: Step, threads: int) -> tuple[float, bool]:
    """Wall seconds, and whether every thread ran all the time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    step()
    seconds, busy = time.perf_counter() - start, time.process_time() - start_cpu
    return seconds, busy >= CLEAN * threads * seconds


def timed_on_gpu(step: Step) -> tuple[float, bool]:
    """Seconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, True


def table(measured: list[records.Record]) -> str:
    """Times, spread, and how they compare."""
    value = {record.variant: record.value for record in measured}
    lines = [
        f"{'variant':20} {'ns/element':>10} {'20 %':>7} {'80 %':>7} {'n':>4} {'B/el':>6} {'x probe':>8} {'x mixed':>8}"
    ]
    for r in measured:
        faster = [f"{value[base] / r.value:8.2f}" if base in value else "       -" for base in ("probe", "mixed")]
        lines.append(
            f"{r.variant:20} {r.value:10.4f} {r.low:7.4f} {r.high:7.4f} {r.n:4} {BYTES[r.variant]:6.4g} {' '.join(faster)}"
        )
    return "\n".join(lines)


def draw(measured: list[records.Record], path: Path) -> None:
    """Bars of time per element with the 20-80 % band, and the bytes each variant moves."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    shown = list(reversed(measured))
    labels = [LABELS.get(record.variant, record.variant) for record in shown]
    values = [record.value for record in shown]
    lows, highs = ([getattr(record, end) or record.value for record in shown] for end in ("low", "high"))
    spread = [
        [v - low for v, low in zip(values, lows, strict=True)],
        [h - v for v, h in zip(values, highs, strict=True)],
    ]
    colors = ["tab:gray" if record.variant in OTHERS else "tab:blue" for record in shown]
    axes.barh(labels, values, xerr=spread, color=colors, capsize=2)
    for record, label, high in zip(shown, labels, highs, strict=True):
        # Behind the whisker.
        about = (high, label), (5, 0)
        text = f"{BYTES[record.variant]:.3g} B"
        axes.annotate(text, *about, textcoords="offset points", va="center", fontsize=8)
    axes.set(
        xlabel=f"{measured[0].unit}: median, 20 to 80 % (bytes moved beside each bar)",
        title=f"One AdamW step, {measured[0].device}",
    )
    axes.set_xlim(0, 1.12 * max(highs))
    parts = [Patch(color="tab:blue", label="lisa_ds"), Patch(color="tab:gray", label="others")]
    figure.legend(handles=parts, loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
