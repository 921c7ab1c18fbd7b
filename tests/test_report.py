"""The report and audit pages: whole HTML, escaped, self-contained, for every state that a run can be left in."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hfkit.audit_page import write_audit_page
from hfkit.charts import Series, bar_list, column_chart, downsample, line_chart
from hfkit.report import write_report

HOSTILE = "</blockquote><script>alert('&\"')</script><img src=x onerror=alert(1)>"
TOKEN = "hf_" + "PlantedPlantedPlanted123"
VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.titles: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        elif "style" not in self.open:
            self.words += data


def read(path: Path) -> Page:
    """Parse a page and check that it loads and runs nothing."""
    html = path.read_text("utf-8")
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert "url(" not in html and "@import" not in html
    return page


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with hostile text wherever text comes from outside, and secrets where they could slip in."""
    run = tmp_path / "run<1>"
    run.mkdir()
    training = [
        {"step": step, "loss": 100.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 10.0 + step}
        for step in range(1, 3001)
    ]
    write_lines(run / "metrics.jsonl", [*training, {"step": 3000, "eval_loss": 1.25}])
    result = {"parameters": 1_234_567, "steps": 3000, "eval_loss": 1.25, "bits_per_byte": 0.987654321, HOSTILE: HOSTILE}
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.yaml").write_text(f"note: {HOSTILE} {TOKEN}\n")
    (run / "passport.json").write_text(json.dumps({"command": ["x.py", TOKEN, HOSTILE], "sessions": [{}, {}]}))
    write_lines(run / "samples.jsonl", [{"step": 10, "prompt": "Old", "text": "Old " + HOSTILE}])
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3000, "prompt": HOSTILE, "text": "new\u2028text"}, ensure_ascii=False) + "\n")
    write_lines(run / "predictions.jsonl", [{"source": HOSTILE, "reference": HOSTILE, "hypothesis": HOSTILE}])
    audit = {"documents": {"read": 10, "kept": 8}, "removed": {HOSTILE: 2}, "key": HOSTILE}
    (run / "audit.json").write_text(json.dumps(audit))
    return run


def test_report_is_one_whole_page_with_the_key_figures(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = read(path)
    for words in ("run<1>", "3,000 steps", "resumed once", "1.23M", "1,234,567", "0.988", "0.987654", "new\u2028text"):
        assert words in page.words
    assert page.tags.count("svg") == 4  # loss, learning rate, gradient norm, tokens per second


def test_hostile_text_is_shown_as_it_is_and_not_executed(run: Path) -> None:
    words = read(write_report(run)).words
    assert words.count(HOSTILE) == 11  # result 2, config, command, samples 2, predictions 3, audit 2


def test_report_holds_no_secret(run: Path) -> None:
    assert TOKEN not in write_report(run).read_text()


def test_long_curves_are_thinned_out_for_drawing(run: Path) -> None:
    html = write_report(run).read_text()
    curves = re.findall(r'class="curve [a-z]+" d="([^"]*)"', html)
    assert len(curves) == 6  # training, smoothed, validation, and three small charts
    assert max(len(re.findall("[ML]", curve)) for curve in curves) <= 600
    assert html.count('class="hover"') <= 4 * 151


def test_thinning_keeps_every_spike() -> None:
    points = [(float(step), 50.0 if step == 1733 else 1.0 + step % 2) for step in range(10_000)]
    thin = downsample(points, 600)
    assert len(thin) <= 600
    assert (1733.0, 50.0) in thin
    assert list(thin) == sorted(thin)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 0.0, "tokens_per_second": None}],
        [{"step": 1, "loss": None, "learning_rate": 0.0, "grad_norm": None}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": None}, {"step": 3, "loss": 1.0}],
    ],
    ids=["none", "one", "null", "gaps"],
)
def test_unfinished_run_of_few_or_missing_figures_has_a_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    write_lines(tmp_path / "metrics.jsonl", lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": NaN}\n{"step": 5, "lo')  # a foreign writer, and a crash
    words = read(write_report(tmp_path)).words
    assert "not finished: step 4" in words
    bad = [line["step"] for line in lines if line.get("loss", 0.0) is None] + [4]
    assert f"Not a finite loss at step {', '.join(map(str, bad))}." in words


def test_empty_folder_has_a_report(tmp_path: Path) -> None:
    assert "not finished" in read(write_report(tmp_path)).words


def test_sentiment_report_shows_the_confusion_matrix_and_marks_errors(tmp_path: Path) -> None:
    per_class = {name: {"precision": 0.5, "examples": 4} for name in ("bad & ugly", "good")}
    result = {"accuracy": 0.75, "majority_baseline": 0.5, "confusion_matrix": [[3, 1], [0, 4]], "per_class": per_class}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = [{"text": "fine", "label": "good", "prediction": p, "scores": [0.1, 0.9]} for p in ("good", "bad & ugly")]
    write_lines(tmp_path / "predictions.jsonl", rows)
    html = write_report(tmp_path).read_text()
    shades = re.findall(r"var\(--main\) (\d+)%, var\(--card\)\)\">(\d+)</td>", html)
    assert shades == [("49", "3"), ("16", "1"), ("0", "0"), ("65", "4")]  # 65 % of the row's share
    assert "75.0 %" in html and "50.0 %" in html
    assert '<td class="good">good</td>' in html and '<td class="bad">bad &amp; ugly</td>' in html
    read(tmp_path / "report.html")


def test_chart_places_points_by_their_values_and_breaks_at_gaps() -> None:
    series = Series("loss", [(0, 0.0), (10, 5.0), (20, float("nan")), (30, 10.0), (40, 10.0)])
    html = line_chart([series], "Loss")
    (path,) = re.findall(r'class="curve main" d="([^"]*)"', html)
    # the y axis ends 3 % above the highest value: 1000 - 1000 * 5 / 10.3 = 514.6
    assert path == "M0.0 1000.0L250.0 514.6M750.0 29.1L1000.0 29.1"
    assert Page(html).titles == ["step 0\nloss 0", "step 10\nloss 5", "step 30\nloss 10", "step 40\nloss 10"]


def test_a_logarithmic_axis_places_points_by_their_ratios_and_an_unnamed_curve_goes_unsaid() -> None:
    curve, fit = (
        Series("loss", [(0.001, 1.0), (0.01, 1.0), (0.1, 2.0)]),
        Series("", [(0.001, 2.0), (0.1, 1.0)], "second"),
    )
    html = line_chart([fit, curve], "Loss", x_label="rate", log_x=True)
    (path,) = re.findall(r'class="curve main" d="([^"]*)"', html)
    assert path == "M0.0 1000.0L500.0 1000.0L1000.0 29.1"
    page = Page(html)
    assert page.titles == ["rate 0.001\nloss 1", "rate 0.01\nloss 1", "rate 0.1\nloss 2"]
    assert re.findall(r'class="x" style="left:([\d.]+)%">([^<]*)', html)[::3] == [
        ("0.00", "0.001"),
        ("50.00", "0.01"),
        ("100.00", "0.1"),
    ]
    assert "key" not in html  # one named curve needs no legend


def test_chart_without_numbers_is_left_out() -> None:
    assert line_chart([Series("loss", []), Series("other", [(1, None)])], "Loss") == ""
    assert column_chart([("0–1", 0)], "Lengths", "tokens") == ""


def test_constant_curve_has_an_axis() -> None:
    assert 'd="M0.0 500.0L1000.0 500.0"' in line_chart([Series("rate", [(1, 0.001), (2, 0.001)])], "Rate")


def test_bars_are_scaled_to_the_longest() -> None:
    html = bar_list([("a", 200), ("b", 50)], total=1000)
    assert re.findall(r"width:([\d.]+)%", html) == ["100.00", "25.00"]
    assert re.findall("<small>([^<]*)", html) == ["20.0%", "5.0%"]


def test_audit_page_shows_what_each_rule_removed(tmp_path: Path) -> None:
    audit = {
        "documents": {"read": 100, "kept": 90},
        "removed": {"exact_duplicates": 7, "too_short": 3, "contaminated": 0},
        "tokenizer": {"vocab_size": 300, "bytes_per_token": 3.5, "round_trip_failures": 0},
        "sources": [{"name": HOSTILE, "documents": 90}],
        "samples": {"too_short": [{"where": "a.txt:3", "text": HOSTILE}]},
        "duplicates": [{"kept": HOSTILE, "removed": ["a copy"]}],
        "lengths": [["< 9", 40], ["10–99", 50]],
    }
    write_audit_page(audit, tmp_path / "audit.html")
    page = read(tmp_path / "audit.html")
    assert page.words.count(HOSTILE) == 3
    for words in ("90.0% of them", "exact duplicates", "too short", "a copy", "1 removed"):
        assert words in page.words
    assert "contaminated" not in page.words
    assert {"< 9: 40", "10–99: 50"} <= set(page.titles)


def test_audit_page_needs_no_optional_part(tmp_path: Path) -> None:
    write_audit_page({}, tmp_path / "audit.html")
    read(tmp_path / "audit.html")


def test_report_needs_no_torch() -> None:
    code = (
        "import sys, hfkit.report, hfkit.audit_page; print(sorted({'torch', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
