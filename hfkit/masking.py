"""Credentials kept out of whatever a run writes: passport, trackers, report."""

import os
import re
from pathlib import Path
from typing import Any

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
