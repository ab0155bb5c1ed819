"""Figures of the benchmarks, drawn from the committed records: what is written in them, and that nothing lies over anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ablate_plan
import ablate_report
import convex_rate
import masked_adamw
import pytest
from matplotlib.figure import Figure

from lisa_ds import records

RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.fixture(params=["ablation", "convex_rate", "masked_adamw"])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, Figure]:
    """A figure as it is when it is saved."""
    name = request.param
    found = list(records.read(RESULTS / f"{name}.jsonl"))
    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (kept.append(self), save(self, *args, **kw))[1])
    draw: Any = {"ablation": ablate_report, "convex_rate": convex_rate, "masked_adamw": masked_adamw}[name].draw
    draw(found, tmp_path / "figure.png")
    return name, kept[0]


def test_no_legend_lies_over_data_and_no_text_is_cut(drawn: tuple[str, Figure]) -> None:
    _, figure = drawn
    whole = figure.bbox
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
        assert (min(box.x0, whole.x0), max(box.x1, whole.x1), min(box.y0, whole.y0)) == (whole.x0, whole.x1, whole.y0)
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert (min(box.x0, whole.x0), max(box.x1, whole.x1)) == (whole.x0, whole.x1)


def test_no_code_names_are_shown(drawn: tuple[str, Figure]) -> None:
    name, figure = drawn
    shown = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    for axes in figure.axes:
        shown += [text.get_text() for text in (axes.get_legend().get_texts() if axes.get_legend() else [])]
    codes = {
        "ablation": {option.name for option in ablate_plan.OPTIONS},
        "convex_rate": {arm.name for arm in convex_rate.ARMS},
        "masked_adamw": set(masked_adamw.BYTES) - {"fp32"},  # which is a word
    }[name]
    assert not codes & {part for text in shown for part in text.replace("\n+ ", ":").split(":")}
    assert not any("_" in text for text in shown)


@pytest.mark.parametrize("drawn", ["ablation"], indirect=True)
def test_every_mean_has_an_interval_or_says_that_it_is_of_one_pair(drawn: tuple[str, Figure]) -> None:
    pairs = drawn[1].axes[1]
    sizes = [int(text.get_text().removeprefix("n = ")) for text in pairs.texts]
    assert 1 in sizes
    bars: list[Any] = list(pairs.containers)
    assert [bar.has_xerr for bar in bars] == [size > 1 for size in sizes]
    assert [bar.lines[0].get_fillstyle() for bar in bars] == ["full" if size > 1 else "none" for size in sizes]
    assert pairs.get_legend().get_texts()[-1].get_text() == "a single pair: no interval"


def test_every_variant_has_a_label() -> None:
    assert set(ablate_report.LABELS) == {"base", "full", *(option.name for option in ablate_plan.OPTIONS)}
    assert set(masked_adamw.LABELS) == set(masked_adamw.BYTES)
