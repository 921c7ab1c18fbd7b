"""What a sweep found: its points compared, a scaling law where they hold one, as figures, as text and as a page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hfkit.charts import Points, Series, format_number, format_short, is_number, line_chart
from hfkit.files import write_atomic
from hfkit.page import cards, page, section, table
from hfkit.scaling import LEAST, Law, can_fit, describe_law

STYLES = ("main", "second", "third", "fourth", "fifth")
FIGURES = ("parameters", "tokens", "eval_loss", "bits_per_byte", "seconds")  # of a point's result
SYMBOLS = {"E": "E", "A": "A", "alpha": "α", "B": "B", "beta": "β", "exponent": "β / (α + β)"}
CURVE = 40  # places at which a fitted curve is drawn
SETTLED = 0.3  # width of the 95 % interval of β / (α + β) up to which a best size is worth telling
Point = dict[str, Any]


def summarize(grid: dict[str, list[Any]], points: Sequence[Point]) -> dict[str, Any]:
    """Return the content of sweep.json.

    Args:
        points: Of each its ``name``, the ``settings`` that make it, its ``state`` and the ``FIGURES`` of its result.

    Returns:
        `grid`, `points`, `best` (the name of the point with the least bits per byte, which compare across
        tokenizers), and `scaling`: what `describe_law` says, or None with the reason as `scaling_note`.
    """
    done = [point for point in points if is_number(point.get("eval_loss"))]
    best = min(done, key=lambda point: point.get("bits_per_byte") or point["eval_loss"], default=None)
    runs: dict[tuple[float, float], float] = {}
    for point in done:  # of the points with a size and length, the best counts
        place = (float(point["parameters"]), float(point["tokens"]))
        runs[place] = min(point["eval_loss"], runs.get(place, point["eval_loss"]))
    measured = [(size, tokens, loss) for (size, tokens), loss in runs.items()]
    note = ""
    if texts := [key for key in grid if key.startswith(("data.", "tokenizer."))]:
        note = f"A scaling law is of one text in one vocabulary; the grid has {', '.join(texts)}."
    elif not can_fit(measured):
        sizes, lengths = (len({run[place] for run in measured}) for place in (0, 1))
        note = (
            f"A scaling law needs {LEAST} sizes, {LEAST} lengths and more than five of their combinations; there are "
            f"{sizes}, {lengths} and {len(measured)}."
        )
    return {
        "grid": grid,
        "points": list(points),
        "best": best["name"] if best else None,
        "scaling": None if note else describe_law(measured),
        "scaling_note": note,
    }


def tell_sweep(sweep: dict[str, Any]) -> str:
    """Return the points as a table of text, the best one, and the law with how sure it is."""
    header, rows = point_rows(sweep)
    lines = [header, *([_plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*aligned, "", tell_best(sweep), *tell_law(sweep)])


def tell_best(sweep: dict[str, Any]) -> str:
    """Return which point is the best."""
    for point in sweep["points"]:
        if point["name"] == sweep["best"]:
            settings = (f"{key} {show_setting(value)}" for key, value in point["settings"].items())
            return f"Best: {', '.join(settings)} (points/{point['name']})."
    return "No point has a result."


def tell_law(sweep: dict[str, Any]) -> list[str]:
    """Return the fitted law in sentences, or why there is none."""
    scaling = sweep["scaling"]
    if scaling is None:
        return [sweep["scaling_note"]]
    law, error = scaling["law"], scaling["left_out_error"]
    told = [
        f"L(N, D) = {law['E']:.3g} + {law['A']:.3g} / N^{law['alpha']:.3f} + {law['B']:.3g} / D^{law['beta']:.3f} "
        "nats per token, N parameters, D tokens."
    ]
    if intervals := scaling["intervals"]:
        shown = (f"{SYMBOLS[name]} {low:.3g} … {high:.3g}" for name, (low, high) in intervals.items())
        told.append(f"95 % of the laws of resampled points: {', '.join(shown)}.")
    if error["mean"] is not None:
        largest = "" if error["largest_run"] is None else f"; of the largest {error['largest_run']:+.2%}"
        told.append(f"A point that is left out is predicted to within {error['mean']:.2%} in the mean{largest}.")
    if not is_settled(scaling):
        return [*told, "These points do not settle the best size for a budget: more sizes, longer runs or seeds would."]
    now, later = scaling["optimum"]
    told.append(
        f"For the largest point's budget of {now['flops']:.2g} FLOPs the law's best size is "
        f"{format_short(now['parameters'])} parameters, on {format_short(now['tokens'])} tokens; for ten times that, "
        f"beyond what was measured, {format_short(later['parameters'])} on {format_short(later['tokens'])}."
    )
    return told


def is_settled(scaling: dict[str, Any]) -> bool:
    """Whether resampled points agree on how the best size grows with the budget."""
    low, high = scaling["intervals"].get("exponent") or (0.0, 1.0)
    return bool(scaling["optimum"]) and high - low <= SETTLED


def point_rows(sweep: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of the table of points, in the order of the grid."""
    header = [key.rsplit(".", 1)[-1] for key in sweep["grid"]]
    rows = [
        [
            *(show_setting(point["settings"][key]) for key in sweep["grid"]),
            *(_round(point.get(name)) if point["state"] == "done" else point["state"] for name in FIGURES),
        ]
        for point in sweep["points"]
    ]
    return [*header, *(name.replace("_", " ") for name in FIGURES)], rows


def show_setting(value: Any) -> str:
    """Return a setting's value for a table.

    Example:
        >>> show_setting({"hidden_size": 64, "num_hidden_layers": 2}), show_setting(0.003)
        ('hidden_size 64, num_hidden_layers 2', '0.003')
    """
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _plain(cell: Any) -> str:
    return format_number(cell) if is_number(cell) else str(cell)


def write_sweep_page(sweep: dict[str, Any], path: Path) -> None:
    """Write the page of a sweep, from the content of sweep.json."""
    points = {point["name"]: point for point in sweep["points"]}
    best = points.get(sweep["best"], {})
    scaling = sweep["scaling"]
    figures = [
        ("Points", len(points), f"{sum(point['state'] == 'done' for point in points.values())} with a result"),
        ("Best loss", best.get("eval_loss"), "nats per token"),
        ("Best bits per byte", best.get("bits_per_byte"), "of the validation text"),
    ]
    if scaling and is_settled(scaling):
        figures.append(("Best size grows as C to the", _round(scaling["law"]["exponent"]), "for a budget of C FLOPs"))
    shown = cards((name, format_number(value), note) for name, value, note in figures if is_number(value))
    body = [
        f"<header><h1>Sweep</h1><p class='soft'>{escape(' × '.join(sweep['grid']))}</p>{shown}</header>",
        section("Best point", f"<p>{escape(tell_best(sweep).removeprefix('Best: '))}</p>"),
        section("Scaling law", *law_section(sweep)),
        section("Best loss at each value", f'<div class="charts">{"".join(setting_charts(sweep))}</div>'),
        section("Points", table(*point_rows(sweep))),
    ]
    write_atomic(path, page("Sweep · hfkit", "".join(body)))


def law_section(sweep: dict[str, Any]) -> list[str]:
    """Return the law's chart and sentences, and a table of its constants."""
    sentences = [f"<p>{escape(sentence)}</p>" for sentence in tell_law(sweep)]
    if (scaling := sweep["scaling"]) is None:
        return sentences
    constants = [
        [SYMBOLS[name], *map(_round, (value, *(scaling["intervals"].get(name) or (None, None))))]
        for name, value in scaling["law"].items()
    ]
    return [law_chart(sweep), *sentences, table(["constant", "fitted", "from", "to (95 %)"], constants)]


def law_chart(sweep: dict[str, Any]) -> str:
    """Return loss by tokens, a colour per size: dots are measured, lines are the law's."""
    law = Law(**{name: value for name, value in sweep["scaling"]["law"].items() if name != "exponent"})
    sizes: dict[float, list[tuple[float, float]]] = {}
    for point in sweep["points"]:
        if is_number(point.get("eval_loss")):
            sizes.setdefault(point["parameters"], []).append((point["tokens"], point["eval_loss"]))
    drawn = []
    for number, (size, runs) in enumerate(sorted(sizes.items())):
        style, lengths = STYLES[number % len(STYLES)], [tokens for tokens, _ in runs]
        ratio = max(lengths) / min(lengths)
        places = [min(lengths) * ratio ** (step / CURVE) for step in range(CURVE + 1)]
        drawn.append(Series("", [(place, law.loss(size, place)) for place in places], style))
        dots: Points = [dot for tokens, loss in sorted(runs) for dot in ((tokens, loss), (tokens, None))]
        drawn.append(Series(f"{format_short(size)} parameters", dots, style))
    return line_chart(drawn, "Validation loss, nats per token", x_label="tokens", tall=True, log_x=True)


def setting_charts(sweep: dict[str, Any]) -> list[str]:
    """Return a chart for each setting of numbers: the best loss reached at each value, whatever the others are."""
    charts = []
    for key, values in sweep["grid"].items():
        if len(values) < 2 or not all(map(is_number, values)):
            continue
        least: dict[float, float] = {}
        for point in sweep["points"]:
            value, loss = point["settings"][key], point.get("eval_loss")
            if is_number(loss):
                least[value] = min(loss, least.get(value, loss))
        curve = Series("best loss", sorted(least.items()), dots=True)
        name, log_x = key.rsplit(".", 1)[-1], min(values) > 0
        charts.append(line_chart([curve], f"Loss by {name}", x_label=name, log_x=log_x))
    return charts
