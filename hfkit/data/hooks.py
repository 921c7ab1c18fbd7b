"""The user's own functions on documents, found by dotted name."""

import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from hfkit.files import digest
from hfkit.settings import BadInput

Hook = Callable[[str], str | None]
"""Takes a document's text and returns the text to go on with, or None to drop the document."""


def load_hooks(names: list[str]) -> list[Hook]:
    """Return the functions that dotted names such as ``my_rules.drop_short`` or ``builtins.str.lower`` stand for.

    Modules are also looked for in the working folder.

    Raises:
        BadInput: if there is no such module or function, or the module fails to import.
    """
    return [_load_hook(name) for name in names]


def identify_hooks(names: list[str]) -> list[list[str]]:
    """Return each name with the digest of the file that defines it: what changes when the user edits a hook.

    Only that file is hashed, not what it imports.
    """
    hooks = load_hooks(names)
    modules = [getattr(hook, "__module__", None) or "" for hook in hooks]  # str.lower and its like have none
    files = [getattr(sys.modules.get(module), "__file__", None) for module in modules]
    return [[name, digest(Path(file)) if file else ""] for name, file in zip(names, files, strict=True)]


def call_hook(name: str, hook: Hook, text: str, where: str) -> str | None:
    """Return what a hook makes of a document's text.

    Raises:
        BadInput: naming hook and document, if the hook fails or returns anything but text or None.
    """
    try:
        changed = hook(text)
    except Exception as error:  # the user's function may fail in any way
        raise BadInput(f"data.hooks: {name} fails on {where}: {type(error).__name__}: {error}") from error
    if changed is not None and not isinstance(changed, str):
        raise BadInput(f"data.hooks: {name} returns {changed!r:.40} for {where}, not text, or None to drop it")
    return changed


def _load_hook(name: str) -> Hook:
    if "." not in name:
        raise BadInput(f"data.hooks: {name!r} is not a dotted name such as my_rules.drop_short")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # last, so that nothing there hides an installed module
    try:
        hook = pkgutil.resolve_name(name)
    except Exception as error:  # the user's module may fail in any way
        raise BadInput(f"data.hooks: {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(hook):
        raise BadInput(f"data.hooks: {name} is no function")
    return hook
