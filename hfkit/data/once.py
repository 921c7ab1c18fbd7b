"""Work that one process does and every process needs: a keyed folder, built once, seen by all.

Whoever creates the lock file beside the target builds it in a temporary folder and renames that into place; the others
wait for the target to appear on disk. No process group is needed, so no collective waits for a tokenizer. The holder
touches its lock every few seconds; one that is dead or silent for a minute is replaced. A build that fails publishes
its error, and the waiters stop with it.
"""

import errno
import fcntl
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hfkit.files import read_json, sync, write_json
from hfkit.settings import BadInput

SILENCE = 60.0  # seconds without a heartbeat after which a holder counts as dead
HEARTBEAT = 5.0  # seconds
GUARD = ".guard"  # locked while the lock files beside it are judged
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_once(target: Path, build: Callable[[Path], None], ready: Callable[[Path], bool] = Path.is_dir) -> bool:
    """Make sure that folder ``target`` is there, built by one process; return whether this one built it.

    Args:
        target: Where the folder belongs; its name should be a key of everything that it depends on.
        build: Fills the empty folder that it is given.
        ready: Whether an existing target can be used as it is; one that cannot is built again.

    Raises:
        BadInput: what ``build`` raised, in the process that built and in those that waited; or where ``target``'s
            folder cannot be made or written.
    """
    if ready(target):
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / GUARD).touch()
    except OSError as refused:
        raise BadInput(f"{target.parent} cannot be written ({refused.strerror}): set --data.cache_dir") from None
    lock, failure = target.with_name(f".{target.name}.lock"), target.with_name(f".{target.name}.error")
    begin = time.time()
    while not ready(target):
        if _acquire(lock):  # the holder before may have finished, or failed, since this process looked
            try:
                if ready(target):
                    return False
                error = read_json(failure)
                if error and error["time"] > begin:
                    raise BadInput(error["message"])
                return _build(target, build, lock, failure)
            finally:
                _release(lock)
        time.sleep(0.2)
    return False


def scratch_beside(temporary: Path) -> Path:
    """Return the folder for work on ``temporary``'s target that outlives the attempt."""
    target = temporary.name.removeprefix(".tmp-").rpartition("-")[0]
    return temporary.with_name(f".parts-{target}")


def discard(left: Path, temporary: Path) -> None:
    """Delete a folder of unfinished work in one step: half deleted, it would pass for work that was completed.

    Where the process is killed meanwhile, the next one deletes the rest with what else is left of ``temporary``.
    """
    doomed = temporary.with_name(f"{temporary.name}-{left.name}")
    os.replace(left, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _build(target: Path, build: Callable[[Path], None], lock: Path, failure: Path) -> bool:
    for left in target.parent.glob(f".tmp-{target.name}-*"):  # of killed builds: only the lock's holder gets here
        shutil.rmtree(left, ignore_errors=True)
    temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    stop = threading.Event()
    threading.Thread(target=_beat, args=(lock, stop), daemon=True).start()
    try:
        _fill(temporary, build)
        sync(temporary)
        if target.exists():  # present but not usable: out of the way, and named by whoever found that out
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync(target.parent)
        failure.unlink(missing_ok=True)
    except BadInput as error:
        shutil.rmtree(temporary, ignore_errors=True)  # makes room for the message where the disk is full
        with suppress(OSError):  # whoever waits then finds out for himself
            write_json(failure, {"message": str(error), "time": time.time()})
        raise
    finally:
        stop.set()
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _fill(folder: Path, build: Callable[[Path], None]) -> None:
    """Call ``build``; a full disk is something that the user can mend."""
    try:
        build(folder)
    except Exception as error:  # the tokenizers library raises its own for what the system said
        if getattr(error, "errno", None) in FULL or any(f"(os error {number})" in str(error) for number in FULL):
            where = folder.parent
            raise BadInput(f"no room left on the disk of {where}: free some, or set --data.cache_dir") from error
        raise


def _acquire(lock: Path) -> bool:
    """Create the lock file, or take over one whose holder is dead or silent."""
    with lock.with_name(GUARD).open("a") as guard:
        # Judging a lock and removing it are one act: a waiter that judged late would remove its successor's.
        fcntl.flock(guard, fcntl.LOCK_EX)
        if lock.exists() and _abandoned(lock):
            lock.unlink(missing_ok=True)
        try:
            with lock.open("x") as file:
                file.write(_holder())
        except FileExistsError:
            return False
        return True


def _release(lock: Path) -> None:
    """Remove the lock, unless somebody has taken it over meanwhile."""
    try:
        if lock.read_text() == _holder():
            lock.unlink()
    except FileNotFoundError:
        return


def _holder() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _abandoned(lock: Path) -> bool:
    try:
        silent = time.time() - lock.stat().st_mtime
        holder = lock.read_text().split()
    except FileNotFoundError:
        return False
    if silent > SILENCE:
        return True
    if len(holder) != 2:  # being written
        return silent > HEARTBEAT
    host, pid = holder
    return host == socket.gethostname() and not _alive(int(pid))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        try:
            os.utime(lock)
        except FileNotFoundError:
            return
