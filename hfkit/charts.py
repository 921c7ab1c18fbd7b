"""Charts as inline SVG: no script, no network, readable at any width.

Curves are drawn in a box that stretches with the page (lines keep their width), and every word stands outside of it as
HTML placed by percentages, so that text keeps its size on a phone. Hovering over a curve shows its figures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, TypeGuard

Points = Sequence[tuple[float, float | None]]  # (x, y); a y of None is a gap
POINTS = 600  # drawn per curve at most
HOVERS = 150  # columns with a hover title at most


@dataclass
class Series:
    """One curve: ``style`` is a class of the page's style sheet (``main``, ``second`` … ``fifth``, ``faint``)."""

    name: str
    """Empty for a curve that needs no word: neither the legend nor hovering tells of it."""
    points: Points
    style: str = "main"
    dots: bool = False
    """Mark each point, for curves of few points."""


def format_number(value: float) -> str:
    """Return a number for people: thousands separated, small ones to four figures.

    Example:
        >>> [format_number(value) for value in (1234567, 1234.5678, 3.14159, 0.00012345, 2.0)]
        ['1,234,567', '1,235', '3.142', '0.0001234', '2']
    """
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.4g}"


def format_short(value: float) -> str:
    """Return a number for an axis, a card or a bar: three figures and a power of a thousand.

    Example:
        >>> [format_short(value) for value in (0, 0.25, 950, 1500, 12_345, 3_000_000, 0.00005)]
        ['0', '0.25', '950', '1.5k', '12.3k', '3M', '5e-05']
    """
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def find_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``, both inside.

    Example:
        >>> find_ticks(2.9, 10.4), find_ticks(0, 0.001, 4)
        ([4.0, 6.0, 8.0, 10.0], [0.0, 0.00025, 0.0005, 0.00075, 0.001])
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def find_log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers of a logarithmic axis: 1, 2 and 5 of each power of ten, or, of many powers, 1 alone.

    Example:
        >>> find_log_ticks(0.0009, 0.03), find_log_ticks(3.5, 6.2)
        ([0.001, 0.002, 0.005, 0.01, 0.02], [4.0, 5.0, 6.0])
    """
    if high < 5 * low:
        return find_ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) < 5 else (1,)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def downsample(points: Points, limit: int = POINTS) -> Points:
    """Return at most ``limit`` points: of each stretch the lowest and the highest, so that no spike disappears.

    Example:
        >>> downsample([(0, 1.0), (1, 9.0), (2, 1.5), (3, None), (4, None), (5, None)], limit=4)
        [(0, 1.0), (1, 9.0), (3, None)]
    """
    if len(points) <= limit:
        return points
    stretches = limit // 2
    kept: list[tuple[float, float | None]] = []
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        numbers = [(x, y) for x, y in stretch if y is not None]
        if numbers:
            kept += sorted({min(numbers, key=lambda point: point[1]), max(numbers, key=lambda point: point[1])})
        else:
            kept.append(stretch[0])
    return kept


def smooth(points: Points, reach: int) -> Points:
    """Return the mean over ``reach`` points to either side; a gap stays a gap.

    Near the start fewer points count, the same number to both sides, so that the curve does not lag behind a steep fall
    as an exponential mean does.

    Example:
        >>> smooth([(1, 8.0), (2, 4.0), (3, 3.0), (4, None), (5, 2.0), (6, 1.0)], reach=1)
        [(1, 8.0), (2, 5.0), (3, 3.5), (4, None), (5, 1.5), (6, 1.5)]
    """
    result: list[tuple[float, float | None]] = []
    for index, (x, y) in enumerate(points):
        side = min(reach, index)
        window = [value for _, value in points[index - side : index + side + 1] if value is not None]
        result.append((x, None if y is None else sum(window) / len(window)))
    return result


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str = "step",
    y_format: Callable[[float], str] = format_short,
    tall: bool = False,
    log_x: bool = False,
) -> str:
    """Return a chart with axes, legend and hover titles; empty text where no series has a number.

    Args:
        series: Curves over one x axis; the first that are given lie below.
        title: What the y axis shows, with its unit.
        y_format: Turns a y value into a tick label.
        tall: A chart of the page's width, rather than one beside others.
        log_x: A logarithmic x axis, for values above 0.
    """
    cleaned = [Series(s.name, [(x, y if is_number(y) else None) for x, y in s.points], s.style, s.dots) for s in series]
    drawn = [s for s in cleaned if any(y is not None for _, y in s.points)]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    left, right = _span(xs, around_zero=False)
    low, high = _span([y for s in drawn for _, y in s.points if y is not None], around_zero=True)
    across, up = _scale(left, right, log_x), _scale(low, high, False)

    def place(x: float, y: float) -> str:
        return f"{1000 * across(x):.1f} {1000 - 1000 * up(y):.1f}"

    count = 6 if tall else 4
    y_ticks = find_ticks(low, high, count)
    x_ticks = find_log_ticks(left, right) if log_x else find_ticks(left, right, count)
    if all(x == int(x) for x in xs):  # such as steps, of which there is no half
        x_ticks = [x for x in x_ticks if x == int(x)]
    grid = "".join(f'<path class="grid" d="M{place(left, y)}H1000"/>' for y in y_ticks)
    curves = "".join(_draw(s, place) for s in drawn)
    y_labels = "".join(
        f'<span class="y" style="bottom:{100 * up(y):.2f}%">{escape(y_format(y))}</span>' for y in y_ticks
    )
    x_labels = "".join(f'<span class="x" style="left:{100 * across(x):.2f}%">{format_short(x)}</span>' for x in x_ticks)
    named = [s for s in drawn if s.name]
    legend = "".join(f'<span class="key {s.style}">{escape(s.name)}</span>' for s in named) if len(named) > 1 else ""
    return (
        f'<figure class="chart{" tall" if tall else ""}"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{grid}{curves}{_hovers(named, x_label, across)}</svg>{y_labels}{x_labels}'
        f'</div><p class="axis">{escape(x_label)}</p></figure>'
    )


def bar_list(rows: Sequence[tuple[str, float]], total: float | None = None) -> str:
    """Return labelled horizontal bars, each with its figure and, where ``total`` is given, its share of it."""
    longest = max((value for _, value in rows), default=0) or 1
    lines = []
    for label, value in rows:
        share = f" <small>{f'{value / total:.1%}' if value / total >= 0.0005 else '< 0.1%'}</small>" if total else ""
        lines.append(
            f'<div class="bar"><span>{escape(label)}</span><i><b style="width:{100 * value / longest:.2f}%"></b></i>'
            f"<span>{format_number(value)}{share}</span></div>"
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def column_chart(counts: Sequence[tuple[str, float]], title: str, x_label: str) -> str:
    """Return a histogram: one column a label, with hover titles; the first, middle and last label are written."""
    highest = max((count for _, count in counts), default=0)
    if not highest:
        return ""
    width = 1000 / len(counts)
    columns = "".join(
        f'<rect class="column" x="{index * width + width * 0.06:.1f}" y="{1000 - 1000 * count / highest:.1f}" '
        f'width="{width * 0.88:.1f}" height="{1000 * count / highest:.1f}">'
        f"<title>{escape(label)}: {format_number(count)}</title></rect>"
        for index, (label, count) in enumerate(counts)
    )
    written = sorted({0, len(counts) // 2, len(counts) - 1})
    x_labels = "".join(
        f'<span class="x" style="left:{(index + 0.5) * width / 10:.2f}%">{escape(counts[index][0])}</span>'
        for index in written
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">{columns}'
        f'</svg><span class="y" style="bottom:100%">{format_short(highest)}</span>{x_labels}</div>'
        f'<p class="axis">{escape(x_label)}</p></figure>'
    )


def _span(values: Sequence[float], around_zero: bool) -> tuple[float, float]:
    """Return the least and greatest value, widened where they are one; a y axis near zero begins at zero."""
    low, high = min(values), max(values)
    if around_zero and 0 < low < 0.4 * high:
        low = 0.0
    if low == high:
        margin = abs(low) / 2 or 1.0
        return low - margin, high + margin
    return low, high + (0.03 * (high - low) if around_zero else 0.0)


def _scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """Return value → place on an axis from 0 to 1."""
    if log:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def _draw(series: Series, place: Callable[[float, float], str]) -> str:
    """Return one curve as a path, interrupted at gaps; a point alone between gaps becomes a dot."""
    points = downsample(series.points)
    values = [y for _, y in points]
    path, dots = [], []
    for index, (x, y) in enumerate(points):
        if y is None:
            continue
        begins = index == 0 or values[index - 1] is None
        path.append(("M" if begins else "L") + place(x, y))
        if series.dots or (begins and (index + 1 == len(values) or values[index + 1] is None)):
            dots.append(f"M{place(x, y)}h0")  # a round cap makes a dot that does not stretch with the box
    dotted = f'<path class="dot {series.style}" d="{"".join(dots)}"/>' if dots else ""
    return f'<path class="curve {series.style}" d="{"".join(path)}"/>{dotted}'


def _hovers(series: Sequence[Series], x_label: str, across: Callable[[float], float]) -> str:
    """Return invisible columns over the chart whose titles name the figures nearest to them."""
    figures: dict[float, list[str]] = {}
    for one in series:
        for x, y in one.points:
            if y is not None:
                figures.setdefault(x, []).append(f"{one.name} {format_number(y)}")
    every = sorted(figures)
    shown = every[:: -(-len(every) // HOVERS)]
    edges = [0.0, *((across(a) + across(b)) / 2 for a, b in pairwise(shown)), 1.0]
    columns = []
    for x, (start, end) in zip(shown, pairwise(edges), strict=True):
        begin, width = 1000 * start, 1000 * (end - start)
        title = escape(f"{x_label} {format_number(x)}\n" + "\n".join(figures[x]))
        columns.append(
            f'<rect class="hover" x="{begin:.1f}" y="0" width="{width:.1f}" height="1000"><title>{title}</title></rect>'
        )
    return "".join(columns)
