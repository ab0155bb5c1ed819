"""`lisa-ds init` and `lisa-ds recipes`: what they write loads, fits and says what comes next; also from a wheel."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lisa_ds.cli import main, starting, template
from lisa_ds.config import load_config
from lisa_ds.train import arguments
from tests import tiny

ROOT = Path(__file__).parents[2]
LISA_DS = [sys.executable, "-m", "lisa_ds.cli"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca, 40)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (
            "--model meta-llama/Llama-3.1-8B --gpus 1 --gpu-memory 80GB",
            {"training.bf16": True, "training.learning_rate": 1e-5},
        ),
        (
            "--model meta-llama/Llama-3.1-8B --gpus 1 --gpu-memory 24GB",
            {"training.gradient_checkpointing": True, "lisa.embeddings": "never", "lisa.embeddings_lr_scale": 1.0},
        ),
        ("--model Qwen/Qwen2.5-0.5B --gpus 8 --gpu-memory 24GB", {"training.gradient_accumulation_steps": 2}),
        (
            "--model meta-llama/Llama-2-7b-hf --method full --gpus 4 --gpu-memory 24GB",
            {"deepspeed.zero_optimization.offload_optimizer.device": "cpu"},
        ),
        ("--model builtin:smollm2-135m", {"training.bf16": False, "training.learning_rate": 1e-4}),
        ("--model meta-llama/Llama-2-70b-hf --gpu_memory=80GB --gpus=16", {"lisa.num_sampled_layers": 2}),
    ],
)
def test_what_init_writes_loads_fits_and_comments_itself(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: str, values: dict[str, object]
) -> None:
    assert main(["init", "mine.yaml", "--data", "rows.jsonl", *flags.split()]) == 0
    out = capsys.readouterr().out
    config = load_config("mine.yaml")
    assert arguments.check(config)
    assert config.data.path == "rows.jsonl"
    for key, value in values.items():
        held: object = config
        for part in key.split("."):
            held = held[part] if isinstance(held, dict) else getattr(held, part)
        assert held == value, key
    text = Path("mine.yaml").read_text()
    assert text.count("  # ") > 10
    assert [path.name for path in folder.iterdir()] in (["rows.jsonl", "mine.yaml"], ["mine.yaml", "rows.jsonl"])
    plan = next(line for line in out.splitlines() if line.startswith("  lisa-ds plan "))
    assert main(shlex.split(plan)[1:]) == 0  # 2 if it does not fit
    assert "  lisa-ds train mine.yaml" in out


@pytest.mark.parametrize("value", ["no", "a: b", "# 1", "1e-3", "{x}", "ümläut/x", "a'b\"c", "*star", "null", " 'x"])
def test_any_name_is_written_as_it_is(folder: Path, value: str) -> None:
    assert main(["init", "--model", value, "--data", value]) == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["model"] == {"name_or_path": value}
    assert load_config("run.yaml").data.path == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("init", "init: say --model NAME and --data PATH; on a terminal, `lisa-ds init` alone asks for them"),
        (
            "init --model x/y",
            "init: say --model NAME and --data PATH; on a terminal, `lisa-ds init` alone asks for them",
        ),
        ("init rows.jsonl --model x/y --data z", "rows.jsonl: exists already; choose another name, or say --force"),
        ("init . --model x/y --data z --force", ".: exists already; choose another name"),
        ("init run.json --model x/y --data z", "run.json: is written as YAML; choose a name that ends in .yaml"),
        ("init rows.jsonl/run.yaml --model x/y --data z", "rows.jsonl/run.yaml: cannot be written: "),
        ("init --model builtin:smollm --data z", "--model: builtin:smollm: "),
        ("init --model ./none --data z", "--model: "),
        (
            "init --model meta-llama/Llama-3.1-405B --data z --gpus 1 --gpu-memory 24GB",
            "--gpus: meta-llama/Llama-3.1-405B takes 8",
        ),
        (
            "recipes llama-2-7b-24",
            "recipes: there is none of the name 'llama-2-7b-24'; did you mean 'llama-2-7b-24gb'?",
        ),
        ("recipes zzz", "recipes: there is none of the name 'zzz'; `lisa-ds recipes` lists them"),
        ("recipes --out x.yaml", "recipes: say which one, as in `lisa-ds recipes NAME --out FILE`"),
        ("recipes demo --out rows.jsonl", "rows.jsonl: exists already; choose another name, or say --force"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    before = (sorted(folder.rglob("*")), (folder / "rows.jsonl").read_bytes())
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lisa-ds: error: {message}")
    assert err.count("\n") == 1
    assert (sorted(folder.rglob("*")), (folder / "rows.jsonl").read_bytes()) == before


def test_force_writes_over(folder: Path) -> None:
    Path("run.yaml").write_text("mine")
    assert main(["init", "--model", "x/y", "--data", "z", "--force"]) == 0
    assert load_config("run.yaml").model.name_or_path == "x/y"


def test_what_does_not_load_is_not_written(folder: Path) -> None:
    with pytest.raises(Exception, match=r"^mine\.yaml: lisa\.sed: unknown key"):
        starting._write(Path("mine.yaml"), "model: {name_or_path: x}\ndata: {path: y}\nlisa: {sed: 1}\n")
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        ("Qwen/Qwen2.5-0.5B\nrows.jsonl\nbig\n24GB\n", 0, "should be such as 80GB, got 'big'"),
        ("\n\nnone\n", 0, "wrote run.yaml"),
        ("x/y\n\x04", 2, "lisa-ds: error: init: a question was not answered; nothing has been written"),
        ("x/y\n\x03", 130, "lisa-ds: interrupted"),
    ],
)
def test_questions_on_a_terminal(folder: Path, typed: str, code: int, said: str) -> None:
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has its background jobs ignore it
        os.execv(sys.executable, [*LISA_DS, "init"])
    told = b""
    for line in typed.splitlines(keepends=True):
        while not told.endswith(b"]: "):
            told += os.read(terminal, 1000)
        time.sleep(0.3)  # a signal between the prompt and the read is seen with the next key, and nobody types as fast
        os.write(terminal, line.encode())
        told += b"\n"
    try:
        while piece := os.read(terminal, 1000):
            told += piece
    except OSError:  # the end of a terminal
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code, told
    assert said in told.decode()
    assert Path("run.yaml").exists() == (code == 0)
    if "24GB" in typed:
        assert load_config("run.yaml").model.name_or_path == "Qwen/Qwen2.5-0.5B"
        assert load_config("run.yaml").training["bf16"] is True
    elif code == 0:
        assert load_config("run.yaml").data.path == "builtin:stdlib-docs"


def test_recipes_are_listed_printed_and_copied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    files = {path.stem: path for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/recipes/*.yaml")]}
    assert listed.keys() == files.keys()
    assert listed["llama-3.1-8b-24gb"] == "Llama 3.1 8B on one GPU of 24 GB: two layers at a time."
    for name, file in files.items():
        capsys.readouterr()
        assert main(["recipes", name]) == 0
        assert capsys.readouterr().out == file.read_text()
        assert main(["recipes", f"{name}.yaml", "--out", f"{name}.yaml"]) == 0
        assert load_config(f"{name}.yaml") == load_config(file)
        assert "configs/recipes" not in Path(f"{name}.yaml").read_text()


def test_every_key_that_init_writes_has_its_place_in_the_file() -> None:
    """No comment is left over for a key that is not written any more."""
    keys = set()
    for method, data, memory in [
        ("lisa", "builtin:stdlib-docs", 2**30),
        ("full", "x", None),
        ("lisa", "x", None),
        ("lora", "x", None),
        ("galore", "x", None),
        ("lisa", "x", 24 * 2**30),
    ]:
        model = "builtin:smollm2-135m" if memory != 24 * 2**30 else "meta-llama/Llama-3.1-8B"
        keys |= {
            line.split(":")[0].strip()
            for line in template.text(template.make(model, data, method, 1, memory)).splitlines()
        }
    assert {dotted.rpartition(".")[2] for dotted in template._COMMENTS} - keys <= {"deepspeed"}


@pytest.mark.nightly
@pytest.mark.multirank
def test_a_wheel_trains_outside_of_a_checkout(tmp_path: Path) -> None:
    """Built without isolation, since the tools are here, and installed into an environment that sees this one's packages."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    (packages,) = {path for path in map(Path, sys.path) if (path / "deepspeed").is_dir()}
    (site / "beside.pth").write_text(f"{packages}\n")

    place = tmp_path / "elsewhere"
    place.mkdir()
    tiny.write_model(place / "model")
    tiny.write_rows(place / "rows.jsonl", tiny.alpaca, 40)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LISA_DS_CACHE": str(tmp_path / "cache")}
    environment["PATH"] = f"{tmp_path / 'venv/bin'}{os.pathsep}{environment['PATH']}"
    python = tmp_path / "venv/bin/python"

    def lisa_ds(words: str) -> str:
        code = "import sys; from lisa_ds.cli import main; sys.exit(main())"
        done = subprocess.run(
            [python, "-c", code, *words.split()], cwd=place, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import lisa_ds; print(lisa_ds.__file__)"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site))
    assert lisa_ds("--version").startswith("lisa-ds ")
    assert "llama-3.1-8b-24gb" in lisa_ds("recipes")
    lisa_ds("recipes demo --out demo.yaml")
    lisa_ds("init --model ./model --data rows.jsonl")
    assert "2 ranks, 1 x 256 tokens" in lisa_ds("plan run.yaml --world-size 2")
    said = lisa_ds(
        "train run.yaml --num-gpus 2 training.max_steps=2 data.max_length=64 training.gradient_accumulation_steps=2"
    )
    assert "model: runs/run/model" in said
    assert json.loads((place / "runs/run/model/config.json").read_text())["num_hidden_layers"] == 4
