"""The benchmarks run: the one for a GPU in its CPU form, and a comparison at the smallest size."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *words: str) -> str:
    """Run a benchmark and return what it prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_gpu_script_in_its_cpu_form_finds_training_right(tmp_path: Path) -> None:
    shown = run("gpu.py", "--cpu", "--output", str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "gpu_on_cpu.jsonl").read_text("utf-8").splitlines()]
    checks = {line["name"]: line["ok"] for line in lines if "ok" in line}
    assert len(checks) >= 7 and all(checks.values()), lines
    timed = [line["name"] for line in lines if line.get("tokens_per_second")]
    assert timed == ["toy", "toy, documents apart", "toy, recomputed", "toy, Trainer", "toy, bare"]
    assert "failed: none" in shown and all(f"| {name} |" in shown for name in timed)


def test_gpu_script_stops_before_its_deadline_and_keeps_what_it_has(tmp_path: Path) -> None:
    run("gpu.py", "--cpu", "--minutes", "0", "--output", str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "gpu_on_cpu.jsonl").read_text("utf-8").splitlines()]
    assert lines and all("skipped" in line for line in lines)


def test_learning_curves_are_drawn_from_what_runs_leave(tmp_path: Path) -> None:
    for name, slope in (("muon", 2.0), ("adamw", 1.0)):
        lines = [
            {"step": step, "loss": 8 - slope * step / 50, "tokens": 64 * step, "seconds": 0.5 * step}
            for step in range(1, 101)
        ]
        lines += [{"step": step, "eval_loss": 8 - slope * step / 50} for step in (50, 100)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    runs = [f"{label}={tmp_path / label.lower()}" for label in ("Muon", "AdamW")]
    run("learning.py", "draw", "toy", "A <toy>", *runs, "--output", str(tmp_path))
    figures = json.loads((tmp_path / "learning_toy.json").read_text("utf-8"))["runs"]
    assert figures["Muon"]["validation"] == [[3200, 25.0, 6.0], [6400, 50.0, 4.0]]
    plot = ElementTree.parse(tmp_path / "learning_toy.svg")
    dots = [dot for dot in plot.iter("{http://www.w3.org/2000/svg}circle") if dot.get("r") == "3"]
    # Two axes, two runs, two evaluations each: the lowest loss at the foot of its axes, half of the way at its half.
    places = [(dot.get("cx"), dot.get("cy")) for dot in dots]
    assert len(places) == 8 and places.count(("400.0", "260.0")) == 2 and {cx for cx, _ in places} == {"200.0", "400.0"}


@pytest.mark.slow
def test_sides_take_their_turns(tmp_path: Path) -> None:
    words = "--tasks tiny --pairs 2 --steps 3 --peers hfkit,bare".split()
    run("train_speed.py", *words, "--output", str(tmp_path))
    tiny = json.loads((tmp_path / "train_speed.json").read_text("utf-8"))["tiny"]
    assert tiny["bare"]["ours_is_faster_by"]["median"] > 0 and tiny["hfkit"]["last_loss"] > 0
