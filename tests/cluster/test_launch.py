"""What launch/train.sbatch would run, and what it and launch/multinode.sh refuse; a real cluster is in tests/cluster/test_cluster.py."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SBATCH, MULTINODE = ROOT / "launch/train.sbatch", ROOT / "launch/multinode.sh"


def run(script: Path, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **variables}
    return subprocess.run(["bash", script, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def steps(*arguments: str, **variables: str) -> tuple[list[str], list[str]]:
    """The commands of the step that compiles and of the one that trains."""
    done = run(SBATCH, *arguments, LISA_DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    prebuild, training = done.stdout.splitlines()
    return shlex.split(prebuild), shlex.split(training)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", SBATCH, MULTINODE], check=True)


def test_ranks_are_the_processes_of_a_step_and_resume() -> None:
    prebuild, training = steps("configs/demo.yaml", "data.format=text", "lisa.sampler={name: cyclic}")
    assert training == [
        *("srun", "--kill-on-bad-exit=1", "--output=runs/demo/logs/rank-%t.log", "--open-mode=append"),
        *("python", "-u", "launch/train.py", "--lisa_config", "configs/demo.yaml", "--resume", "auto"),
        *("training.output_dir=runs/demo", "data.format=text", "lisa.sampler={name: cyclic}"),
    ]
    assert prebuild[-2:] == ["ops", "--build"]
    assert "--ntasks-per-node=1" in prebuild


def test_what_a_cluster_needs_comes_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text("LISA_SRUN='--mpi=none --cpu-bind=cores'\n")
    settings = {"LISA_SETUP": str(tmp_path / "setup.sh"), "SLURM_CPUS_PER_TASK": "12", "LISA_PYTHON": "python3.12"}
    for step in steps("configs/demo.yaml", **settings):
        assert step[:5] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=12", "--mpi=none", "--cpu-bind=cores"]
        assert "python3.12" in step


def test_containers() -> None:
    for step in steps("configs/demo.yaml", LISA_CONTAINER="my/image:1", LISA_CONTAINER_MOUNTS="/data:/data"):
        mounts = f"--container-mounts={ROOT}:{ROOT},/tmp:/tmp,/data:/data"
        assert step[2:5] == ["--container-image=my/image:1", mounts, f"--container-workdir={ROOT}"]
    for step in steps("configs/demo.yaml", LISA_APPTAINER="image.sif"):
        inside = step[step.index("apptainer") :]
        assert inside[:4] == ["apptainer", "exec", "--nv", "--bind"]
        assert inside[4:9] == [f"{ROOT}:{ROOT},/tmp:/tmp", "--pwd", str(ROOT), "image.sif", "python"]


@pytest.mark.parametrize(
    ("variables", "mounted"),
    [
        ({"LISA_SCRATCH": "/scratch"}, ["/scratch"]),
        ({"SLURM_TMPDIR": "/local/7"}, ["/local/7"]),
        ({"HF_HOME": "/shared/hf"}, ["/tmp", "/shared/hf"]),
        ({"LISA_DS_CACHE": "/shared/lisa", "HF_HOME": "/shared/hf", "LISA_SCRATCH": "/nvme"}, ["/nvme", "/shared/hf", "/shared/lisa"]),
        ({"HF_HOME": "/cache", "LISA_DS_CACHE": "/cache", "TMPDIR": "/cache"}, ["/cache"]),
    ],
)  # fmt: skip
def test_a_container_has_the_caches_that_its_environment_names(variables: dict[str, str], mounted: list[str]) -> None:
    pairs = ",".join(f"{path}:{path}" for path in [str(ROOT), *mounted])
    for step in steps("configs/demo.yaml", LISA_CONTAINER="image", **variables):
        assert f"--container-mounts={pairs}" in step
    for step in steps("configs/demo.yaml", LISA_APPTAINER="image.sif", **variables):
        assert step[step.index("--bind") + 1] == pairs


def test_both_recipes_make_the_same_image() -> None:
    docker, apptainer = ((ROOT / "launch" / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    base = re.search("^From: (.*)$", apptainer, re.MULTILINE)
    assert base is not None
    assert f"FROM {base[1]}\n" in docker
    for command in ("apt-get install .*", "pip install .*", "LISA_DS_BUILD_OPS=.*"):
        theirs = [found.removesuffix(" \\") for found in re.findall(command, docker)]
        assert theirs == re.findall(command, apptainer)
    copied = {name for line in re.findall("^COPY (.*) ", docker, re.MULTILINE) for name in line.split()}
    files = apptainer.partition("%files\n")[2].partition("\n\n")[0].split("\n")
    assert {tuple(line.split()) for line in files} == {(name, f"/usr/src/lisa_ds/{name}") for name in copied}
    assert all((ROOT / name).exists() for name in copied)
    in_a_wheel = re.findall("^graft (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    assert copied >= {"lisa_ds", *in_a_wheel}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing_in_the_image_s_steps() -> None:
    text = (ROOT / "launch/apptainer.def").read_text()
    sections = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)[1:]
    scripts = {name: body for name, body in zip(sections[::2], sections[1::2], strict=True) if name != "files"}
    assert set(scripts) == {"post", "environment", "test"}
    for body in scripts.values():
        subprocess.run(["shellcheck", "-s", "sh", "-"], input=body, text=True, check=True)


def test_every_sbatch_line_asks_for_cores_and_time() -> None:
    places = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "launch").iterdir(),
        *(ROOT / "configs").rglob("*.yaml"),
    ]
    text = "\n".join(path.read_text() for path in places if path.is_file())
    lines = re.findall(r"sbatch --nodes(?:.*\\\n)*.*", text)
    assert len(lines) >= 5
    for line in lines:
        assert "--cpus-per-task=" in line, line
        assert "--time=" in line, line


def test_an_array_takes_its_line_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep").write_text("lisa.seed=1\nlisa.seed=2 training.learning_rate=1e-4\n")
    settings = {"LISA_SWEEP": str(tmp_path / "sweep"), "SLURM_ARRAY_TASK_ID": "2", "LISA_OUTPUT_DIR": "runs/s"}
    _, training = steps("configs/demo.yaml", "data.seed=3", **settings)
    assert training[-4:] == [
        "training.output_dir=runs/s-2",
        "data.seed=3",
        "lisa.seed=2",
        "training.learning_rate=1e-4",
    ]
    done = run(SBATCH, "configs/demo.yaml", **{**settings, "SLURM_ARRAY_TASK_ID": "3"})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path}/sweep: line 3 is empty or missing; submit with a smaller --array" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "no config given; usage: sbatch [flags] launch/train.sbatch CONFIG [key=value ...]"),
        (["configs/none.yaml"], {}, f"{ROOT}/configs/none.yaml: no such config"),
        (["configs/demo.yaml"], {}, "not in a Slurm job; submit with sbatch, or set LISA_DRY_RUN=1"),
        (["configs/demo.yaml"], {"LISA_SWEEP": "none.txt"}, "LISA_SWEEP: none.txt: no such file"),
        (["configs/demo.yaml"], {"LISA_SWEEP": "Makefile"}, "LISA_SWEEP is set, but this is no job array"),
        (
            ["configs/demo.yaml", "training.output_dir=x"],
            {},
            "training.output_dir=x: this script has to know where the run writes; set LISA_OUTPUT_DIR",
        ),
        (["configs/demo.yaml"], {"LISA_VENV": "/none"}, "LISA_VENV: /none/bin/activate: no such file"),
        (["configs/demo.yaml"], {"LISA_SETUP": "/none"}, "LISA_SETUP: /none: no such file"),
        (["configs/demo.yaml"], {"LISA_MODULES": "cuda"}, "LISA_MODULES is set, but there is no `module` command here"),
        (
            ["configs/demo.yaml"],
            {"LISA_TRAIN": "none.py"},
            f"{ROOT}/none.py: no such file; submit from the repository's",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], variables: dict[str, str], message: str
) -> None:
    done = run(SBATCH, *arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"train.sbatch: error: {message}")


def test_a_missing_hostfile_is_told() -> None:
    done = run(MULTINODE, "hostfile", "--lisa_config", "configs/demo.yaml")
    assert (done.returncode, done.stderr) == (2, "multinode.sh: error: hostfile: no such file\n")
