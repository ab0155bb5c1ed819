"""Tables and figures of a comparison, from its records: the right numbers, legible, and what is missing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lisa_ds.report.comparison import figures, read, table
from tests.compare.campaigns import compare, prepare

ARMS = "\n".join(
    f"{g} layers, K {k}: {{lisa.num_sampled_layers: {g}, lisa.interval_steps: {k}}}" for g in (1, 2) for k in (5, 10)
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a comparison of full fine-tuning with LISA at two numbers of layers and two intervals."""
    with pytest.MonkeyPatch.context() as patch:
        place = prepare(tmp_path_factory.mktemp("comparison"), patch)
        (place / "arms.yaml").write_text(ARMS)
        assert compare("--arms", "arms.yaml", "--rates", "2", methods="full") == 0
        return list(map(json.loads, (place / "out/comparison.jsonl").read_text().splitlines()))


Load = Callable[..., read.Comparison]


@pytest.fixture
def load(lines: list[dict[str, Any]], tmp_path: Path) -> Load:
    """Reads them, without those for which ``drop`` is true."""

    def loaded(drop: Callable[[dict[str, Any]], bool] = lambda line: False) -> read.Comparison:
        file = tmp_path / "comparison.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines if not drop(line)))
        return read.load(file)

    return loaded


def test_the_table(load: Load) -> None:
    text = table.markdown(load())
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in text.splitlines())
        if len(cells) > 8
    }
    full, lisa = rows["full"], rows["1 layers, K 5"]
    # By the rule of tests/compare/fake_train.py: the best rate is 1e-3; full's lie at 8.7e-5 and 2.6e-4, LISA's at 5.8e-4 and 1.7e-3.
    assert full == ["2", "1.3865", "", "0.00026 (edge)", "280.0 (0.4)", "320.0 (0.5)", "0.50 (0.00)", "0.400", "100"]
    assert lisa[:4] == ["2", "1.2837", "-0.1028 [-0.1092, -0.0965]", "0.0017 (edge)"]
    assert lisa[4].startswith("70.0 (")
    assert lisa[5].startswith("110.0 (")  # with weights
    assert "Before training: 2.2000." in text
    assert "4 comparisons with full; of so many intervals at 95 %, 0.2 would miss zero by chance alone.\n" in text
    assert "at 98.75 %, so that all hold together at 95 % (Bonferroni): 1 layers, K 5 (-0.1028), " in text
    assert "| full | 8.7e-05: 1.5963, **0.00026: 1.1815** |" in text
    assert "* Some arm has 2 seeds in the verdict: fewer than three tell little.\n" in text
    assert "| full | 1.3815 | 1.3915 | 0.0100 |" in text


def test_what_is_missing_is_said(load: Load, tmp_path: Path) -> None:
    untimed = load(lambda line: line["name"] == "training_seconds")
    assert "Left out: seconds (no log.jsonl)." in table.markdown(untimed)
    assert "Left out" not in table.markdown(load())
    unplanned = load(lambda line: line["name"].startswith("planned"))
    assert "Left out: planned bytes (the planner does not know the model)." in table.markdown(unplanned)
    coarse = load(
        lambda line: (
            line["name"].startswith("seconds_per_step")
            or line["variant"] in ("2 layers, K 5", "2 layers, K 10", "1 layers, K 10")
        )
    )
    written, left_out = figures.draw(coarse, tmp_path / "out")
    assert [path.name for path in written] == ["comparison-loss.png", "comparison-memory.png"]
    assert left_out == [
        "no figure of time: the logs of the runs do not tell the parts of a step apart",
        "no figure of sweep: no arms differ in lisa.num_sampled_layers and lisa.interval_steps alone",
    ]


def test_a_comparison_that_has_only_begun(load: Load, tmp_path: Path) -> None:
    begun = load(lambda line: line["name"] != "comparison")
    text = table.markdown(begun)
    assert "| full | 0 | - |  |" in text
    assert "Learning rates were not searched" not in text
    assert "The learning rate alone: 2 for each arm, seed 1000; the chosen one in bold." in text
    assert "| full | - |" in text
    assert figures.draw(begun, tmp_path / "out")[0] == []


def test_one_rate_each_is_no_search(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    changed = json.loads(json.dumps(lines[:1]))
    for arm in changed[0]["settings"]["identity"]["arms"].values():
        arm["rates"] = arm["rates"][:1]
    (tmp_path / "comparison.jsonl").write_text(json.dumps(changed[0]) + "\n")
    assert "Learning rates were not searched: " in table.markdown(read.load(tmp_path / "comparison.jsonl"))


@pytest.mark.parametrize("diverged", ["1 layers, K 5", "full"])
def test_what_diverged_is_told_and_does_not_hold(lines: list[dict[str, Any]], tmp_path: Path, diverged: str) -> None:
    """With a third seed, so that two are left: their interval alone would be without zero."""
    changed = json.loads(json.dumps(lines))
    third = json.loads(json.dumps([line for line in lines if line["settings"].get("seed") == 1]))
    for line in third:
        line["settings"] |= {"seed": 2, "run": line["settings"]["run"] + "-2"}
        if line["name"] == "steps" and line["variant"] == diverged:
            line["settings"]["diverged"] = True
    (tmp_path / "comparison.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*changed, *third]))
    text = table.markdown(read.load(tmp_path / "comparison.jsonl"))
    assert f"* Training diverged: {diverged} (1 of 3 runs). These runs are in no mean and no interval, " in text
    (alone,) = [line for line in text.splitlines() if line.startswith("* Interval without zero")]
    assert "1 layers, K 5 (" not in alone
    assert ("1 layers, K 10 (" in alone) == (diverged != "full")


def test_a_run_that_diverged_has_no_loss(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    changed = json.loads(json.dumps(lines))
    for line in changed:
        if line["name"] == "steps" and line["variant"] == "full" and line["settings"]["seed"] == 1:
            line["settings"]["diverged"] = True
    (tmp_path / "comparison.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    found = read.load(tmp_path / "comparison.jsonl")
    assert list(found.losses("full")) == [0]
    text = table.markdown(found)
    assert "| full | 1.3815 | diverged | - |" in text
    assert "| -0.1033 |" in text  # of one pair, without an interval
    figures.draw(found, tmp_path / "out")


@pytest.mark.parametrize("name", ["loss", "memory", "time", "sweep"])
def test_a_figure_is_legible(name: str, load: Load) -> None:
    make = {"loss": figures.loss, "memory": figures.memory, "time": figures.times, "sweep": figures.sweep}[name]
    figure = make(load())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert (min(box.x0, whole.x0), max(box.x1, whole.x1), min(box.y0, whole.y0)) == (whole.x0, whole.x1, whole.y0)
        assert axes.get_xlabel()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
        assert (min(box.x0, whole.x0), max(box.x1, whole.x1)) == (whole.x0, whole.x1)
        assert len(legend.get_texts()) > 1
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert not any("_" in text for text in shown)


def test_curves_are_means_and_end_where_the_seeds_do(load: Load) -> None:
    steps, seconds, memory = figures.loss(load()).axes
    curve = steps.lines[0]
    assert curve.get_xdata().tolist() == [0, 2, 4, 6]
    assert curve.get_ydata()[-1] == pytest.approx(1.3865, abs=1e-4)
    assert sorted(steps.lines[1].get_ydata()) == pytest.approx([1.3815, 1.3915], abs=1e-4)
    assert seconds.lines[0].get_xdata().tolist() == pytest.approx([0.0, 0.8, 1.6, 2.4])
    assert len(memory.lines) == 2 * 5


def test_the_sweep_has_a_line_for_each_number_of_layers(load: Load) -> None:
    (axes,) = figures.sweep(load()).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1 layer at a time", "2 layers at a time"]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_label()[0] != "_"] == [[5, 10], [5, 10]]


def test_bars_of_memory_add_up_to_the_peak(load: Load) -> None:
    (axes,) = figures.memory(load()).axes
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in axes.patches[-5:]}
    assert ends == {0.5}
    assert axes.patches[0].get_width() == pytest.approx(0.04)  # weights of full
