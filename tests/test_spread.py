"""Preparation spread over tasks: the same files as one machine's, through the recipe and datatrove's executors."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from hfkit.data import executors, once, spread
from hfkit.data.executors import run_tasks
from hfkit.data.prepare import prepare_data
from hfkit.data.spread import spread_over
from hfkit.settings import BadInput, ExecutorConfig
from planted import plant
from runs import Ended, Server, Words, shared_server
from test_prepare import SMALL, hashes, read_audit, small


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A mixture of five files and two, with defects, and copies of the first source's text in the second."""
    folder = tmp_path_factory.mktemp("spread")
    plant(folder, line=200_000)
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    sources = {"one": [lines[place::5] for place in range(5)], "two": [lines[:40], lines[100:300:3]]}
    for source, files in sources.items():
        (folder / source).mkdir()
        for number, content in enumerate(files):
            (folder / source / f"{number}.jsonl").write_bytes(b"".join(content))
    return {
        "data.sources": [{"path": str(folder / source), "name": source} for source in sources],
        "data.test_files": folder / "test.txt",
        "data.document": "line",
        "data.on_error": "skip",
        "tokenizer.vocab_size": 400,
    }


@pytest.fixture(scope="module")
def alone(server: Server, settings: Words, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The recipe on one machine."""
    return prepare(server, settings, tmp_path_factory.mktemp("alone"))


def prepare(server: Server, settings: Words, folder: Path, **more: Any) -> Ended:
    """Run the recipe."""
    return server.run("prepare", {**settings, **more, "data.cache_dir": folder / "cache"}, folder / "run")


def check_same(ended: Ended, alone: Ended) -> None:
    """See that a run left what one machine left, and nothing else."""
    assert ended.code == 0, ended.stderr
    cache = ended.output_dir.parent / "cache"
    expected = hashes(alone.output_dir.parent / "cache")
    assert len(expected) == 13  # four texts, each with tokens and starts, and what overlaps
    assert hashes(cache) == expected
    assert read_audit(ended) == read_audit(alone)
    assert not list(cache.glob(".parts-*")) and not list(cache.glob(".tmp-*"))


LOCAL: Words = {"executor.name": "local", "executor.tasks": 3, "executor.options": {"workers": 2}}


def test_two_workers_leave_the_same_files(server: Server, settings: Words, alone: Ended, tmp_path: Path) -> None:
    ended = prepare(server, settings, tmp_path, **LOCAL)
    check_same(ended, alone)
    assert "clean: 3 of 3 tasks by datatrove's local executor" in ended.stderr
    removed = read_audit(ended)["removed"]
    assert min(removed[rule] for rule in ("exact_duplicates", "near_duplicates", "contaminated", "unreadable")) > 5
    assert json.loads(prepare(server, settings, tmp_path).stdout)["reused"]  # without tasks: nothing is left to do


def test_bad_input_of_a_task_is_one_line(server: Server, settings: Words, tmp_path: Path) -> None:
    ended = prepare(server, settings, tmp_path, **LOCAL, **{"data.on_error": "stop"})
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ") and ".jsonl:" in ended.stderr.splitlines()[-1]
    assert not list((tmp_path / "cache").glob("text-*"))


def test_what_cannot_be_spread_is_refused(server: Server, settings: Words, tmp_path: Path) -> None:
    ended = prepare(server, settings, tmp_path, **LOCAL, **{"data.split_by": "characters"})
    assert ended.code == 2 and "executor.name none" in ended.stderr
    ended = prepare(server, settings, tmp_path, **{**LOCAL, "executor.options": {"nodes": 2}})
    assert ended.code == 2 and "error: executor.options: got an unexpected keyword argument 'nodes'" in ended.stderr
    for wrong in ({"name": "slurm"}, {"name": "local", "tasks": 0}):
        with pytest.raises(BadInput, match="executor"):
            ExecutorConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_was_completed(
    server: Server, settings: Words, alone: Ended, tmp_path: Path
) -> None:
    def kill(pid: int, _: Path) -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/.parts-text-*/3-tasks/logs/clean/completions/*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    words = {**settings, **LOCAL, "data.cache_dir": tmp_path / "cache"}
    killed = server.run("prepare", words, tmp_path / "run", kill)
    assert killed.code == -signal.SIGKILL
    (done,) = tmp_path.glob("cache/.parts-text-*/3-tasks/logs/clean")
    completed = {path.name for path in done.glob("completions/*")}
    ended = prepare(server, settings, tmp_path, **LOCAL)
    check_same(ended, alone)
    assert completed and f"clean: {3 - len(completed)} of 3 tasks" in ended.stderr


def test_a_run_that_failed_after_joining_a_single_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file is joined by another name for it; nothing is left of an attempt with more tasks."""

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    config = small(tmp_path)
    alone = prepare_data(config, SMALL)
    config.cache_dir = tmp_path / "spread"
    for tasks in (3, 2):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
            patch.setattr(spread, "compare", fail)
            prepare_data(config, SMALL, work=spread_over(ExecutorConfig("local", tasks)))
    (left,) = config.cache_dir.glob(".parts-*/*")
    assert left.name == "2-tasks" and (left / "validation.parquet").stat().st_nlink == 2
    ended = prepare_data(config, SMALL, work=spread_over(ExecutorConfig("local", 2)))
    assert ended.key == alone.key and hashes(config.cache_dir) == hashes(tmp_path / "cache")
    assert not list(config.cache_dir.glob(".parts-*")) and not list(config.cache_dir.glob(".tmp-*"))


def test_unfinished_work_is_deleted_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    left, temporary = tmp_path / ".parts-text-1", tmp_path / ".tmp-text-1-abc"
    (left / "2-tasks").mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(once.shutil, "rmtree", stop)
        once.discard(left, temporary)
    assert not left.exists() and list(tmp_path.glob(".tmp-text-1-*"))
    once.build_once(tmp_path / "text-1", lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["text-1"]


CLUSTER = {
    "sbatch": 'echo sbatch >> "$FAKE/calls"; echo "Submitted batch job $$"',
    "scancel": 'echo "scancel $*" >> "$FAKE/calls"',
    "squeue": r"""
        answer=$(head -1 "$FAKE/answers"); sed -i 1d "$FAKE/answers"; echo "squeue $answer" >> "$FAKE/calls"
        case "$answer" in
            running) echo "$3 running";;
            down) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1;;
            *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
        esac
    """,
}


def play(commands: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put scripts first in PATH that play Slurm's commands."""
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")


def do_nothing(rank: int, tasks: int) -> None:
    """A share whose jobs never run here."""


def submit(folder: Path, *answers: str) -> None:
    """Run tasks under a Slurm that loses them, with these answers of squeue; its commands are noted in ``calls``."""
    (folder / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    (folder / "calls").write_text("")
    options = {"time": "1:00:00", "partition": "cpu"}
    run_tasks(ExecutorConfig("slurm", 2, options), folder / "scratch", "clean", do_nothing)


def test_tasks_that_are_lost_are_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that does not answer is asked again; what is left of the jobs is cancelled."""
    play(CLUSTER, tmp_path, monkeypatch)
    monkeypatch.setattr(executors, "POLL", 0)
    with pytest.raises(RuntimeError, match=r"2 tasks of the step clean did not end well; see .*clean"):
        submit(tmp_path, "down", "running", "down", "down", "gone")
    *calls, cancelled = (tmp_path / "calls").read_text().splitlines()
    asked = [f"squeue {answer}" for answer in ("down", "running", "down", "down", "gone")]
    assert calls == ["sbatch", "sbatch", *asked]  # the second one joins datatrove's statistics
    assert cancelled.startswith("scancel ") and len(cancelled.split()) == 3
    monkeypatch.setattr(executors, "PATIENCE", 2)
    with pytest.raises(RuntimeError, match=r"squeue failed 2 times in a row: .*Unable to contact"):
        submit(tmp_path, "gone", "gone", "down", "down")


def test_a_driver_that_is_stopped_cancels_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    play(CLUSTER, tmp_path, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(executors.time, "sleep", interrupt)
        submit(tmp_path, "running")
    *_, cancelled = (tmp_path / "calls").read_text().splitlines()
    assert cancelled.startswith("scancel ") and len(cancelled.split()) == 3
    monkeypatch.setattr(executors, "POLL", 0)
    with pytest.raises(RuntimeError, match="did not end well"):  # started again, also after it was killed
        submit(tmp_path, "running", "gone", "gone", "gone")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:5] == [cancelled, "squeue running", "squeue gone", "squeue gone", "sbatch"]


SLURM = {
    "sbatch": r"""
        job="$FAKE/job-$$"
        cp "${@: -1}" "$job.sh"
        last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$job.sh")
        export SLURM_NODELIST=here RUN_OFFSET=0
        (for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "$job.sh"; done) > "$job.log" 2>&1 &
        echo $! > "$job.pid"
        echo "Submitted batch job $$"
    """,
    "srun": 'while [[ "$1" == -* || "$1" =~ ^[0-9]+$ ]]; do shift; done; exec "$@"',
    "scontrol": "echo localhost",
    "squeue": 'kill -0 "$(cat "$FAKE/job-$3.pid")" 2> /dev/null && echo "$3 running"',
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven processes are started, each of which imports everything
def test_slurm_jobs_leave_the_same_files(
    settings: Words, alone: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's commands are played by scripts that run the jobs here, one task after another."""
    play(SLURM, tmp_path, monkeypatch)
    options = {"time": "1:00:00", "partition": "cpu"}
    server = Server()  # its environment is this one
    ended = prepare(
        server, settings, tmp_path, **{"executor.name": "slurm", "executor.tasks": 2, "executor.options": options}
    )
    server.close()
    check_same(ended, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_tasks_leave_the_same_files(server: Server, settings: Words, alone: Ended, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    options = {"mem_per_cpu_gb": 1}
    ended = prepare(
        server, settings, tmp_path, **{"executor.name": "ray", "executor.tasks": 2, "executor.options": options}
    )
    check_same(ended, alone)
