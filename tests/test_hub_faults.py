"""Whole runs under every fault of the Hub: the exit status, the local files, what a step waits, and the push after."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from hfkit.checkpoint import list_checkpoints, read_checkpoint
from hub_home import (  # noqa: F401
    forking_server,
    healthy_hub,
    home_folder,
    hub_of_this_module,
    settings,
    signed_in_environment,
)
from local_hub import WRITE, LocalHub
from runs import ROOT, Ended, Server, command_line

pytestmark = pytest.mark.slow

STEPS = 12
STATUSES: tuple[int | str, ...] = (401, 403, 404, 409, 412, 429, 500, 503)
FAULTS: list[tuple[str, int | str]] = [
    *(("commit", fault) for fault in (*STATUSES, "cut_request", "cut_reply", "hang")),
    *(("lfs_put", fault) for fault in (403, 503, "cut_request", "cut_reply", "hang", "corrupt")),
    ("branch", 503),
    ("whoami", 503),
]
LANDED = [("commit", "cut_reply"), ("lfs_put", "cut_reply"), ("whoami", 503)]  # nothing is missing on the Hub then


@pytest.fixture(scope="module", name="table")
def table_of_times() -> Iterator[list[str]]:
    """Lines of figures, printed at the end (pytest -s)."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join(lines))


def times(run: Ended) -> str:
    """Return what the run noted of its steps and hand-overs, in milliseconds."""
    notes = [json.loads(line) for line in run.output_dir.with_suffix(".times").read_text().splitlines()]
    ends = [note["stepped"] for note in notes if "stepped" in note]
    steps = [1000 * (later - earlier) for earlier, later in pairwise(ends)]
    handed, worked = (
        [1000 * note[name] for note in notes if name in note] or [0.0] for name in ("handed_over", "worked")
    )
    timed = {"step": steps, "hand-over": handed, "its CPU time": worked}
    figures = [f"{name} {median(values):6.1f} max {max(values):6.1f}" for name, values in timed.items()]
    return f"{run.output_dir.name:20} exit {run.code}, " + ", ".join(figures)


@pytest.fixture(scope="module", name="alone")
def run_without_hub(server: Server, home: Path, table: list[str]) -> Ended:
    """The run that publishes nothing."""
    words = settings(home, "me/none", train__max_steps=STEPS, train__save_every=1)
    words = {key: value for key, value in words.items() if not key.startswith("hub.")}
    ended = server.run("pretrain", words, home / "alone", before="hub_children.measured")
    assert ended.code == 0, ended.stderr
    table.append(times(ended))
    return ended


@pytest.mark.parametrize(
    ("kind", "fault", "include"),
    [("commit", None, True), *((kind, fault, True) for kind, fault in FAULTS), ("branch", 503, False)],
)
def test_run_ends_as_documented_and_a_later_push_completes(
    hub: LocalHub,
    server: Server,
    home: Path,
    alone: Ended,
    table: list[str],
    kind: str,
    fault: int | str | None,
    include: bool,
) -> None:
    name = f"{kind}-{fault}" + ("" if include else "-weights")
    for path in hub.store.folder.glob("?" * 64):  # every run has the same weights, and what is there is not sent again
        path.unlink()
    if fault is not None:
        hub.fail(kind, fault, times=None, **({"Retry_After": "1"} if fault == 429 else {}))
    changed = {
        "hub__push_every": 1,
        "hub__include_checkpoints": include,
        "train__save_every": 1,
        "train__max_steps": STEPS,
    }
    ended = server.run("pretrain", settings(home, f"me/{name}", **changed), home / name, before="hub_children.measured")
    table.append(times(ended))
    landed = fault is None or (kind, fault) in LANDED
    assert (ended.code, ended.status["push"]) == (0, "done" if landed else "failed"), ended.stderr
    assert (ended.metrics, ended.weights) == (alone.metrics, alone.weights)
    kept = list_checkpoints(ended.output_dir / "checkpoints")
    assert [read_checkpoint(folder)["step"] for folder in kept][-1] == STEPS
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: pushing")]
    assert bool(warnings) != landed and not any(WRITE in line for line in warnings)

    hub.heal()
    words = {"hub.repo_id": f"me/{name}", "hub.push_every": 1, "hub.include_checkpoints": include}
    done = server.run("push", words, ended.output_dir)
    assert (done.code, done.stdout) == (0, f"{hub.url}/me/{name}\n"), done.stderr
    main = hub.files(f"me/{name}")
    assert main["model.safetensors"] == ended.weights and b"Perplexity" in main["README.md"]
    for folder in kept:
        files = hub.files(f"me/{name}", folder.name)
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        for path in folder.iterdir() if include else []:
            assert files[f"checkpoint/{path.name}"] == path.read_bytes()


def test_of_two_processes_one_publishes(
    hub: LocalHub, home: Path, alone: Ended, environment: dict[str, str], tmp_path: Path
) -> None:
    words = settings(home, "me/two", hub__include_checkpoints=True, train__max_steps=STEPS, train__save_every=4)
    words |= {"hub.push_every": 4, "output_dir": home / "two"}
    launcher = ["accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    command = [sys.executable, "-m", *launcher, "recipes/pretrain.py", *command_line(words)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)
    ended = Ended(done.returncode, done.stdout, done.stderr, home / "two")
    assert (ended.code, ended.status["push"]) == (0, "done"), ended.stderr
    passport = json.loads((home / "two" / "passport.json").read_text())
    assert passport["sessions"][-1]["num_processes"] == 2
    repo = hub.repo("me/two")
    pushed = sorted(repo.branches)[1:]
    assert pushed and pushed[-1] == f"step-{STEPS:08d}"
    titles = Counter(commit.title for commit in repo.commits.values())
    assert titles["Publish the model"] == 1 and max(titles.values()) <= 2  # of a step: on main, on its branch
    assert hub.files("me/two")["model.safetensors"] == ended.weights
    assert ended.stderr.count("Published: ") == 1
