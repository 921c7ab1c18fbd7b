"""The shell of hfkit's HTML pages: one self-contained file, light and dark, for a screen, a phone or paper."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --card: #f4f2ee; --ink: #23252a; --soft: #6a6d75; --line: #e2dfd8;
  --main: #2b6a94; --second: #c0582b; --third: #4f8a4d; --fourth: #8b5aa8; --fifth: #a98528;
  --good: #3d7a4f; --bad: #b23a3a; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --card: #1f2227; --ink: #e3e3e0; --soft: #989ba3;
  --line: #31353c; --main: #74b3dc; --second: #e8935f; --third: #8cc48a; --fourth: #c39bde; --fifth: #dcbd6a;
  --good: #7fbf93; --bad: #e58080; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; font-weight: 650; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; letter-spacing: -.01em; font-weight: 650; margin: 3.2rem 0 1rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 1.8rem 0 .5rem; }
p { margin: .5rem 0; } .soft, small, .axis { color: var(--soft); } small { font-size: .82em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin: 2rem 0 0; }
.card { background: var(--card); border-radius: .6rem; padding: .85rem 1rem .8rem; }
.card span { display: block; font-size: .8rem; color: var(--soft); }
.card b { display: block; font-size: 1.5rem; line-height: 1.35; font-weight: 600; letter-spacing: -.02em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; break-inside: avoid; } .chart.tall { margin-bottom: 2rem; }
figcaption { font-size: .85rem; margin-bottom: .9rem; display: flex; flex-wrap: wrap; gap: 0 1.1rem; }
figcaption b { font-weight: 600; margin-right: auto; }
.key { color: var(--soft); white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 1.1em; height: 0; border-top: 2.5px solid;
  margin-right: .45em; vertical-align: .28em; border-radius: 2px; }
.key.main::before { color: var(--main); } .key.second::before { color: var(--second); }
.key.third::before { color: var(--third); } .key.fourth::before { color: var(--fourth); }
.key.fifth::before { color: var(--fifth); }
.key.faint::before { color: var(--main); opacity: .5; }
.plot { position: relative; height: 9.5rem; margin: 0 .8rem 1.5rem 3.2rem; } .tall .plot { height: 19rem; }
svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; } .curve { stroke-width: 2; } .dot { stroke-width: 6; }
path.main { stroke: var(--main); } path.second { stroke: var(--second); } path.third { stroke: var(--third); }
path.fourth { stroke: var(--fourth); } path.fifth { stroke: var(--fifth); }
path.faint { stroke: var(--main); stroke-width: 1; opacity: .5; }
.column { fill: var(--main); } .hover { fill: transparent; } .hover:hover { fill: var(--soft); fill-opacity: .18; }
.y, .x { position: absolute; font-size: .75rem; line-height: 1; color: var(--soft); white-space: nowrap; }
.y { right: calc(100% + .6rem); transform: translateY(50%); }
.x { top: calc(100% + .6rem); transform: translateX(-50%); }
.axis { text-align: right; font-size: .75rem; line-height: 1; margin: 0 .8rem 0 0; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.2rem .38rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
td.number, th.number { text-align: right; padding: .38rem 0 .38rem 1.2rem; }
.facts { columns: 24rem; column-gap: 3rem; margin: 0; font-size: .9rem; }
.facts div { display: grid; grid-template-columns: minmax(8rem, 12rem) 1fr; gap: 1rem; padding: .38rem 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.charts .curve { stroke-width: 1.5; }
.confusion { width: auto; } caption { text-align: left; padding-bottom: .5rem; }
.confusion td { text-align: right; min-width: 4.5rem; padding: .5rem .8rem;
  border: 1px solid var(--paper); } .confusion th { border: 0; }
.bar { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr minmax(5.5rem, auto); gap: 1rem; font-size: .9rem;
  align-items: center; padding: .2rem 0; } .bar span:last-child { text-align: right; }
.bar i { background: var(--card); border-radius: 3px; height: .7rem; overflow: hidden; }
.bar b { display: block; height: 100%; background: var(--main); }
blockquote { margin: 1rem 0; padding: .1rem 0 .1rem 1.2rem; border-left: 3px solid var(--line); break-inside: avoid;
  font: 1.02rem/1.6 Charter, "Bitstream Charter", "Source Serif Pro", Georgia, "Noto Serif", "DejaVu Serif", serif;
  white-space: pre-wrap; overflow-wrap: anywhere; } blockquote b { font-weight: 600; color: var(--main); }
pre { background: var(--card); border-radius: .6rem; padding: 1rem 1.2rem; font: .82rem/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); } .good { color: var(--good); }
.bad { color: var(--bad); } p.bad { margin-bottom: 1.5rem; }
@media (max-width: 34rem) { main { padding: 2rem 1.1rem 3rem; } h1 { font-size: 1.5rem; } .tall .plot { height: 14rem; }
  .bar { grid-template-columns: 1fr auto; gap: .1rem 1rem; padding: .4rem 0; }
  .bar i { grid-row: 2; grid-column: 1 / 3; }
  .cards { grid-template-columns: 1fr 1fr; } figcaption b { flex-basis: 100%; } }
@media print { body { font-size: 11px; } main { max-width: none; padding: 0; } .card, pre { border: 1px solid #ddd; }
  h2 { break-after: avoid; } }
"""


def page(title: str, body: str) -> str:
    """Return a whole HTML page around ``body`` (HTML); nothing in it is loaded from anywhere or executed."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a headed section; empty text where all its parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures, each as (name, value, explanation), side by side."""
    items = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for name, value, note in figures
    )
    return f'<div class="cards">{items}</div>' if items else ""


def show(value: Any) -> str:
    """Return a value from a JSON file as text for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    if isinstance(value, list):
        return ", ".join(show(item) for item in value)
    return str(value)


def flatten_facts(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested facts with their path.

    Example:
        >>> flatten_facts({"steps": 10, "documents": {"read": 3, "kept": 2}})
        [('steps', 10), ('documents read', 3), ('documents kept', 2)]
    """
    facts: list[tuple[str, Any]] = []
    for name, item in value.items():
        label = f"{prefix} {name}".strip().replace("_", " ")
        facts += flatten_facts(item, label) if isinstance(item, dict) else [(label, item)]
    return facts


def facts_table(facts: dict[str, Any]) -> str:
    """Return names and values, in two columns where the page is wide enough."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(show(value))}</dd></div>" for name, value in flatten_facts(facts)
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table with a header; numbers stand at the right."""
    lines = [[(show(cell), isinstance(cell, (int, float))) for cell in row] for row in rows]
    if not lines:
        return ""
    numeric = [all(line[column][1] for line in lines) for column in range(len(header))]
    kind = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(header, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{escape(text)}</td>" for (text, _), mark in zip(line, kind, strict=True)) + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def quote(text: str, lead: str = "") -> str:
    """Return a passage of text, ``lead`` (a prompt) set apart in front of it."""
    return f"<blockquote>{f'<b>{escape(lead)}</b>' if lead else ''}{escape(text)}</blockquote>"


def shorten(text: Any, length: int) -> str:
    """Return at most ``length`` characters of a text."""
    text = str(text)
    return text if len(text) <= length else text[:length].rstrip() + " …"


def fold(summary: str, body: str) -> str:
    """Return ``body`` behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>" if body else ""
