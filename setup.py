"""Everything about the package is in pyproject.toml; this compiles the kernels ahead of time, if asked to.

``csrc``, which they are compiled from, and ``configs``, which `lisa-ds recipes` copies from, go into the package.
``LISA_DS_BUILD_OPS=cpu|cuda|all pip install .`` puts the compiled libraries into the package; 0, the default, leaves them to be
compiled at first use.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_builder():
    """lisa_ds.ops.build by its file: nothing else of the package can be imported where it is not installed yet."""
    spec = importlib.util.spec_from_file_location("_lisa_ds_build", ROOT / "lisa_ds" / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted(kinds):
    """Which libraries LISA_DS_BUILD_OPS names."""
    asked = os.environ.get("LISA_DS_BUILD_OPS", "0")
    choices = {"0": (), "all": kinds, **{kind: (kind,) for kind in kinds}}
    if asked not in choices:
        raise SystemExit(f"LISA_DS_BUILD_OPS: should be one of {', '.join(choices)}, got {asked!r}")
    return choices[asked]


class BuildWithKernels(build_py):
    """Adds ``csrc`` and ``configs``, and what is asked for in compiled form."""

    def run(self):
        """See setuptools."""
        super().run()
        builder = load_builder()
        package = ROOT if self.editable_mode else Path(self.build_lib)
        if not self.editable_mode:
            for folder in ("csrc", "configs"):
                shutil.copytree(ROOT / folder, package / "lisa_ds" / folder, dirs_exist_ok=True)
        for kind in wanted(builder.KINDS):
            print(f"lisa_ds: compiling the {kind} kernels ahead of time ...", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    library = builder.compile_into(Path(folder), kind)
                except builder.BuildError as error:
                    raise SystemExit(f"LISA_DS_BUILD_OPS={os.environ['LISA_DS_BUILD_OPS']}: {error}") from None
                shutil.copy(library, package / "lisa_ds" / "ops" / library.name)


class MaybeBinary(Distribution):
    """A wheel that holds machine code says so in its name."""

    def has_ext_modules(self):
        """Whether it does."""
        return bool(wanted(load_builder().KINDS))


setup(cmdclass={"build_py": BuildWithKernels}, distclass=MaybeBinary)
