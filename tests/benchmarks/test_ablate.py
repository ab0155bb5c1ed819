"""What the ablation runs next, what it chooses, and what its tables say: all of it without training anything."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import ablate_plan
import ablate_report
import embedding_rows
import pytest
from ablate_plan import BASE, OPTIONS, Progress, Protocol, Run

from lisa_ds import LisaConfig
from lisa_ds.records import Record

PROTOCOL = Protocol(device="cpu", datasets=("gsm8k", "roleplay"))
REFUSED = "weight_norm"


def loss(run: Run, stream: random.Random) -> float:
    """A world in which K 10 and cyclic draws help, everything else hurts a little, and the base wants 1e-3."""
    lisa = run.settings["lisa"] or {}
    found = {"none": 2.0, "full": 0.8}.get(run.settings["method"], 1.0) + 0.1 * run.settings["seed"]
    found += abs(run.settings["lr"] - 1e-3)
    found += 0.01 * sum(lisa.get(key) != value for key, value in BASE.items()) + 0.01 * (len(lisa) > len(BASE))
    found -= 0.05 * (lisa.get("interval_steps") == 10) + 0.03 * (lisa.get("sampler") == {"name": "cyclic"})
    return found + stream.gauss(0, 1e-4)


def campaign(stages: tuple[str, ...] = ("rates", "screen", "final")) -> tuple[list[Run], Progress]:
    """Every run in the order of the plan; one option is refused."""
    stream, done = random.Random(0), []
    losses: dict[str, dict[str, float]] = {}
    closed: set[str] = set()
    while runs := Progress(PROTOCOL, losses, closed).open(stages):
        run = runs[0]
        if run.arm == REFUSED:
            closed.add(run.key)
            continue
        value = loss(run, stream)
        losses[run.key] = {"select": value, "verdict": value + 0.1}
        done.append(run)
    return done, Progress(PROTOCOL, losses, closed)


@pytest.fixture(scope="module")
def finished() -> tuple[list[Run], Progress]:
    return campaign()


def test_screening_is_at_most_sixty_runs(finished: tuple[list[Run], Progress]) -> None:
    runs, _ = finished
    count = Counter(run.stage for run in runs)
    assert count["rates"] + count["screen"] + len(PROTOCOL.screen_seeds) <= 60  # with the refused one
    assert len({run.key for run in runs}) == len(runs)


def test_choices(finished: tuple[list[Run], Progress]) -> None:
    runs, progress = finished
    assert progress.rate("base", "gsm8k") == 1e-3
    assert progress.best("interval").name == "K 10"  # type: ignore[union-attr]
    assert progress.best("importance").name != REFUSED  # type: ignore[union-attr]
    combined = progress.combined()
    assert combined is not None
    assert combined.changes == {"interval_steps": 10, "sampler": {"name": "cyclic"}}
    finals = [run for run in runs if run.stage == "final"]
    assert Counter(run.settings["seed"] for run in finals) == dict.fromkeys(PROTOCOL.final_seeds, 2 * 9)


def test_no_seed_of_a_choice_gives_a_verdict() -> None:
    assert not set(PROTOCOL.screen_seeds) & set(PROTOCOL.final_seeds)


def test_nothing_waits_for_what_will_not_come() -> None:
    closed = {run.key for run in Progress(PROTOCOL, {}).rates("base", "gsm8k")}
    left = Progress(PROTOCOL, {}, closed).open(("rates", "screen", "final"))
    assert {run.stage for run in left} == {"before", "rates"}


def test_a_key_depends_on_settings_alone() -> None:
    first = ablate_plan.make_run(PROTOCOL, "base", "rates", "gsm8k", 0, 1e-3, {})
    again = ablate_plan.make_run(PROTOCOL, "base", "screen", "gsm8k", 0, 1e-3, {})
    other = ablate_plan.make_run(PROTOCOL, "base", "screen", "gsm8k", 1, 1e-3, {})
    assert first.key == again.key != other.key


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_changes_the_base(option: Any) -> None:
    section = ablate_plan.lisa_section(option.changes)
    assert section != BASE
    if not set(section) - set(LisaConfig.model_fields) and option.factor in ("interval", "schedule", "gamma"):
        LisaConfig.load(section)


def test_tables(finished: tuple[list[Run], Progress], tmp_path: Path) -> None:
    runs, progress = finished
    found = [record for run in runs for record in recorded(run, progress.losses[run.key])]
    text = ablate_report.tables(found)
    assert "Drew the same layers in every run, so that they are one arm: base, grad_norm, ema." in text
    assert f"Not measured: {REFUSED}." in text
    assert "| **K 10** | interval | -0.0" in text
    row = next(line for line in text.splitlines() if line.startswith("| interval: K 10"))
    assert row.split("|")[2].strip() == "5"
    assert row.split("|")[4].strip().startswith("-0.0399 [-0.0")
    document = tmp_path / "ablation.md"
    document.write_text(f"before\n{ablate_report.BEGIN}\nold\n{ablate_report.END}\nafter\n")
    for _ in range(2):
        ablate_report.insert(document, text)
    assert document.read_text() == f"before\n{ablate_report.BEGIN}\n\n{text}\n\n{ablate_report.END}\nafter\n"


def test_the_documents_tables_have_their_place() -> None:
    text = (Path(__file__).parents[2] / "docs/ablation.md").read_text()
    assert text.count(ablate_report.BEGIN) == text.count(ablate_report.END) == 1


def recorded(run: Run, losses: Any) -> list[Record]:
    about = {"variant": run.arm, "device": "CPU", "commit": "0", "versions": {}, "x": run.settings["steps"]}
    settings = {"key": run.key, "stage": run.stage, "workers": 1, **run.settings}
    values = {"select_loss": losses["select"], "verdict_loss": losses["verdict"], "run_time": 1.0}
    sampler = (run.settings["lisa"] or {}).get("sampler", {})
    rule = {} if sampler.get("score") == "ema" else sampler  # as if it drew uniformly
    drawn = {"drawn": [[len(str(rule)), 40]]}
    return [
        Record(name=name, value=value, unit="", settings={**settings, **(drawn if name == "run_time" else {})}, **about)
        for name, value in values.items()
    ]


def test_rows_of_an_embedding() -> None:
    rows = [{"input_ids": [i, i + 1]} for i in range(10)]
    assert embedding_rows.distinct(rows, 10, seed=0) == embedding_rows.distinct(rows, 25, seed=0) == 11
    assert embedding_rows.distinct(rows, 1, seed=0) == 2
    assert embedding_rows.bytes_of(3, 100, 8, sparse=True) == 3 * 8 * 12 + 4 * 103
