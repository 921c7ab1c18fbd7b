"""The passport of a run: what made this result (data, versions, hardware, seeds, command), and how much may be shown.

``passport.json`` stays on the machine; ``public_passport`` is the part that may be published with a model.
"""

import getpass
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import hfkit
from hfkit.files import digest, read_json, write_json
from hfkit.masking import mask_command, mask_values

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub")
HASHED = 1 << 30  # bytes; a larger file whose hash is not known goes by its name alone


def find_versions() -> dict[str, str | None]:
    """Return the versions of Python, hfkit and the libraries that decide a result; None for one not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "hfkit": hfkit.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def find_cpu() -> str:
    """Return the model name of the processor."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def find_hardware() -> dict[str, Any]:
    """Return processor, cores that this process may use, memory (bytes) and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": find_cpu(),
        "cores": cores,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def find_commit() -> str | None:
    """Return hfkit's git commit, with ``+changes`` where files differ from it; None outside a checkout."""
    root = Path(hfkit.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository further up would be somebody else's
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_passport(
    output_dir: Path,
    *,
    data: dict[str, Any],
    tokenizer: dict[str, Any],
    seed: int,
    model: dict[str, Any] | None = None,
    resumed_from: int | None = None,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Write ``output_dir/passport.json`` and return it; a resumed run keeps the sessions before in ``sessions``.

    Args:
        data: Revisions and content hashes of the data, as the data path knows them.
        tokenizer: Hash and origin of the tokenizer.
        model: Id and commit of the model that the run began from.
        resumed_from: Step that this session goes on from; None for a new run.
    """
    path = output_dir / "passport.json"
    earlier = (read_json(path) or {}).get("sessions", []) if resumed_from is not None else []
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": mask_command(sys.argv),
        "resumed_from": resumed_from,
        "num_processes": num_processes,
        "working_directory": os.getcwd(),
        "host": socket.gethostname(),
    }
    passport = {
        "command": session["command"],
        "seed": seed,
        "data": mask_values(data),
        "tokenizer": mask_values(tokenizer),
        "model": mask_values(model or {}),
        "versions": find_versions(),
        "commit": find_commit(),
        "hardware": find_hardware(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "sessions": [*earlier, session],
    }
    write_json(path, passport)
    return passport


def public_passport(passport: dict[str, Any]) -> dict[str, Any]:
    """Return what of a passport may leave the machine: no paths, no names of users or hosts, credentials masked.

    A path, also one inside the command, becomes its file name and, where the content is known, its SHA-256.
    """
    hashes = dict(find_hashes(passport))
    private = [str(Path.home()), *(name for name in (find_user(), socket.gethostname()) if len(name) > 1)]
    names = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in private))
    hidden = {"working_directory", "host"}

    def publish(value: Any) -> Any:
        if isinstance(value, dict):
            known = {} if "sha256" in value else hashes  # the hash stands beside the path already
            return {
                publish(key): hide_paths(item, known, names) if isinstance(item, str) else publish(item)
                for key, item in value.items()
                if key not in hidden
            }
        if isinstance(value, list):
            return [publish(item) for item in value]
        return hide_paths(value, hashes, names) if isinstance(value, str) else value

    published: dict[str, Any] = publish(mask_values(passport))
    return published


def find_user() -> str:
    """Return the user's name; empty where the system has none for this user id, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def find_hashes(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (path, SHA-256) from every ``{"path": …, "sha256": …}`` inside a JSON value."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) and isinstance(value.get("sha256"), str):
            yield value["path"], value["sha256"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from find_hashes(item)


def hide_paths(text: str, hashes: dict[str, str], names: re.Pattern[str]) -> str:
    """Return ``text`` with each path as file name and hash, and whatever ``names`` matches as three dots."""
    flag, equals, rest = text.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={hide_paths(rest, hashes, names)}"
    if text in hashes or os.path.isabs(text) or ("/" in text and Path(text).exists()):  # may hold spaces
        words = [show_file(text, hashes)]
    else:
        words = [
            show_file(word, hashes) if is_path(word) else word for word in re.split(r"([\s,;'\"\[\](){}=]+)", text)
        ]
    return names.sub("…", "".join(words))


def is_path(word: str) -> bool:
    """Return whether a word names a place on this machine, and is no URL, Hub id, version or share of something.

    Example:
        >>> [is_path(word) for word in ("/data/a.txt", "~/a", "../x", "file:///a", "data/*.txt", "a/b/c.txt")]
        [True, True, True, True, True, True]
        >>> [is_path(word) for word in ("HuggingFaceFW/fineweb", "https://huggingface.co/x/y", "a.txt", "3.11", "1/2")]
        [False, False, False, False, False]
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", word):
        return word.startswith("file:")
    if word.startswith(("/", "~", "./", "../")) or "\\" in word:
        return True
    return "/" in word and (re.fullmatch(r"[\w.-]+/[\w.-]+", word) is None or Path(word).exists())


def show_file(path: str, hashes: dict[str, str]) -> str:
    """Return a path's last part and, where the content is known or quickly read, its SHA-256."""
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "…"
    known = hashes.get(path)
    file = Path(path)
    if known is None and file.is_file() and file.stat().st_size <= HASHED:
        known = digest(file)
    return f"{name} (sha256 {known})" if known else name
