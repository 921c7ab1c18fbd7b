"""Learning curves of several runs over tokens and over seconds of one core, as a plot and as figures.

    OMP_NUM_THREADS=1 python benchmarks/learning.py train --config some.yaml --output_dir runs/muon
    python benchmarks/learning.py draw wikitext2 "WikiText-2, 5.3 M parameters" Muon=runs/muon AdamW=runs/adamw

``train`` takes the flags of recipes/pretrain.py and does the same under a clock that counts the process's CPU time:
where others use the machine too, the wall's seconds would compare the neighbours. Evaluating and saving do not count,
as in every run's training seconds.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from hfkit.charts import Points, find_ticks, format_short, smooth
from hfkit.files import read_json, write_atomic
from hfkit.tracking import Throughput, read_metrics
from results import FOLDER, save_result

WIDTH, HEIGHT = 400, 260  # of a pair of axes, in the units of the SVG
BEGIN = 0.06  # share of the longest run before which losses are not drawn: they would flatten the rest
KINDS = ("training", "validation")
FIGURES = ("parameters", "tokens", "steps", "seconds", "eval_loss", "bits_per_byte")
COLOURS = ("main", "second", "third")
STYLE = """
svg { font: 13px system-ui, sans-serif; --paper: #fcfbf9; --ink: #23252a; --soft: #6a6d75; --line: #e2dfd8;
  --main: #2b6a94; --second: #c0582b; --third: #3d7a4f; }
@media (prefers-color-scheme: dark) { svg { --paper: #16181c; --ink: #e3e3e0; --soft: #989ba3; --line: #31353c;
  --main: #74b3dc; --second: #e8935f; --third: #7fbf93; } }
rect { fill: var(--paper); } text { fill: var(--soft); } .title { fill: var(--ink); font-weight: 600; }
path { fill: none; stroke-width: 2; stroke-linejoin: round; } .validation { stroke-width: 1; }
.grid { stroke: var(--line); stroke-width: 1; } .end { text-anchor: end; } .middle { text-anchor: middle; }
path.main { stroke: var(--main); } path.second { stroke: var(--second); } path.third { stroke: var(--third); }
circle.main { fill: var(--main); } circle.second { fill: var(--second); } circle.third { fill: var(--third); }
"""

Place = Callable[[float, float], tuple[float, float]]


def train(words: list[str]) -> None:
    """Pretrain as the recipe does, under a clock of CPU seconds."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
    import pretrain

    from hfkit import recorder
    from hfkit.config import parse_config
    from hfkit.launch import launch

    recorder.Throughput = functools.partial(Throughput, clock=time.process_time)  # type: ignore[misc, assignment]
    launch(pretrain.main, parse_config(pretrain.PretrainConfig, words))


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's final figures and its curves: [tokens, CPU seconds, nats per token], training smoothed."""
    lines = read_metrics(folder / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    if not training:
        raise SystemExit(f"error: {folder} has no metrics.jsonl with training lines; give the output_dir of a run")
    at = {line["step"]: [line["tokens"], round(line["seconds"], 2)] for line in training}
    evaluated = [line for line in lines if "eval_loss" in line and line["step"] in at]
    smoothed = smooth([(line["step"], line["loss"]) for line in training], len(training) // 40)
    smoothed = [*smoothed[:: max(1, len(smoothed) // 50)], *smoothed[-1:]]
    result = read_json(folder / "result.json") or {}
    return {
        **{name: result[name] for name in FIGURES if name in result},
        "training": [[*at[int(step)], round(loss or 0.0, 4)] for step, loss in smoothed],
        "validation": [[*at[line["step"]], round(line["eval_loss"], 4)] for line in evaluated],
    }


def draw_panel(runs: dict[str, dict[str, Any]], axis: int, label: str) -> str:
    """Return one pair of axes with every run's curves over tokens (``axis`` 0) or seconds (1)."""
    tokens, right = (max(run["training"][-1][end] for run in runs.values()) for end in (0, axis))
    curves = [
        {kind: [(p[axis], p[2]) for p in run[kind] if p[0] > BEGIN * tokens] for kind in KINDS} for run in runs.values()
    ]
    losses = [loss for curve in curves for kind in KINDS for _, loss in curve[kind]]
    low, high = min(losses), max(losses)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(WIDTH * x / right, 1), round(HEIGHT * (high - y) / (high - low), 1)

    parts = []
    for loss in find_ticks(low, high):
        y = place(0, loss)[1]
        parts.append(f'<path class="grid" d="M0 {y}H{WIDTH}"/><text class="end" x="-8" y="{y + 4}">{loss:g}</text>')
    for tick in find_ticks(0, right, 4):
        parts.append(f'<text class="middle" x="{place(tick, 0)[0]}" y="{HEIGHT + 20}">{format_short(tick)}</text>')
    for curve, colour in zip(curves, COLOURS, strict=False):
        parts += [_path(curve[kind], place, f"{colour} {kind}") for kind in KINDS]
        dots = [place(x, y) for x, y in curve["validation"]]
        parts += [f'<circle class="{colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in dots]
    return "".join(parts) + f'<text class="end" x="{WIDTH}" y="{HEIGHT + 40}">{escape(label)}</text>'


def _path(points: Points, place: Place, classes: str) -> str:
    places = [place(x, y) for x, y in points if y is not None]
    return f'<path class="{classes}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>' if places else ""


def draw(title: str, runs: dict[str, dict[str, Any]]) -> str:
    """Return the plot as one SVG file: losses over tokens on the left, over seconds on the right."""
    key = "".join(
        f'<circle class="{colour}" cx="{720 + 100 * index}" cy="20" r="4"/>'
        f'<text x="{730 + 100 * index}" y="25">{escape(name)}</text>'
        for index, (name, colour) in enumerate(zip(runs, COLOURS, strict=False))
    )
    panels = (draw_panel(runs, 0, "tokens"), draw_panel(runs, 1, "CPU seconds, one thread"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 360" width="940"><style>{STYLE}</style>'
        f'<rect width="940" height="360" rx="8"/><text class="title" x="15" y="25">{escape(title)}: nats per token, '
        f"training (lines) and validation (dots)</text>{key}"
        f'<g transform="translate(52 48)">{panels[0]}</g><g transform="translate(516 48)">{panels[1]}</g></svg>\n'
    )


def main() -> None:
    """Train one run, or draw several."""
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["train", "draw"])
    parser.add_argument("name", help="of the files: results/learning_NAME.svg and .json")
    parser.add_argument("title", help="written above the plot")
    parser.add_argument("runs", nargs="+", help="LABEL=OUTPUT_DIR, up to three")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the figures")
    arguments = parser.parse_args()
    runs = {label: read_run(Path(folder)) for label, folder in (run.split("=", 1) for run in arguments.runs)}
    save_result(f"learning_{arguments.name}", {"title": arguments.title, "runs": runs}, arguments.output)
    write_atomic(arguments.output / f"learning_{arguments.name}.svg", draw(arguments.title, runs))


if __name__ == "__main__":
    main()
