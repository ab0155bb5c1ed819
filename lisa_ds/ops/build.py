"""Compiles the kernels in ``csrc/``: at first use into the machine's cache, or ahead of time by ``setup.py``.

Nothing is tuned to the machine that builds: the CPU kernels choose their instruction set when they run, and the CUDA ones hold
code for several architectures. This module imports nothing outside the standard library before it is asked to build, since
``setup.py`` loads it where nothing else may be installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CUDA_ARCHITECTURES = ("80", "90", "100")
"""Compute capabilities that the CUDA library holds machine code for; newer ones compile its PTX when they load it.

``TORCH_CUDA_ARCH_LIST``, as torch and DeepSpeed read it (``9.0`` or ``8.0;9.0+PTX``), names others: fewer compile faster.
"""

_HERE = Path(__file__).resolve().parent
_X86_LEVELS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma",
    "avx2": "-mavx2 -mfma -mf16c",
}
# -ffp-contract: fused multiply-adds, as torch's kernels use them. -fno-math-errno, -fno-trapping-math: packed square roots.
_CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall"
)


class BuildError(Exception):
    """Why a library cannot be built here, in one line."""


def sources() -> Path:
    """The directory ``csrc``: beside the package in a checkout, inside it when installed."""
    for place in (_HERE.parent / "csrc", _HERE.parent.parent / "csrc"):
        if (place / "cpu").is_dir():
            return place
    raise BuildError(f"csrc is neither in {_HERE.parent} nor beside it; install lisa_ds anew")


def library_name(kind: Kind) -> str:
    """File name of a library."""
    return f"masked_adamw_{kind}.so"


def prebuilt(kind: Kind) -> Path | None:
    """The library that was built ahead of time, if it was."""
    path = _HERE / library_name(kind)
    return path if path.is_file() else None


def library(kind: Kind) -> Path:
    """The compiled library: built ahead of time, or found in the cache, or built into it now.

    Other processes of the machine that need it wait for the one that builds it.

    Raises:
        BuildError: A compiler or a header is missing, or does not compile it.
    """
    found = prebuilt(kind)
    if found is not None:
        return found
    from lisa_ds.cache import build_once
    from lisa_ds.errors import ConfigError

    missing = unbuildable(kind)
    if missing is not None:
        raise BuildError(missing)

    def fill(place: Path) -> None:
        print(f"lisa_ds: compiling the {kind} kernels, once on this machine ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        compile_into(place, kind)
        print(f"lisa_ds: compiled the {kind} kernels in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    try:
        return build_once(_place(kind), fill) / library_name(kind)
    except ConfigError as error:  # the cache cannot be written
        raise BuildError(str(error)) from error


def compiled(kind: Kind) -> Path | None:
    """The library, if it is compiled already."""
    from lisa_ds.cache import cache_dir

    found = prebuilt(kind)
    if found is not None or unbuildable(kind) is not None:
        return found
    path = cache_dir() / _place(kind) / library_name(kind)
    return path if path.is_file() else None


def unbuildable(kind: Kind) -> str | None:
    """What is missing to build ``kind`` here, or None."""
    if ninja() is None:
        return "ninja was not found; pip install ninja"
    if compiler(kind) is None:
        wanted = "nvcc was not found; install the CUDA toolkit or set CUDA_HOME" if kind == "cuda" else (
            "no C++ compiler was found; install g++ or set CXX"
        )  # fmt: skip
        return wanted
    if kind == "cpu" and torch_directory() is None:
        return "torch's headers were not found; install torch first"
    return None


def compiler(kind: Kind) -> str | None:
    """Path of the compiler for ``kind``, if there is one."""
    if kind == "cpu":
        return shutil.which(os.environ.get("CXX") or "g++") or (None if "CXX" in os.environ else shutil.which("c++"))
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] or ["/usr/local/cuda"]
    return shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes)) or shutil.which("nvcc")


def ninja() -> str | None:
    """Path of ninja, which is installed with this package."""
    return shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def torch_directory() -> Path | None:
    """Where torch is installed, found without importing it; also from inside pip's isolated build."""
    candidates = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.insert(0, Path(spec.origin).parent)
    return next((path for path in candidates if (path / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def compile_into(place: Path, kind: Kind) -> Path:
    """Compile ``kind`` by ninja; intermediate files stay in ``place`` beside the library.

    Raises:
        BuildError: With what the compiler said.
    """
    missing = unbuildable(kind)
    if missing is not None:
        raise BuildError(missing)
    (place / "build.ninja").write_text(_cpu_rules() if kind == "cpu" else _cuda_rules())
    run = subprocess.run([str(ninja()), "-C", str(place)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        told = [line for line in run.stdout.splitlines() if "error" in line] or run.stdout.splitlines()[-1:]
        raise BuildError(f"the {kind} kernels do not compile: {told[0].strip()}")
    return place / library_name(kind)


def _cpu_rules() -> str:
    source = sources() / "cpu"
    torch = torch_directory()
    assert torch is not None
    levels = _X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {}
    names = ["base", *levels]
    lines = [
        f"cxx = {_escape(str(compiler('cpu')))}",
        f"flags = {_CXX_FLAGS} -I{_escape(str(torch / 'include'))} -DTORCH_TARGET_VERSION=0x0208000000000000",
        "rule cxx",
        "  command = $cxx $flags $level -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared -fopenmp -o $out $in -L{_escape(str(torch / 'lib'))} -ltorch_cpu -lc10",
    ]
    for name in names:
        lines += [f"build {name}.o: cxx {_escape(str(source / 'kernels.cpp'))}"]
        lines += [f"  level = -DLEVEL={name} {levels.get(name, '')} {'-DLISA_DS_X86' if levels else ''}"]
    lines += [f"build op.o: cxx {_escape(str(source / 'op.cpp'))}"]
    lines += [f"  level = {'-DLISA_DS_X86' if levels else ''}"]
    lines += [f"build {library_name('cpu')}: link op.o {' '.join(f'{name}.o' for name in names)}", ""]
    return "\n".join(lines)


def _cuda_rules() -> str:
    architectures = _architectures()
    codes = " ".join(f"-gencode arch=compute_{code},code=sm_{code}" for code in architectures)
    newest = architectures[-1]
    lines = [
        f"nvcc = {_escape(str(compiler('cuda')))}",
        "rule nvcc",
        f"  command = $nvcc -O3 -std=c++17 -t 2 {codes} -gencode arch=compute_{newest},code=compute_{newest} "
        "-shared -Xcompiler -fPIC -cudart static -o $out $in",
        f"build {library_name('cuda')}: nvcc {_escape(str(sources() / 'cuda' / 'masked_adamw.cu'))}",
        "",
    ]
    return "\n".join(lines)


def _architectures() -> tuple[str, ...]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    codes = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name) for name in wanted]
    found = {(int(code[1]), int(code[2]), code[3]) for code in codes if code}
    if not found or None in codes:  # torch knows names such as Hopper, too
        return CUDA_ARCHITECTURES
    return tuple(f"{major}{minor}{kind}" for major, minor, kind in sorted(found))


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _place(kind: Kind) -> str:
    return f"ops/{kind}-{_fingerprint(kind)}"


def _fingerprint(kind: Kind) -> str:
    """A fingerprint of all that the library depends on, so that versions and kinds of machine can share a cache."""
    digest = hashlib.sha256()
    for path in sorted((sources() / kind).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([str(compiler(kind)), "--version"], capture_output=True, text=True).stdout
    rules = _cpu_rules() if kind == "cpu" else _cuda_rules()
    for text in (version, rules, platform.machine()):
        digest.update(text.encode())
    return digest.hexdigest()[:16]
