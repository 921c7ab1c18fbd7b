"""Whole runs under every fault of the Hub: the exit status, the local files, what a step waits, and the push after."""

import json
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
from runs import Ended, Server

pytestmark = pytest.mark.slow

STEPS = 40
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
    handed = [1000 * note["handed_over"] for note in notes if "handed_over" in note] or [0.0]
    figures = [
        f"{name} {median(values):6.1f} max {max(values):6.1f}"
        for name, values in (("step", steps), ("hand-over", handed))
    ]
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


@pytest.mark.parametrize(("kind", "fault"), [("commit", None), *FAULTS])
def test_run_ends_as_documented_and_a_later_push_completes(
    hub: LocalHub, server: Server, home: Path, alone: Ended, table: list[str], kind: str, fault: int | str | None
) -> None:
    name = f"{kind}-{fault}"
    if fault is not None:
        hub.fail(kind, fault, times=None, **({"Retry_After": "1"} if fault == 429 else {}))
    changed = {
        "hub__push_every": 1,
        "hub__include_checkpoints": True,
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
    words = {"hub.repo_id": f"me/{name}", "hub.include_checkpoints": True}
    done = server.run("push", words, ended.output_dir)
    assert (done.code, done.stdout) == (0, f"{hub.url}/me/{name}\n"), done.stderr
    main = hub.files(f"me/{name}")
    assert main["model.safetensors"] == ended.weights and b"Perplexity" in main["README.md"]
    for folder in kept:
        files = hub.files(f"me/{name}", folder.name)
        for path in folder.iterdir():
            assert files[f"checkpoint/{path.name}"] == path.read_bytes()
