"""Faults in whole runs: kills, signals, full disks, damaged files. The same command then ends in the same run.

Every injector says whether it hit: a run that ended before the fault came would prove nothing.
"""

import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch

import hfkit.checkpoint
import hfkit.data.prepare
from hfkit.data.workers import map_in_order
from hfkit.launch import Stopper
from hfkit.loop import Preempted
from hfkit.losses import CausalLMLoss
from runs import (
    ROOT,
    Ended,
    Server,
    Words,
    command_line,
    newest_step,
    shared_server,
    signal_after,
    tiny_run,
    wait_for,
    write_corpus,
)
from test_checkpoint import fork, limit_file_size

TWO_PROCESSES = ("--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml"))


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A run of 30 steps with dropout, a checkpoint after each, and lines that span several of them."""
    folder = tmp_path_factory.mktemp("faults")
    corpus = write_corpus(folder / "corpus.jsonl")
    return tiny_run(corpus, folder / "cache", train__max_steps=30, train__log_every=7, model__dropout=0.1)


@pytest.fixture(scope="module")
def quiet(server: Server, settings: Words, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run that nothing disturbed."""
    ended = server.run("pretrain", settings, tmp_path_factory.mktemp("quiet") / "run")
    assert ended.code == 0, ended.stderr
    return ended


def assert_same_run(ended: Ended, quiet: Ended) -> None:
    """Fail unless a run ended like the undisturbed one: weights and figures bit for bit, one line per step and kind."""
    assert ended.code == 0, ended.stderr
    assert ended.status["state"] == "done"
    assert ended.weights == quiet.weights
    assert ended.metrics == quiet.metrics
    kinds = Counter((line["step"], "loss" in line) for line in ended.metrics)
    assert set(kinds.values()) == {1}


@pytest.mark.parametrize("kills", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_kills_at_random_instants_change_nothing(
    server: Server, settings: Words, quiet: Ended, tmp_path: Path, kills: int
) -> None:
    draw = random.Random(kills)
    output_dir = tmp_path / "run"
    half_written = 0
    for kill in range(kills):
        step = newest_step(output_dir) + 1 + kill % 2
        killed = server.run("pretrain", settings, output_dir, signal_after(signal.SIGKILL, step, draw.random() / 20))
        assert killed.code == -signal.SIGKILL, killed.stderr
        assert killed.status["state"] == "running"  # nobody was left to say otherwise
        assert newest_step(output_dir) >= step
        half_written += any((output_dir / "checkpoints").glob(".tmp-*"))
    assert half_written >= kills // 12  # most kills hit a save, since a step is shorter than one
    assert_same_run(server.run("pretrain", settings, output_dir), quiet)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_training_saves_and_ends_with_75(
    server: Server, settings: Words, quiet: Ended, tmp_path: Path, number: int
) -> None:
    rarely = settings | {"train.save_every": 3}
    output_dir = tmp_path / "run"
    stopped = server.run("pretrain", rarely, output_dir, signal_after(number, 6))
    assert (stopped.code, stopped.status["state"], stopped.status["exit_code"]) == (75, "preempted", 75)
    step = newest_step(output_dir)
    assert 6 <= stopped.status["step"] == step < 30
    assert stopped.status["checkpoint"].endswith(f"step-{step:08d}")
    assert stopped.stderr.splitlines()[-1] == f"stopped after step {step}; run the same command again to go on"
    assert "Traceback" not in stopped.stderr
    assert_same_run(server.run("pretrain", rarely, output_dir), quiet)


def test_signals_before_the_first_save_end_with_75_and_no_checkpoint(
    server: Server, settings: Words, tmp_path: Path
) -> None:
    def send(pid: int, output_dir: Path) -> None:
        wait_for((output_dir / "here").exists, "the preparation")
        for _ in range(3):  # one is enough; more must not break into the stop
            os.kill(pid, signal.SIGTERM)

    slowly = settings | {"data.cache_dir": tmp_path / "cache"}
    stopped = server.run("prepare", slowly_prepared(slowly), tmp_path / "run", send, "test_faults.wait_in_preparation")
    assert (stopped.code, stopped.status["state"], stopped.status["checkpoint"]) == (75, "preempted", None)
    assert "Traceback" not in stopped.stderr
    # Nothing half-built and no lock: only the guard of all locks.
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".guard", "contents.json"]
    again = server.run("prepare", slowly_prepared(slowly), tmp_path / "run")
    assert (again.code, again.status["state"]) == (0, "done")


def test_a_branch_from_before_the_decay_survives_its_preemptions(
    server: Server, settings: Words, tmp_path: Path
) -> None:
    """Both in the folder of the run that it branches off from and elsewhere, at the rate that was reached there."""
    wsd = settings | {"optim.schedule": "wsd", "train.log_every": 1, "train.eval_every": 0}
    trunk = wsd | {"train.max_steps": 12, "train.save_every": 4, "train.keep_checkpoints": 3}
    assert server.run("pretrain", trunk, tmp_path / "trunk").code == 0
    inside = tmp_path / "trunk" / "checkpoints" / "step-00000004"
    outside = shutil.copytree(inside, tmp_path / inside.name)

    def preempt(pid: int, output_dir: Path) -> None:
        def goes_on() -> bool:
            return newest_step(output_dir) >= stopped_at + 2 and newest_step(output_dir) != 12  # the trunk's last

        wait_for(goes_on, "checkpoints of the branch")
        os.kill(pid, signal.SIGTERM)

    found = []
    for start, name in ((inside, "trunk"), (outside, "other")):
        stopped_at = 4
        for _ in range(2):  # the same command
            branch = wsd | {"resume": start, "train.max_steps": 500}
            ended = server.run("pretrain", branch, tmp_path / name, preempt)
            assert (ended.code, ended.status["state"]) == (75, "preempted"), ended.stderr
            assert f"at step {stopped_at}." in ended.stderr
            stopped_at = newest_step(tmp_path / name)
        assert start.exists()  # to branch off from once more
        found.append([line for line in ended.metrics if line["step"] > 4])
        assert {line["learning_rate"] for line in found[-1]} == {settings["optim.learning_rate"]}  # no new warm-up
    assert all(mine == theirs for mine, theirs in zip(*found, strict=False))
    aside = tmp_path / "trunk" / "previous-1"
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert {path.name for path in aside.iterdir()} >= {"model", "result.json", "metrics.jsonl", "report.html"}


def slowly_prepared(settings: Words) -> Words:
    """Return the settings that prepare.py shares with a training."""
    return {key: value for key, value in settings.items() if key.startswith(("data.", "tokenizer."))}


def wait_in_preparation() -> None:
    """Stop for a signal while text is refined, after leaving a file that says so."""
    refine = hfkit.data.prepare.refine
    output_dir = Path(next(word for word in sys.argv if word.startswith("--output_dir=")).split("=", 1)[1])

    def slow(*arguments: object) -> object:
        result = refine(*arguments)  # type: ignore[arg-type]
        (output_dir / "here").touch()
        signal.sigtimedwait([], 30)  # the handler interrupts it
        return result

    hfkit.data.prepare.refine = slow  # type: ignore[assignment]


def test_a_kill_in_the_preparation_is_cleaned_up_by_the_next_run(
    server: Server, settings: Words, tmp_path: Path
) -> None:
    def kill(pid: int, output_dir: Path) -> None:
        wait_for((output_dir / "here").exists, "the preparation")
        os.kill(pid, signal.SIGKILL)

    fresh = slowly_prepared(settings | {"data.cache_dir": tmp_path / "cache"})
    killed = server.run("prepare", fresh, tmp_path / "run", kill, "test_faults.wait_in_preparation")
    assert killed.code == -signal.SIGKILL
    assert any(path.name.startswith(".tmp-text-") for path in (tmp_path / "cache").iterdir())
    again = server.run("prepare", fresh, tmp_path / "run")
    assert again.code == 0, again.stderr
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == [".guard"]


def test_each_damaged_file_of_the_newest_checkpoint_is_named_and_the_older_one_used(
    server: Server, settings: Words, quiet: Ended, tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    stopped = server.run("pretrain", settings, output_dir, signal_after(signal.SIGTERM, 5))
    assert stopped.code == 75
    for name in ("model.safetensors", "optimizer.safetensors", "manifest.json"):
        step = newest_step(output_dir)
        path = output_dir / "checkpoints" / f"step-{step:08d}" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        last = name == "manifest.json"
        during = (lambda pid, output_dir: None) if last else signal_after(signal.SIGTERM, step + 1)
        ended = server.run("pretrain", settings, output_dir, during)
        warning = next(line for line in ended.stderr.splitlines() if line.startswith("warning: "))
        assert f"step-{step:08d}" in warning and name in warning
        assert f"at step {step - 1}." in ended.stderr
    assert_same_run(ended, quiet)


def test_a_disk_that_is_full_for_two_saves_leaves_the_run_alone(
    server: Server, settings: Words, quiet: Ended, tmp_path: Path
) -> None:
    ended = server.run("pretrain", settings, tmp_path / "run", before="test_faults.fail_the_fifth_and_sixth_save")
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: no checkpoint at step")]
    assert len(warnings) == 2 and all("No space left" in line for line in warnings)
    assert_same_run(ended, quiet)


def fail_the_fifth_and_sixth_save() -> None:
    """Let the disk be full when checkpoints 5 and 6 are written."""
    save_file, saves = hfkit.checkpoint.save_file, count(1)

    def full(tensors: object, path: Path, **named: object) -> None:
        if path.name == "model.safetensors" and next(saves) in (5, 6):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **named)  # type: ignore[arg-type]

    hfkit.checkpoint.save_file = full  # type: ignore[assignment]


def test_three_saves_in_a_row_that_fail_stop_the_run(server: Server, settings: Words, tmp_path: Path) -> None:
    ended = server.run("pretrain", settings, tmp_path / "run", before="test_faults.fill_the_disk")
    assert ended.code == 1 and ended.status["state"] == "failed"
    assert ended.stderr.count("warning: no checkpoint at step") == 3
    assert "3 checkpoints in a row could not be written" in ended.status["message"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def fill_the_disk() -> None:
    """Let no file grow beyond 16 kB, which a checkpoint's files do: safetensors then raises its own error."""
    limit_file_size(16_000)


def test_a_loss_that_is_not_finite_ends_with_3_and_a_good_checkpoint(
    server: Server, settings: Words, quiet: Ended, tmp_path: Path
) -> None:
    ended = server.run("pretrain", settings, tmp_path / "run", before="test_faults.break_the_seventh_loss")
    assert (ended.code, ended.status["state"]) == (3, "diverged")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "training diverged at step 7" in line and "Traceback" not in ended.stderr
    assert newest_step(tmp_path / "run") == 6
    assert_same_run(server.run("pretrain", settings, tmp_path / "run"), quiet)


def break_the_seventh_loss() -> None:
    """Make the loss of step 7's first micro-batch, of two, not a number."""
    forward, passes = CausalLMLoss.forward, count(1)

    def broken(self: CausalLMLoss, **batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, targets = forward(self, **batch)
        hit = torch.is_grad_enabled() and next(passes) == 13
        return loss * math.nan if hit else loss, targets

    CausalLMLoss.forward = broken  # type: ignore[method-assign]


def test_a_second_run_on_the_same_folder_is_refused(server: Server, settings: Words, tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("pid 1 on elsewhere")
        lock.flush()
        refused = server.run("pretrain", settings, tmp_path / "run")
    assert refused.code == 2
    assert refused.stderr == f"error: {tmp_path / 'run'} is in use by another run (pid 1 on elsewhere)\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def launched(arguments: tuple[str, ...], settings: Words, output_dir: Path) -> subprocess.Popen[bytes]:
    """Start ``accelerate launch`` on pretrain.py."""
    words = [*arguments, "recipes/pretrain.py", *command_line({**settings, "output_dir": output_dir})]
    output = output_dir.with_suffix(".log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *words], cwd=ROOT, stdout=output, stderr=output
    )


def workers_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that a launcher has started."""
    return [child for child in psutil.Process(launcher.pid).children(recursive=True) if child.is_running()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_two_processes_change_nothing(settings: Words, tmp_path: Path) -> None:
    quiet = tmp_path / "quiet"
    assert launched(TWO_PROCESSES, settings, quiet).wait(120) == 0
    output_dir = tmp_path / "run"
    draw = random.Random(0)
    for victim in ("first", "second", "all"):
        step = newest_step(output_dir) + 2
        launcher = launched(TWO_PROCESSES, settings, output_dir)
        wait_for(lambda step=step: newest_step(output_dir) >= step, f"step {step}")
        time.sleep(draw.random() / 20)
        workers = sorted(workers_of(launcher), key=lambda worker: worker.pid)[:2]
        assert len(workers) == 2
        for worker in {"first": workers[:1], "second": workers[1:], "all": workers}[victim]:
            worker.kill()
        assert launcher.wait(60) != 0
        psutil.wait_procs(workers, timeout=30)
        assert not any(worker.is_running() for worker in workers)
    assert launched(TWO_PROCESSES, settings, output_dir).wait(120) == 0
    ended, undisturbed = (Ended(0, "", "", folder) for folder in (output_dir, quiet))
    assert_same_run(ended, undisturbed)
    manifest = json.loads((output_dir / "checkpoints" / "step-00000030" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


@pytest.mark.slow
def test_a_launcher_that_dies_leaves_no_orphan(settings: Words, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    cpu = ("--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"))
    launcher = launched(cpu, settings | {"train.max_steps": 100_000}, output_dir)
    wait_for(lambda: newest_step(output_dir) >= 2, "step 2")
    workers = workers_of(launcher)
    assert workers
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(30)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    ended = Ended(0, "", "", output_dir)
    assert ended.status["state"] == "preempted" and ended.status["exit_code"] == 75


def test_workers_end_with_the_run_that_forked_them(tmp_path: Path) -> None:
    """A worker holds a copy of every open file: one that outlived a killed run would keep its folder locked."""
    lock = tmp_path / "lock"

    def work() -> None:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            list(map_in_order(time.sleep, [30.0] * 4, workers=2))

    pid = fork(work)
    wait_for(lambda: len(psutil.Process(pid).children()) == 2, "the workers")
    workers = psutil.Process(pid).children()
    time.sleep(0.2)  # until each has begun its piece
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_signal_to_all_processes_of_a_run_stops_it_once(tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches the workers, too; they leave the answer to the run."""
    report = tmp_path / "report"

    def work() -> None:
        os.setsid()
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        stopper = Stopper()
        stopper.install()
        try:
            list(map_in_order(time.sleep, [1.0] * 4, workers=2))
        except Preempted as stopped:
            report.write_text(str(stopped))

    pid = fork(work)
    wait_for(lambda: len(psutil.Process(pid).children()) == 2, "the workers")
    time.sleep(0.2)
    os.killpg(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    assert report.read_text() == "stopped by SIGINT before the first step"
    assert (tmp_path / "stderr").read_text() == ""
