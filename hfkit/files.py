"""Files that are whole or absent: atomic writes, syncing, digests, and locks that survive a dead holder."""

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from hfkit.settings import BadInput


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``: a reader, or a crash, sees the old file or the new one and nothing else."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_parent(path: Path, name: str) -> None:
    """Make the folder of a file that is to be written.

    Args:
        name: The setting that names the file.

    Raises:
        BadInput: where it cannot be made, or there is a folder in the file's place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{name} {path}: the folder cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise BadInput(f"{name} {path} is a folder; give the name of a file")


def finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity, which JSON lacks, replaced by None.

    Example:
        >>> finite({"loss": float("nan"), "step": 3})
        {'loss': None, 'step': 3}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; a number that is not finite becomes null."""
    write_atomic(path, format_json(value) + "\n")


def format_json(value: Any) -> str:
    """Return ``value`` as indented JSON with each list of numbers on one line; one that is not finite becomes null.

    Example:
        >>> print(format_json({"rows": [[1, 2], [3, 4]]}))
        {
          "rows": [
            [1, 2],
            [3, 4]
          ]
        }
    """
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    # Texts have no line feed of their own there, so that the first one of a match is the list's.
    return re.sub(r"\[\n[-+.eE\d,\s]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in ``path``, or None where the file is missing or not a whole JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def sync(path: Path) -> None:
    """Wait until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hex.

    Example:
        >>> digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def replace_folder(temporary: Path, final: Path) -> None:
    """Put the finished folder ``temporary`` at ``final``; an earlier one is moved aside first and deleted last.

    A folder cannot be replaced in one step: after a crash between the two renames, ``final`` is missing and
    ``.old-<name>`` holds the earlier one, which ``recover_folder`` puts back.
    """
    aside = final.with_name(f".old-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Complete a ``replace_folder`` that was interrupted."""
    aside = final.with_name(f".old-{final.name}")
    if aside.exists() and not final.exists():
        os.replace(aside, final)
    shutil.rmtree(aside, ignore_errors=True)
