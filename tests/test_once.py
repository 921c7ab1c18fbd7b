"""One process builds, all others use what it built: in real processes, with dead holders, failures and leftovers."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hfkit.data.once as once
from hfkit.data.once import build_once
from hfkit.data.shards import damaged_file, seal
from hfkit.settings import BadInput

FORK = multiprocessing.get_context("fork")


def counted(log: Path, seconds: float = 0.0, error: str = "") -> Callable[[Path], None]:
    """Return a build that adds a line to ``log``, takes its time, and fails where there is an ``error``."""

    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        if error:
            raise BadInput(error)
        (folder / "built").write_text(str(os.getpid()))

    return build


def builds(log: Path) -> int:
    """How often a build was begun."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def in_processes(count: int, target: Path, build: Callable[[Path], None]) -> list[Any]:
    """Call ``build_once`` in processes that begin together; return what each returned or raised."""
    results, begin = FORK.SimpleQueue(), FORK.Barrier(count)

    def work() -> None:
        begin.wait()
        try:
            results.put(build_once(target, build))
        except BadInput as error:
            results.put(str(error))
        os._exit(0)

    children = [FORK.Process(target=work) for _ in range(count)]
    for child in children:
        child.start()
    answers = [results.get() for _ in children]
    for child in children:
        child.join(30)
    return answers


def left_behind(folder: Path) -> list[str]:
    """Names of what lies beside the target, but for the guard of all locks of the folder."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".guard")


def test_one_of_several_processes_builds_and_all_see_it(tmp_path: Path) -> None:
    target, log = tmp_path / "cache" / "key", tmp_path / "log"
    assert sorted(in_processes(3, target, counted(log, seconds=0.5))) == [False, False, True]
    assert builds(log) == 1 and (target / "built").read_text() == log.read_text().strip()
    assert left_behind(target.parent) == ["key"]
    assert build_once(target, counted(log)) is False and builds(log) == 1


def test_a_failed_build_is_tried_once_and_stops_everyone_with_its_message(tmp_path: Path) -> None:
    target, log = tmp_path / "key", tmp_path / "log"
    assert in_processes(3, target, counted(log, 0.5, "no text in corpus.txt")) == ["no text in corpus.txt"] * 3
    assert builds(log) == 1 and not target.exists()
    # The input is mended and the command run again: the earlier failure does not stand in its way.
    assert build_once(target, counted(log)) is True
    assert left_behind(tmp_path) == ["key", "log"]


def test_a_crash_that_is_no_bad_input_leaves_the_way_free(tmp_path: Path) -> None:
    def crash(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        build_once(tmp_path / "key", crash)
    assert left_behind(tmp_path) == []
    assert build_once(tmp_path / "key", counted(tmp_path / "log")) is True


def dead_process() -> int:
    """Return the id of a process that has ended."""
    child = FORK.Process(target=int)
    child.start()
    child.join()
    assert child.pid is not None
    return child.pid


def hold(target: Path, holder: str, seconds_ago: float = 0.0) -> Path:
    """Leave a lock as ``holder`` wrote it."""
    lock = target.with_name(f".{target.name}.lock")
    lock.write_text(holder)
    os.utime(lock, (time.time() - seconds_ago,) * 2)
    return lock


def test_killed_builders_are_replaced_and_what_they_left_is_removed(tmp_path: Path) -> None:
    target, log = tmp_path / "key", tmp_path / "log"
    killed = FORK.Process(target=build_once, args=(target, counted(log, seconds=60)))
    killed.start()
    while not builds(log):
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert [name for name in left_behind(tmp_path) if name.startswith(".tmp-key-")]
    other = tmp_path / ".tmp-key2-0"
    other.mkdir()  # of a build that goes on, of another key
    assert sorted(in_processes(2, target, counted(log, seconds=0.3))) == [False, True]
    assert builds(log) == 2 and left_behind(tmp_path) == [".tmp-key2-0", "key", "log"]


@pytest.mark.parametrize(
    "holder, seconds_ago, taken",
    [
        (f"{socket.gethostname()} DEAD", 0, True),
        (f"{socket.gethostname()} ALIVE", 30, False),
        (f"{socket.gethostname()} ALIVE", 90, True),  # its id went to another process
        ("elsewhere DEAD", 30, False),  # cannot be asked
        ("elsewhere DEAD", 90, True),
        ("", 0, False),  # being written
        ("", 30, True),  # killed before it wrote
    ],
)
def test_only_a_lock_whose_holder_is_dead_or_silent_is_taken_over(
    holder: str, seconds_ago: float, taken: bool, tmp_path: Path
) -> None:
    holder = holder.replace("DEAD", str(dead_process())).replace("ALIVE", str(os.getpid()))
    lock = hold(tmp_path / "key", holder, seconds_ago)
    assert once._acquire(lock) is taken
    assert lock.read_text() == (once._holder() if taken else holder)
    assert left_behind(tmp_path) == [".key.lock"]


def test_a_builder_at_work_keeps_its_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "HEARTBEAT", 0.05)
    lock, ages = tmp_path / ".key.lock", []

    def build(folder: Path) -> None:
        os.utime(lock, (0, 0))
        time.sleep(0.3)
        ages.append(time.time() - lock.stat().st_mtime)

    assert build_once(tmp_path / "key", build) is True
    assert ages[0] < 5


def test_a_damaged_folder_is_built_again(tmp_path: Path) -> None:
    target, log = tmp_path / "key", tmp_path / "log"
    build = counted(log)

    def build_sealed(folder: Path) -> None:
        build(folder)
        seal(folder, {})

    def ready(folder: Path) -> bool:
        return damaged_file(folder) is None

    assert build_once(target, build_sealed, ready) is True
    assert build_once(target, build_sealed, ready) is False
    (target / "built").write_text("damaged")
    (target / "stray").write_text("")
    assert build_once(target, build_sealed, ready) is True
    assert builds(log) == 2 and ready(target) and left_behind(target) == ["built", "manifest.json"]


def test_a_full_disk_is_bad_input(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match=r"no room left on the disk of .*: free some, or set --data.cache_dir"):
        build_once(tmp_path / "key", full)
    assert left_behind(tmp_path) == [".key.error"]


def test_a_place_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file/cache cannot be written \(Not a directory\): set --data\.cache_dir"):
        build_once(tmp_path / "file" / "cache" / "text", lambda folder: None)
