"""The outcome of a run, for people and for scripts: ``status.json``, exit codes, and the lock on the output folder.

``accelerate launch`` turns every worker failure into exit status 1, so the same outcome is written to ``status.json``,
by the process that holds the folder's lock and by no other.
"""

import fcntl
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hfkit.files import format_json, read_json, write_json
from hfkit.settings import BadInput

DONE, FAILED, BAD_INPUT, DIVERGED, PUSH_FAILED, PREEMPTED = 0, 1, 2, 3, 4, 75
STATES = {
    DONE: "done",
    FAILED: "failed",
    BAD_INPUT: "bad_input",
    DIVERGED: "diverged",
    PUSH_FAILED: "push_failed",
    PREEMPTED: "preempted",
}
HEARTBEAT = 15.0  # seconds
ROWS = 20  # of a table that the console shows


def is_main_process() -> bool:
    """Whether this is the process that writes, known from the launcher's variables before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


class Status:
    """The lock on an output folder, and its ``status.json`` while the lock is held."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "status.json"
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self.lock = (output_dir / ".lock").open("a+")
        except OSError as error:
            raise BadInput(f"output_dir {output_dir} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise BadInput(f"{output_dir} is in use by another run ({self.lock.read().strip() or 'unknown'})") from None
        self.lock.truncate(0)
        self.lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()
        self.values: dict[str, Any] = {"state": "running", "exit_code": None, "step": 0, "message": ""}
        self.values |= {"checkpoint": None, "push": "none"}
        self.values |= {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        self.guard = threading.Lock()
        self.stop = threading.Event()
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def update(self, **values: Any) -> None:
        """Change values; they are written with the next heartbeat or at the end."""
        self.values.update(values)

    def finish(self, code: int, message: str = "") -> None:
        """Write the outcome and release the lock."""
        self.stop.set()
        with self.guard:
            self.values |= {"state": STATES[code], "exit_code": code, "message": message}
            try:
                self._write_now()
            except OSError as error:  # a full disk must not change the exit status
                print(f"warning: {self.path} could not be written: {error}", file=sys.stderr)
        self.lock.close()

    def _write(self) -> None:
        with self.guard:
            if not self.stop.is_set():
                self._write_now()

    def _write_now(self) -> None:
        write_json(self.path, {**self.values, "heartbeat": time.time()})

    def _beat(self) -> None:
        while not self.stop.wait(HEARTBEAT):
            try:
                self._write()
            except OSError:  # a full disk must not end the run here
                continue


def is_locked(output_dir: Path) -> bool:
    """Whether another process holds the folder's lock."""
    if not (path := output_dir / ".lock").exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def read_status(output_dir: Path) -> dict[str, Any]:
    """Return ``status.json``, empty where there is none."""
    return read_json(output_dir / "status.json") or {}


def as_text(result: dict[str, Any]) -> str:
    """Return a result as indented JSON for the console; of a table over many classes, only how long it is."""
    return format_json({name: f"{len(value)} rows" if _is_long(value) else value for name, value in result.items()})


def _is_long(value: Any) -> bool:
    rows = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return len(rows) > ROWS and all(isinstance(row, dict | list) for row in rows)
