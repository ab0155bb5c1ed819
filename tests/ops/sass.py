"""Compiles the Triton kernels for GPUs that are not here, and reads what came out: registers, spills, memory accesses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "addresses": "*i64",
    "hyper": "*fp32",
    "block_segment": "*i32",
    "factor_at": "*fp32",
    "found_inf_at": "*fp32",
    "partial": "*fp32",
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on one architecture."""

    registers: int
    stack: int
    local: int
    spills: int
    accesses: Counter[str]
    """Loads and stores of global memory by opcode, on the path of whole, aligned blocks."""

    all_accesses: Counter[str]
    """The same of the whole kernel, spills included."""


def compile_kernel(kernel: Any, constants: dict[str, object], arch: int | str, num_warps: int = 8) -> Any:
    """``kernel`` for compute capability ``arch`` (90), or for an AMD architecture (``gfx942``)."""
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    names = kernel.arg_names
    signature = {name: POINTERS.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": True})


def examine_nvidia(kernel: Any) -> Compiled:
    """Registers from the cubin, accesses from its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    blocks = _basic_blocks(listing)
    everything = sum((block.accesses for block in blocks.values()), Counter[str]())
    spills = sum(count for opcode, count in everything.items() if opcode.startswith(("LDL", "STL")))
    return Compiled(registers, stack, local, spills, _wide_path(blocks), everything)


def examine_amd(kernel: Any) -> Compiled:
    """The same from the assembly that carries its own metadata."""
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found, key
        return int(found[1])

    accesses = Counter(re.findall(r"((?:global|buffer)_(?:load|store)_\w+)", text))
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    scratch = number("private_segment_fixed_size")
    return Compiled(number("vgpr_count"), scratch, scratch, spills, accesses, accesses)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


@dataclass
class _Block:
    accesses: Counter[str]
    successors: list[str]


def _basic_blocks(listing: str) -> dict[str, _Block]:
    """The blocks of a disassembly by label, in order; those that begin behind a branch get a name of their own."""
    blocks = {"entry": _Block(Counter(), [])}
    block, fresh = blocks["entry"], 0
    for line in listing.splitlines():
        label = re.match(r"(\.L\S*):", line.strip())
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if label:
            if block is not None:
                block.successors.append(label[1])
            block = blocks.setdefault(label[1], _Block(Counter(), []))
        elif code:
            if block is None:  # behind a branch that is always taken, and without a label: padding
                continue
            predicate, opcode, rest = code.groups()
            if opcode.startswith(("LDG", "STG", "LDL", "STL")):
                block.accesses[opcode] += 1
            if opcode.startswith(("BRA", "EXIT", "RET")):
                target = re.search(r"\((\.L\S*?)\)", rest)
                if target:
                    block.successors.append(target[1])
                if predicate or re.match(r"\s*!?U?P\d", rest):
                    fresh += 1
                    block.successors.append(f"behind {fresh}")
                    block = blocks[f"behind {fresh}"] = _Block(Counter(), [])
                else:
                    block = None
    return blocks


def _wide_path(blocks: dict[str, _Block]) -> Counter[str]:
    """Accesses of all blocks that lie on a way from one 128-bit access to another: only whole, aligned blocks have such."""
    wide = {name for name, block in blocks.items() if any(op.endswith(".128") for op in block.accesses)}
    after = _reachable(wide, {name: block.successors for name, block in blocks.items()})
    predecessors: dict[str, list[str]] = {name: [] for name in blocks}
    for name, block in blocks.items():
        for successor in block.successors:
            predecessors.setdefault(successor, []).append(name)
    before = _reachable(wide, predecessors)
    path = wide | (after & before)
    return sum((blocks[name].accesses for name in path if name in blocks), Counter[str]())


def _reachable(start: set[str], edges: dict[str, list[str]]) -> set[str]:
    seen, todo = set[str](), list(start)
    while todo:
        for name in edges.get(todo.pop(), []):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen
