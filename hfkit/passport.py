"""The passport of a run: what made this result (data, versions, hardware, seeds, command), and how much may be shown.

``passport.json`` stays on the machine; ``public_passport`` is the part that may be published with a model.
"""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import hfkit
from hfkit.files import read_json, write_json

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub")
SECRET = re.compile(
    r"\b(hf|api_org)_[A-Za-z0-9]{8,}"  # Hugging Face
    r"|\b(sk|pk)-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bAKIA[A-Z0-9]{16}\b"  # other services
    r"|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"  # user:password in a URL
)
SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")
SECRET_FLAG = re.compile(r"(token|secret|password|api_key)$", re.IGNORECASE)


def mask_secrets(text: str) -> str:
    """Return ``text`` without anything that looks like a credential or equals one in the environment.

    Example:
        >>> mask_secrets("--hub.token hf_abcdefghijklmnop")
        '--hub.token ***'
    """
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return SECRET.sub("***", text)


def mask_command(command: list[str]) -> list[str]:
    """Return a command with credentials masked, also whatever follows a flag that is named like one.

    Example:
        >>> mask_command(["run.py", "--wandb_api_key", "abc", "--password=x", "--tokenizer", "b"])
        ['run.py', '--wandb_api_key', '***', '--password=***', '--tokenizer', 'b']
    """
    masked, hide = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        is_flag = word.startswith("-")
        names_secret = is_flag and SECRET_FLAG.search(flag) is not None
        if names_secret and equals:
            masked.append(f"{flag}=***")
        else:
            masked.append("***" if hide and not is_flag else mask_secrets(word))
        hide = names_secret and not equals
    return masked


def mask_values(value: Any) -> Any:
    """Return a JSON value with credentials masked in every string."""
    if isinstance(value, dict):
        return {mask_secrets(str(key)): mask_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_values(item) for item in value]
    return mask_secrets(str(value)) if isinstance(value, (str, Path)) else value


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
    resumed_from: int | None = None,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Write ``output_dir/passport.json`` and return it; a resumed run keeps the sessions before in ``sessions``.

    Args:
        data: Revisions and content hashes of the data, as the data path knows them.
        tokenizer: Hash and origin of the tokenizer.
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
        "versions": find_versions(),
        "commit": find_commit(),
        "hardware": find_hardware(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "sessions": [*earlier, session],
    }
    write_json(path, passport)
    return passport
