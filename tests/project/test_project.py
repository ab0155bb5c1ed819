"""What the project's files say twice, they must say alike."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def claimed() -> dict[str, Requirement]:
    """The requirements of pyproject.toml, by package, those of extras included."""
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}


def pinned() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(code) for line in lines if (code := line.partition("#")[0].strip())]


def test_known_good_versions_lie_in_the_claimed_ranges() -> None:
    claims = claimed()
    for pin in pinned():
        (version,) = [specifier.version for specifier in pin.specifier]
        claim = claims.get(pin.name.lower())
        assert claim is None or claim.specifier.contains(version), f"{claim} does not allow {pin}"


def test_every_claimed_package_has_a_known_good_version() -> None:
    assert set(claimed()) - {pin.name.lower() for pin in pinned()} == {"lisa-ds"}


def test_deepspeed_s_range_is_that_of_the_engine() -> None:
    from lisa_ds.engines.zero3 import supported

    assert str(claimed()["deepspeed"].specifier) == f"<{supported.NEWEST_BELOW},>={supported.OLDEST}"


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "constraints.txt", "pyproject.toml", "CONTRIBUTING.md"])
def test_files_name_no_machine(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"file://|index-url|/(home|root|work|opt)/", text)


def test_no_benchmark_imports_one_that_imports_it() -> None:
    files = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "benchmarks").rglob("*.py")}
    imports = {name: set(imported(tree)) & set(files) for name, tree in files.items()}
    assert imports["scaling"] == {"scaling_plan", "scaling_figure", "simulate_rank"}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def imported(tree: ast.Module) -> list[str]:
    """Modules that are imported anywhere, within functions as well, by their last names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module == "benchmarks"):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name.rpartition(".")[2] for name in found]
