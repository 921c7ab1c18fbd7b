"""report.html: one page about a run, made from the files that it left.

Standard library only and no model in memory, so that a report can be made again anywhere, also of a run that was
interrupted: whatever file is missing leaves its section out. All text from files is escaped.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hfkit.audit_page import audit_summary
from hfkit.charts import Series, format_number, format_short, is_number, line_chart, smooth
from hfkit.files import read_json, write_atomic
from hfkit.masking import mask_secrets
from hfkit.page import cards, facts_table, fold, page, quote, section, shorten, show, table

ROWS = 20  # predictions shown, and classes of a confusion matrix
PASSAGE = 1500  # characters of a sample shown

# Key figures in the order of their importance: result's field, name, explanation.
FIGURES = (
    ("accuracy", "Accuracy", "of all examples"),
    ("majority_baseline", "Majority baseline", "always the largest class"),
    ("macro_f1", "Macro F1", "mean over the classes"),
    ("mcc", "MCC", "−1 to 1; 0 is chance"),
    ("bleu", "BLEU", "corpus, sacreBLEU"),
    ("chrf", "chrF", "characters and words"),
    ("bits_per_byte", "Bits per byte", "of the validation text"),
    ("perplexity", "Perplexity", "per token, validation"),
    ("eval_loss", "Validation loss", "nats per target"),
    ("train_loss", "Training loss", "nats per target"),
    ("parameters", "Parameters", "trained"),
    ("tokens", "Tokens", "trained on"),
    ("tokens_per_second", "Tokens per second", "all processes"),
    ("seconds", "Training time", "h:mm:ss"),
)
CARDS = 8


def write_report(output_dir: Path) -> Path:
    """Write ``output_dir/report.html`` from what the run left there, and return its path."""
    lines = read_rows(output_dir / "metrics.jsonl")
    result = read_json(output_dir / "result.json") or {}
    passport = read_json(output_dir / "passport.json") or {}
    config = output_dir / "config.yaml"
    body = [
        head(output_dir.resolve().name, result, lines, passport),
        section("Curves", *curves(lines)),
        section("Result", confusion(result), per_class(result), facts_table(plain_figures(result))),
        section("Samples", samples(read_rows(output_dir / "samples.jsonl"))),
        section("Predictions", predictions(read_rows(output_dir / "predictions.jsonl", ROWS))),
        section("Data", audit_summary(read_json(output_dir / "audit.json") or {})),
        section(
            "Configuration",
            fold("config.yaml", f"<pre>{escape(mask_secrets(read_text(config)))}</pre>") if config.exists() else "",
        ),
        section("Environment", environment(passport)),
    ]
    path = output_dir / "report.html"
    write_atomic(path, page(f"{output_dir.resolve().name} · hfkit", "".join(body)))
    return path


def read_text(path: Path) -> str:
    """Return a file's text, whatever its bytes."""
    return path.read_text("utf-8", errors="replace")


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first ``limit`` objects of a JSON-lines file; unreadable lines are left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if limit is not None and len(rows) >= limit:
                break
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def show_figure(name: str, value: float) -> str:
    """Return a key figure as its card shows it.

    Example:
        >>> show_figure("accuracy", 0.8734), show_figure("parameters", 12_345_678), show_figure("seconds", 3725)
        ('87.3 %', '12.3M', '1:02:05')
    """
    if name in ("accuracy", "macro_f1", "majority_baseline"):
        return f"{100 * value:.1f} %"
    if name == "seconds":
        return f"{int(value) // 3600}:{int(value) // 60 % 60:02}:{int(value) % 60:02}"
    if name in ("parameters", "tokens", "tokens_per_second"):
        return format_short(value)
    return f"{value:.2f}" if name in ("perplexity", "bleu", "chrf") and value < 1000 else format_number(round(value, 3))


def head(name: str, result: dict[str, Any], lines: list[dict[str, Any]], passport: dict[str, Any]) -> str:
    """Return title, date and key figures; those of the last lines where the run has left no result."""
    sessions = passport.get("sessions") or [{}]
    known = result
    notes = [str(sessions[0].get("started", ""))[:16].replace("T", " ")]
    if not result:
        known = {"train_loss": None}
        for line in lines:
            known |= {"train_loss" if key == "loss" else key: value for key, value in line.items()}
        notes.append(f"not finished: step {format_number(lines[-1]['step'])}" if lines else "not finished")
    elif is_number(result.get("steps")):
        notes.append(f"{format_number(result['steps'])} steps")
    if result.get("evaluated_on") == "train":
        notes.append("nothing was held out: the figures are those of the training text")
    if len(sessions) > 1:
        notes.append("resumed once" if len(sessions) == 2 else f"resumed {len(sessions) - 1} times")
    figures = [
        (title, show_figure(field, known[field]), note) for field, title, note in FIGURES if is_number(known.get(field))
    ]
    subtitle = " · ".join(escape(note) for note in notes if note)
    return f'<header><h1>{escape(name)}</h1><p class="soft">{subtitle}</p>{cards(figures[:CARDS])}</header>\n'


def curves(lines: list[dict[str, Any]]) -> list[str]:
    """Return the charts of a run."""
    training = [line for line in lines if "loss" in line and is_number(line.get("step"))]
    evaluations = [line for line in lines if "eval_loss" in line and is_number(line.get("step"))]

    def points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float | None]]:
        return [(row["step"], row[name] if is_number(row.get(name)) else None) for row in rows]

    loss = points(training, "loss")
    bad = [x for x, y in loss if y is None]
    raw = [Series("training loss", loss, "main", dots=len(loss) < 3)]
    if len(loss) >= 30:  # a mean over a thirtieth of the run; fewer lines are a curve that needs none
        raw = [Series("training loss", loss, "faint"), Series("smoothed", smooth(loss, len(loss) // 60))]
    validation = Series("validation loss", points(evaluations, "eval_loss"), "second", dots=len(evaluations) <= 40)
    small = [
        line_chart([Series("learning rate", points(training, "learning_rate"))], "Learning rate"),
        line_chart([Series("gradient norm", points(training, "grad_norm"))], "Gradient norm"),
        line_chart([Series("tokens per second", points(training, "tokens_per_second"))], "Tokens per second"),
    ]
    note = (
        f'<p class="bad">Not a finite loss at step {escape(show(bad[:5]))}{" …" if bad[5:] else ""}.</p>' if bad else ""
    )
    grid = f'<div class="charts">{"".join(small)}</div>' if any(small) else ""
    return [line_chart([*raw, validation], "Loss, nats per target", tall=True), note, grid]


def confusion(result: dict[str, Any]) -> str:
    """Return the confusion matrix as a heat map: rows are labels, columns predictions, shades shares of the row."""
    matrix = result.get("confusion_matrix")
    if not isinstance(matrix, list) or not matrix or len(matrix) > ROWS:
        return ""
    names = list(result.get("per_class") or [])
    if len(names) != len(matrix):
        names = [str(index) for index in range(len(matrix))]
    rows = []
    for label, counts in zip(names, matrix, strict=True):
        whole = sum(counts) or 1
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--main) {shade:.0f}%, var(--card))">{count:,}</td>'
            for count, shade in ((count, 65 * count / whole) for count in counts)
        )
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    header = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    return (
        '<div class="scroll"><table class="confusion"><caption class="soft">rows: label, columns: prediction</caption>'
        f"<tr><th></th>{header}</tr>{''.join(rows)}</table></div>"
    )


def per_class(result: dict[str, Any]) -> str:
    """Return a table of each class's figures."""
    classes = result.get("per_class")
    if not isinstance(classes, dict) or not classes:
        return ""
    columns = list(next(iter(classes.values())))
    return table(["class", *columns], [[name, *(row.get(c) for c in columns)] for name, row in classes.items()])


def plain_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without what has a table of its own."""
    return {name: value for name, value in result.items() if name not in ("confusion_matrix", "per_class")}


def samples(rows: list[dict[str, Any]]) -> str:
    """Return what the model wrote: the last step's samples, the earlier ones folded."""
    steps = sorted({row["step"] for row in rows if is_number(row.get("step"))}, reverse=True)

    def quotes(step: float) -> str:
        texts = []
        for row in rows:
            if row.get("step") == step:
                prompt, text = str(row.get("prompt", "")), str(row.get("text", ""))
                texts.append(quote(shorten(text.removeprefix(prompt), PASSAGE), prompt))
        return "".join(texts)

    if not steps:
        return ""
    earlier = "".join(f"<h3>Step {format_number(step)}</h3>{quotes(step)}" for step in steps[1:])
    return f"<p class='soft'>Step {format_number(steps[0])}</p>{quotes(steps[0])}" + fold("Earlier samples", earlier)


def predictions(rows: Sequence[dict[str, Any]]) -> str:
    """Return the first predictions: a table of texts and labels, or translations with their references."""
    if rows and "hypothesis" in rows[0]:
        return "".join(
            f"<p class='soft'>{escape(shorten(row.get('source', ''), 400))}</p>{quote(shorten(row['hypothesis'], 400))}"
            f"<p><small>Reference: {escape(shorten(row.get('reference', ''), 400))}</small></p>"
            for row in rows
            if "hypothesis" in row
        )
    lines = [
        "<tr>"
        f"<td>{escape(shorten(row.get('text', ''), 240))}</td><td>{escape(str(row.get('label', '–')))}</td>"
        f'<td class="{"good" if row.get("prediction") == row.get("label") else "bad"}">'
        f"{escape(str(row.get('prediction')))}</td></tr>"
        for row in rows
        if "prediction" in row
    ]
    head = "<tr><th>Text</th><th>Label</th><th>Prediction</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>' if lines else ""


def environment(passport: dict[str, Any]) -> str:
    """Return versions, hardware and command."""
    names = ("seed", "os", "hardware", "versions", "commit")
    command = passport.get("command")
    line = " ".join(map(str, command)) if isinstance(command, list) else str(command or "")
    shown = f"<pre>{escape(mask_secrets(line))}</pre>" if line else ""
    return shown + facts_table({name: passport[name] for name in names if name in passport})
