"""One rank of many, for real: every tensor it would hold, in memory, through a step and a switch; the other ranks are imagined.

Usage: python benchmarks/simulate_rank.py --model meta-llama/Llama-3.1-70B --world-size 64 --out records.jsonl

The process group is torch's fake one: it says that there are so many ranks, and its collectives do nothing. So the engine lays
out, allocates, steps and switches as rank `--rank` of `--world-size`, but no gradient and no weight means anything: weights are
a constant, gradients random. Counted are the bytes of live tensors, beside what the planner says from the config alone, and
the memory the process really holds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lisa_ds import LisaConfig, LisaError, records
from lisa_ds.config.files import parse_yaml, read_mapping
from lisa_ds.memory import KINDS, Architecture, ModelShape, Precision, full_state_bytes, state_bytes
from lisa_ds.memory.catalogue import require

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What decides no size, and is not in the catalogue for that reason.
_REST_OF_CONFIG: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-70b-hf": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "meta-llama/Llama-3.1-70B": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3_ROPE,
    },
}
_M_MMAP_THRESHOLD = -3  # of mallopt
_NO_MOMENTS = {"exp_avg": 0, "exp_avg_sq": 0}


def main() -> None:
    """Build, step, switch, step; print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a public model's hub name, or a config.json")
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0, help="which one; the last has the padding")
    parser.add_argument(
        "--method", choices=["lisa", "full"], default="lisa", help="full: stock ZeRO-3, everything trains"
    )
    parser.add_argument("--lisa", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the LISA section")
    parser.add_argument("--out", type=Path, help="JSON lines; appended to")
    arguments = parser.parse_args()
    try:
        config = json.loads(json.dumps(_config_of(arguments.model)))
        lisa = LisaConfig.load({"num_sampled_layers": 2, "interval_steps": 10**9, **_overrides(arguments.lisa)})
        shape = Architecture.from_config(config, arguments.model).shape
    except LisaError as error:
        sys.exit(f"error: {error}")
    give_back_what_is_freed()
    imagine_ranks(arguments.rank, arguments.world_size)
    with torch.device("meta"):
        from_config(config)  # imports what it takes: code is no part of what is measured
    baseline = resident()
    start = time.perf_counter()
    phases = list(run(arguments.method, config, lisa, shape, arguments.world_size))
    seconds = time.perf_counter() - start
    held = {"resident": resident() - baseline, "peak_resident": peak_resident() - baseline}
    report(arguments, phases, held, seconds)
    if any(live != planned for _, live, planned in phases):
        sys.exit("live bytes differ from the plan")


def _config_of(name: str) -> dict[str, Any]:
    if Path(name).is_file():
        return read_mapping(name)
    return {**require(name), **_REST_OF_CONFIG.get(name, {})}


def _overrides(pairs: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        *sections, last = key.split(".")
        section = fields
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = parse_yaml(value)
    return fields


def give_back_what_is_freed() -> None:
    """Have glibc map every larger tensor on its own: freed, it is given back, and resident memory is what is alive."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


def imagine_ranks(rank: int, world_size: int) -> None:
    """A process group of ``world_size`` ranks, all but this one imagined."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # nobody connects
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    import deepspeed  # it asks for the process group

    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, dist_init_required=False, verbose=False)


def run(
    method: str, config: Mapping[str, Any], lisa: LisaConfig, shape: ModelShape, world_size: int
) -> Iterator[tuple[str, dict[str, int], dict[str, int]]]:
    """Live and planned bytes of each kind, when the engine is built, after a step, after a switch, after a step again."""
    model = build_model(config)
    engine = build_engine(method, model, lisa)
    precision = precision_of(engine, lisa if method == "lisa" else None)

    def planned(sampled: Any) -> dict[str, int]:
        if method == "full":
            return full_state_bytes(shape, world_size=world_size, precision=precision)
        return state_bytes(shape, sampled=sampled, world_size=world_size, config=lisa, precision=precision)

    def live() -> dict[str, int]:
        from lisa_ds.engines.zero3.watch.memory_report import memory_report

        return memory_report(engine.optimizer, engine.module.parameters())

    first = () if method == "full" else engine.sampled_layers
    yield "built", live(), planned(first) | _NO_MOMENTS
    step(engine)
    yield "after a step", live(), planned(first)
    if method == "full":
        return
    count = len(shape.layers)
    second = tuple(sorted((layer + 1) % count for layer in first))
    stay = set(first) & set(second)
    engine.switch_to(second)
    # Moments come with a step: those of the blocks that left are gone, those of the new ones not there yet.
    yield "after a switch", live(), planned(second) | {kind: planned(stay)[kind] for kind in _NO_MOMENTS}
    step(engine)
    yield "after the next step", live(), planned(second)


def from_config(config: Mapping[str, Any]) -> Any:
    """The causal language model of a ``config.json``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields), dtype=torch.bfloat16)


def build_model(config: Mapping[str, Any]) -> Any:
    """The model in bf16, partitioned as it is built; nothing is drawn at random, every partition is written to."""
    import deepspeed
    from transformers.initialization import no_init_weights

    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=DEEPSPEED, dtype=torch.bfloat16):
        model = from_config(config)
    model.tie_weights()  # which goes by the board with drawing them
    for parameter in model.parameters():
        parameter.ds_tensor.fill_(0.01)
    return model


DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3},
    "steps_per_print": None,
}


def build_engine(method: str, model: Any, lisa: LisaConfig) -> Any:
    """LISA's engine over ``model``, or DeepSpeed's own; its reduce buckets are written to, too."""
    import deepspeed

    import lisa_ds

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if method == "lisa":
        engine, *_ = lisa_ds.initialize(model=model, optimizer=optimizer, config=DEEPSPEED, lisa_config=lisa)
    else:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)
    for bucket in engine.optimizer.ipg_buckets.values():
        bucket.buffer.zero_()
    return engine


def step(engine: Any) -> None:
    """One step of the optimizer on random gradients, as if they had been reduced."""
    from lisa_ds.engines.zero3 import supported

    optimizer = engine.optimizer
    gradients = getattr(optimizer, supported.GRAD_PARTITIONS)
    for gradient in gradients.values():
        gradient.normal_()
    # Where stock ZeRO-3 looks for them; LISA's step reads the buffer they are slices of.
    optimizer.averaged_gradients = {
        position: [gradients[parameter.ds_id] for parameter in group]
        for position, group in enumerate(optimizer.fp16_groups)
    }
    optimizer.step()


def precision_of(engine: Any, lisa: LisaConfig | None) -> Precision:
    """Bytes of an element of each kind in ``engine``."""
    weight, gradient = engine.get_data_types()
    optimizer = LisaConfig().optimizer if lisa is None else lisa.optimizer
    return Precision(
        weight_bytes=weight.itemsize,
        gradient_bytes=gradient.itemsize,
        bucket_bytes=engine.zero_reduce_bucket_size() * weight.itemsize,
        master_bytes=4 if optimizer.precision == "mixed" else 0,
        moments=optimizer.moments,
    )


def report(arguments: Any, phases: list[Any], held: Mapping[str, int], seconds: float) -> None:
    """Print every kind of every phase, and append the records."""
    settings = {
        "model": arguments.model,
        "rank": arguments.rank,
        "lisa": arguments.lisa,
        "process_group": "fake",
        "weights": "bf16",
    }

    def record(name: str, variant: str, value: float, unit: str, **more: Any) -> None:
        if arguments.out is not None:
            records.append(
                arguments.out,
                records.Record(
                    name=name,
                    variant=variant,
                    value=value,
                    unit=unit,
                    device="CPU",
                    commit=records.commit(),
                    versions=records.versions(),
                    x=arguments.world_size,
                    x_label="ranks",
                    settings=settings | more,
                ),
            )

    print(f"{arguments.model}, {arguments.method}, rank {arguments.rank} of {arguments.world_size}; bytes on this rank")
    for phase, live, planned in phases:
        print(f"  {phase}")
        for kind in KINDS:
            if live[kind] or planned[kind]:
                print(f"    {kind:12} live {live[kind]:15,}  planned {planned[kind]:15,}")
            record(f"simulated_bytes/{kind}", arguments.method, live[kind], "bytes", phase=phase, planned=planned[kind])
    alive = sum(phases[-1][1].values())
    print(f"  alive {alive:,}; the process has grown by {held['resident']:,}, at its peak by {held['peak_resident']:,}")
    print(f"  {seconds:.1f} s")
    for name, value in held.items():
        record(f"simulated_{name}", arguments.method, value, "bytes", alive=alive)


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most of it so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
