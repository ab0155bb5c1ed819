"""`lisa-ds report`: one page of a run or a comparison, whatever is missing in it, and how wide a browser makes it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.cli import main
from lisa_ds.report import inline, page, planned, runs
from tests.report import run_directories

pytest.importorskip("matplotlib")
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Page(html.parser.HTMLParser):
    """What a browser would read: text, elements, and whether they are closed in order."""

    _VOID = ("meta", "img", "br", "link", "input", "path", "use", "rect", "image")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self._VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(capsys: pytest.CaptureFixture[str], *arguments: str, out: Path) -> Page:
    assert main(["report", *arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    return Page(out.read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_directories.write(tmp_path / "my run")


def test_a_run_is_told_on_one_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_directories.samples(
        run, {"prompt": "2 + 2?", "before": "I", "after": "Four."}, {"prompt": "And?", "after": "b"}
    )
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/report.html\n"
    written = Page((run / "report.html").read_text())
    for text in (
        "my run: lisa",
        "Held-out loss 3.4000 → 2.7111, 40 steps, 26,400 tokens, 1 min 28 s of training, 2 x CPU.",
        *("builtin:smollm2-135m", "builtin:stdlib-docs", "finished", "abc123"),
        *("Loss against optimizer steps", "Loss against training time", "Learning rate", "Tokens a second, all ranks"),
        "forward 0.9 40.0% backward 1 44.4% optimizer 0.3 13.3% switch 0.05 2.2% other 0 0.0% all 2.25",
        "weights 135 MB 135 MB +0.00% gradients 35.4 MB 35.4 MB +0.00% master 70.8 MB 70.8 MB +0.00% moments 142 MB 142 MB +0.00%",
        *("Intervals in which each block trained", "prompt 2 + 2? before I after Four. prompt And? after b"),
        *("num_sampled_layers: 2", "torch 2.13.0"),
    ):
        assert text in written.text, text
    assert written.tags.count("svg") == 5 + 1 + 3
    assert "script" not in written.tags
    assert all(address.startswith(("#", "data:")) for address in written.addresses)  # nothing is fetched
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", (run / "report.html").read_text())


def test_what_a_user_wrote_is_shown_and_not_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>'\""
    run_directories.write(run, data={"path": evil, "max_length": 192})
    run_directories.samples(run, {"prompt": evil, "before": evil, "after": evil})
    shutil.move(run, named := run.parent / r"<b>bold< $\frac{$")  # nor is it a formula
    written = page_of(capsys, str(named), out=run.parent / "page.html")
    assert not {"script", "img", "b"} & {*written.tags}
    assert written.text.count("<script>alert(1)</script>") >= 5
    assert r"bold< $\frac{$" in written.text
    text = (run.parent / "page.html").read_text()
    assert "script" in Page(text.replace("<h1>", f"<h1>{evil}")).tags


def test_missing_parts_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_directories.write(tmp_path / "run", steps=16, finished=False, layers=False)
    written = page_of(capsys, str(run), out=tmp_path / "page.html")
    assert "not finished: running or ended after step 16 of 40" in written.text
    assert "There is no layers.jsonl (statistics: off), so layers are not shown." in written.text
    assert "Live state is measured at the end of a run." in written.text
    assert "Held-out loss 3.4000 → " in written.text
    (run / "preempted.json").write_text("{}")
    assert "preempted after step 16 of 40" in page_of(capsys, str(run), out=tmp_path / "page.html").text


@pytest.mark.parametrize("kept", ["log.jsonl", "layers.jsonl", "records.jsonl"])
def test_one_file_alone_is_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str) -> None:
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    written = page_of(capsys, str(run), out=tmp_path / "page.html")
    assert ("There is no log.jsonl, so there are no curves." in written.text) == (kept != "log.jsonl")
    assert ("Loss against optimizer steps" in written.text) == (kept == "log.jsonl")


DAMAGES = ["{\n", "[]\n", "\x00\xff\n", '{"step": 1}\n', ""]


@pytest.mark.parametrize("name", ["log.jsonl", "layers.jsonl", "records.jsonl", "samples.jsonl"])
def test_a_damaged_file_is_told(run: Path, name: str) -> None:
    for damage in DAMAGES:
        (run / name).write_text(damage)
        (found,) = runs.load([run])
        if damage or name in ("log.jsonl", "layers.jsonl"):
            assert any(f"{run}/{name}:" in note for note in found.notes), damage


def test_beside_damaged_files_the_rest_is_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("layers.jsonl", "records.jsonl", "samples.jsonl"):
        (run / name).write_text("{\n")
    written = page_of(capsys, str(run), out=tmp_path / "page.html")
    for text in ("Layers are not shown: ", "No summary: ", "No samples: ", "Learning rate", "builtin:smollm2-135m"):
        assert text in written.text


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("model", {"name_or_path": "builtin:gone"}),
        ("model", "nonsense"),
        ("deepspeed", {"zero_optimization": {"stage3_prefetch_bucket_size": "many"}}),
        ("method", "nonsense"),
    ],
)
def test_a_config_that_cannot_be_planned_any_more_costs_the_plan_alone(tmp_path: Path, at: str, value: Any) -> None:
    changes = {} if at == "method" else {at: value}
    (run,) = runs.load([run_directories.write(tmp_path, value if at == "method" else "lisa", **changes)])
    lines, note = planned.compare(run)
    assert note.startswith("There is no plan: ")
    assert all(line.planned is None and line.difference is None for line in lines)
    assert any(line.measured for line in lines)


def test_a_peak_is_compared_where_there_is_a_gpu(tmp_path: Path) -> None:
    for device, told in (("2 x NVIDIA H100", 1), ("2 x CPU", 0)):
        (run,) = runs.load([run_directories.write(tmp_path / device, device=device)])
        lines, note = planned.compare(run)
        peak = {line.part: line for line in lines}["peak"]
        assert (peak.measured is not None) == (peak.difference is not None) == bool(told)
        assert ("Without a GPU" in note) == (not told)


def test_a_resumed_run_has_one_mean_of_its_phases_and_one_time(tmp_path: Path) -> None:
    from lisa_ds.run_log import Start, Writer

    writer = Writer(tmp_path / "log.jsonl")
    start = Start(config={}, steps=12, world_size=1, device="1 x CPU")
    writer.begin(0, 0, 0.0, start)
    writer.append(4, 0, 40.0, {"loss": 1.0, "forward_s": 1.0, "tokens_per_second": 5.0})
    writer.append(8, 0, 90.0, {"loss": 1.0, "forward_s": 100.0, "tokens_per_second": 100.0})  # thrown away
    writer.begin(6, 0, 60.0, start)
    writer.append(8, 0, 80.0, {"loss": 1.0, "forward_s": 4.0, "tokens_per_second": 10.0})
    writer.append(12, 0, 120.0, {"loss": 1.0, "forward_s": 1.0, "tokens_per_second": 10.0})
    (run,) = runs.load([tmp_path])
    table = run.seconds_by_phase()
    assert table["forward"] == pytest.approx((4 * 1 + 2 * 4 + 4 * 1) / 10)
    assert table["forward"] + table["other"] == pytest.approx(120 / 12)


def test_a_comparison_has_its_table_figures_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run_directories.write_comparison(tmp_path / "compared", seeds=1)
    (place / "loss_by_time.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (place / "loss_by_time.png").write_bytes(b"png")
    (place / "figures").mkdir()
    (place / "figures/memory.png").write_bytes(b"png")
    written = page_of(capsys, str(place), out=tmp_path / "page.html")
    assert "method loss GB full 2.70 ± 0.01 5.2 lisa 2.71 <b>x</b> 1.9" in written.text
    assert {"figures", "script", "b"} & {*written.tags} == set()
    assert [address.split(";")[0] for address in written.addresses if not address.startswith("#")][:2] == [
        *("data:image/svg+xml", "data:image/png")
    ]
    for text in ("loss by time", "memory", "3 runs.", "lisa: num sampled layers 4", "full-0 full 3.4000 → 2.7111 40"):
        assert text in written.text, text
    assert written.tags.count("details") == 3 * 3  # each run has its own, with its config and versions


def test_many_runs_have_no_part_of_their_own_and_others_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run_directories.write_comparison(tmp_path / "compared", seeds=3)
    written = page_of(capsys, str(place), out=tmp_path / "page.html")
    assert "9 runs. Each has a page of its own" in written.text
    assert "details" not in written.tags
    two = [str(place / "runs" / name) for name in ("full-0", "lisa-1")]
    written = page_of(capsys, *two, out=tmp_path / "page.html")
    assert "2 runs." in written.text
    assert "full-0 full 3.4000" in written.text


def test_seeds_are_one_group_and_what_differs_is_named(tmp_path: Path) -> None:
    place = run_directories.write_comparison(tmp_path / "compared")
    grouped = runs.groups(runs.load(runs.below(place)))
    assert {name: [run.label for run in members] for name, members in grouped.items()} == {
        "full": ["full-0", "full-1"],
        "lisa: num sampled layers 2": ["lisa-0", "lisa-1"],
        "lisa: num sampled layers 4": ["lisa4-0", "lisa4-1"],
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "report: nowhere: there is no such directory"),
        (["empty"], "report: empty: holds neither log.jsonl nor records.jsonl nor layers.jsonl, so it is no run, and no comparison.jsonl, so it is no comparison"),
        (["run", "run"], "report: say where to write a page of several runs, as in --out report.html"),
        (["run", "compared", "--out", "x"], "report: compared: is a comparison, which has a page of its own; name it alone"),
        (["run", "--out", "file/x"], "--out: file/x cannot be written: file is a file"),
        (["--out", "x"], "the following arguments are required: DIR; see `lisa-ds report page --help`"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_directories.write(Path("run"))
    Path("empty").mkdir()
    Path("file").write_text("")
    Path("compared").mkdir()
    Path("compared/comparison.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"lisa-ds: error: {told}\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_reports_load_no_torch(run: Path) -> None:
    code = f"import sys; from lisa_ds.cli import main; main(['report', {str(run)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_help_names_both_and_layers_still_works(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    assert {"page", "layers"} <= {*capsys.readouterr().out.split()}
    assert main(["report", "layers", str(run)]) == 0
    assert "mean weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("## A *b* <i>\n\ntwo\nlines", "<h4>A *b* &lt;i&gt;</h4>\n<p>two lines</p>"),
        ("- a `x_y`\n- **b**", "<ul><li>a <code>x_y</code></li><li><strong>b</strong></li></ul>"),
        ("a | b", "<p>a | b</p>"),
        ("See [docs](x.md).\n![loss](loss.png)", "<p>See docs.</p>"),
        ("![loss](loss.png)", ""),
        ("one\n```sh\na <b>\n\n| c |\n```\ntwo", "<p>one</p>\n<pre>a &lt;b&gt;\n\n| c |</pre>\n<p>two</p>"),
    ],
)
def test_markdown(text: str, shown: str) -> None:
    assert inline.markdown(text) == shown


def test_a_markdown_table_keeps_its_cells() -> None:
    written = Page(inline.markdown("| a \\| b | c |\n|---|:-:|\n| 1 | |\n| 2 |\n| `x` | **y** | z |\n"))
    assert (written.tags.count("tr"), written.tags.count("th"), written.tags.count("td")) == (4, 3, 9)
    assert written.text.startswith("a | b c 1")


MEASURE = """
<script>
const body = document.body, found = {};
body.style.margin = 0;
for (const width of [360, 1280]) {
  body.style.width = body.style.maxWidth = width + 'px';
  const wide = [...body.querySelectorAll('*')].filter(one =>
    (one.tagName === 'svg' || one.closest('svg') === null) && one.parentElement.closest('.scroll, pre') === null
    && one.getBoundingClientRect().right > width + 0.5);
  const small = [...body.querySelectorAll('p, td, th, li, pre, summary, figcaption')].filter(one =>
    parseFloat(getComputedStyle(one).fontSize) < 14);
  found[width] = [wide.map(one => one.tagName), small.map(one => one.tagName)];
}
body.textContent = 'MEASURED' + JSON.stringify(found) + 'END';
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_in_a_browser_nothing_is_wider_than_the_page(tmp_path: Path) -> None:
    place = run_directories.write_comparison(tmp_path / "compared", seeds=1)
    run_directories.samples(place / "runs/lisa-0", {"prompt": "x" * 300, "before": "y " * 300, "after": None})
    page.write([place], out := tmp_path / "page.html")
    whole = out.read_text().replace("<details>", "<details open>")
    assert measured(tmp_path, whole) == {"360": [[], []], "1280": [[], []]}
    broken = whole.replace(
        '<p class="verdict">', '<p class="verdict" style="width: 700px; max-width: none; font-size: 13px">', 1
    )
    assert measured(tmp_path, broken) == {"360": [["P"], ["P"]], "1280": [[], ["P"]]}


def measured(folder: Path, text: str) -> Any:
    """By width of the page, the elements that are wider and those whose text is too small."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it forbids the script that measures
    (file := folder / "measured.html").write_text(text.replace("</body>", f"{MEASURE}</body>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"MEASURED(.*?)END", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(found[1])
