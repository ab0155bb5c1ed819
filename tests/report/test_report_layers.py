"""`lisa-ds report layers`: the table and the figures of runs of different methods, at few layers and at many."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.cli import main
from lisa_ds.report import layers
from lisa_ds.sampling.statistics import Recording, Start, Writer, count_visits

INTERVALS = 12


def record(directory: Path, blocks: int, method: str, *, tied: bool = False, told: bool = True) -> Path:
    """A run's file: norms that fall with depth, embeddings and head far above."""
    draw = random.Random(blocks)
    units = ("embeddings", *map(str, range(blocks)), *(() if tied else ("lm_head",)), "rest")
    writer = Writer(directory / "layers.jsonl", Start(step=0, method=method, model="m", units=units, tied=tied))
    history: list[list[int]] = []
    for interval in range(INTERVALS):
        sampled = units
        if method == "lisa":
            history.append(sorted(draw.sample(range(blocks), 2)))
            sampled = tuple(u for u in units if not u.isdecimal() or int(u) in history[-1])
        norms = {u: 100.0 / (1 + int(u)) if u.isdecimal() else 900.0 + interval for u in units}
        writer.append(
            Recording(
                step=20 * (interval + 1),
                interval=interval,
                weight_norm=norms,
                gradient_norm={u: 0.5 if u in sampled else None for u in units},
                update_norm={u: 1e-3 if u in sampled else None for u in units},
                sampled=sampled,
                gradient_steps=20,
                visits=count_visits(blocks, history) if method == "lisa" else None,
                probabilities=(2 / blocks,) * blocks if method == "lisa" and told else None,
            )
        )
    return directory


@pytest.fixture(params=[12, 80])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    blocks = request.param
    places = [record(tmp_path / method, blocks, method) for method in ("full", "lora", "lisa")]
    return [*places, record(tmp_path / "again" / "lisa", blocks, "lisa", told=False)]


def test_the_table_has_a_line_for_each_unit_and_columns_for_each_run(tmp_path: Path) -> None:
    histories = layers.load(
        [record(tmp_path / "a run", 3, "lisa", tied=True), record(tmp_path / "full", 3, "full", tied=True)]
    )
    assert list(histories) == ["a run (lisa)", "full"]
    text = layers.lines(histories)
    assert text[:2] == [
        "a run (lisa): lisa of m, 240 steps, 12 recordings, 12 intervals",
        "full: full of m, 240 steps, 12 recordings",
    ]
    visits = histories["a run (lisa)"].visits()
    assert visits is not None
    table = [line.split() for line in text[4:]]
    assert table[0] == [
        "unit",
        *["mean", "weight", "gradient", "update", "visits"],
        *["mean", "weight", "gradient", "update"],
    ]
    assert table[1] == ["embeddings", "=", "lm_head", "905.5", "0.5", "0.001", "-", "905.5", "0.5", "0.001"]
    assert table[3] == ["1", "50", "0.5", "0.001", str(visits["1"]), "50", "0.5", "0.001"]
    assert len({len(line) for line in text[5:]}) == 1  # aligned


def test_figures_have_a_line_for_each_run_and_no_labels_that_overlap(runs: list[Path]) -> None:
    pytest.importorskip("matplotlib")
    histories = layers.load(runs)
    norms = layers.weight_norms(histories)
    assert [line.get_label() for line in norms.axes[0].get_lines()] == list(histories)
    blocks = len(next(iter(histories.values())).start.blocks)
    assert all(len(line.get_xdata()) == blocks + 2 for line in norms.axes[0].get_lines())
    assert list(norms.axes[0].get_lines()[0].get_ydata()[:2]) == [905.5, 100.0]
    drawn = {label: history for label, history in histories.items() if history.visits() is not None}
    bars, heat = layers.visits(drawn), layers.probabilities(drawn)
    assert [len(panel.patches) for panel in bars.axes] == [blocks] * 2
    assert [int(sum(bar.get_height() for bar in panel.patches)) for panel in bars.axes] == [2 * INTERVALS] * 2
    assert len(heat.axes) == 2 * 2  # with the bars of their colours
    for figure in (norms, bars, heat):
        assert overlaps(figure) == []
        assert all(panel.get_ylabel() for panel in figure.axes)


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that run into each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = []
    for panel in figure.axes:
        ticks = [tick.label1 for axis in (panel.xaxis, panel.yaxis) for tick in axis._update_ticks()]  # those in view
        if panel.get_label() == "<colorbar>":
            ticks = [tick.label2 for tick in panel.yaxis._update_ticks()]
        labels = [*ticks, panel.xaxis.label, panel.yaxis.label]
        titles = [panel.title, panel._left_title, *(panel.get_legend().get_texts() if panel.get_legend() else [])]
        texts += [text for text in (*labels, *titles) if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    width, height = canvas.get_width_height()
    outside = [
        (name, "the edge")
        for name, box in boxes
        if not (box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height)
    ]
    pairs = itertools.combinations(boxes, 2)
    return outside + [
        (a, b) for (a, one), (b, other) in pairs if one.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98))
    ]


def test_overlapping_labels_would_be_seen(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = layers.weight_norms(layers.load([record(tmp_path / "full", 80, "full")]))
    figure.axes[0].set_xticks(range(82), [f"block {i}" for i in range(82)])
    assert overlaps(figure)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_command_prints_and_draws(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    assert (
        main(
            [
                "report",
                "layers",
                *map(str, runs[:2]),
                str(runs[2] / "layers.jsonl"),
                "--out",
                str(out),
                "--format",
                kind,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.splitlines()[-3:] == [
        f"wrote {out / name}.{kind}" for name in ("weight_norms", "visits", "probabilities")
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{n}.{kind}" for n in ("weight_norms", "visits", "probabilities")
    )
    assert all(path.stat().st_size > 5_000 for path in out.iterdir())
    assert main(["report", "layers", str(runs[0]), "--out", str(tmp_path / "one"), "--format", kind]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == [f"weight_norms.{kind}"]  # nothing is drawn there


def test_the_table_alone_needs_no_matplotlib_and_no_torch(tmp_path: Path) -> None:
    run = record(tmp_path / "lisa", 3, "lisa")
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from lisa_ds.cli import main\n"
        f"assert main(['report', 'layers', {str(run)!r}]) == 0\n"
        f"assert main(['report', 'layers', {str(run)!r}, '--out', {str(tmp_path / 'out')!r}]) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        0,
        "lisa-ds: error: report layers --out: needs matplotlib: pip install 'lisa-ds[plots]'\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "layers"], "the following arguments are required: RUN"),
        (["report", "layers", "nowhere"], "nowhere: no layer statistics can be read: No such file or directory"),
        (["report", "layers", "begun"], "begun/layers.jsonl: holds no recording yet"),
        (["report", "layers", "lisa", "--out", "a file"], "--out: a file cannot be written: "),
    ],
)
def test_a_wrong_command_line_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    record(Path("lisa"), 3, "lisa")
    Path("a file").touch()
    Writer(Path("begun/layers.jsonl"), Start(step=0, method="full", model="m", units=("0",)))
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"lisa-ds: error: {message}")


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    places = [record(tmp_path / name, 3, "full") for name in ("a/out", "b/out", "c/full")]
    assert list(layers.load(places)) == ["a/out (full)", "b/out (full)", "c/full"]
    assert list(layers.load([places[0], places[0]])) == ["out (full) [1]", "out (full) [2]"]
