"""The built-in corpus: about 2 MB of English that every Python brings along, so that a first run downloads nothing.

It holds the reference topics of `help()` and the documentation strings of the standard library, read from the source
files without importing them. Another Python version has slightly other text; the same one always gives the same.
"""

import ast
import gc
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from hfkit.data.documents import Document
from hfkit.files import digest
from hfkit.settings import BadInput

SHORTEST = 300  # characters; shorter documents are joined to a neighbour of their module, or left out
LONG_ENOUGH = 2000  # characters from which the next definition begins a new document

# No text worth learning, or not of the standard library; config-… folders and test packages go by their prefix.
SKIPPED = "site-packages dist-packages idlelib lib2to3 turtledemo encodings pydoc_data __pycache__".split()
SKIPPED_PREFIXES = ("test", "_test", "config-")


def builtin_documents() -> Iterator[Document]:
    """Yield the documents, each different from all before.

    Raises:
        BadInput: if this Python comes without its sources.
    """
    found = False
    seen: set[str] = set()
    for document in _all_documents():
        if document.text not in seen:
            seen.add(document.text)
            found = True
            yield document
    if not found:
        raise BadInput("this Python comes without documentation; give data.train_files")


def identify_builtin() -> list[str]:
    """Return what decides the documents, without reading them: the Python build, and this file."""
    return ["builtin", sys.version, digest(Path(__file__))]


def _all_documents() -> Iterator[Document]:
    for name, text in sorted(topics.items()):
        if len(text) >= SHORTEST:
            yield Document(text.strip() + "\n", f"topic {name}")
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(_module_paths(root)):
        for number, text in enumerate(_module_texts(path, seen), 1):
            yield Document(text, f"{path.relative_to(root)}#{number}")


def _module_paths(root: Path) -> Iterator[Path]:
    """Yield the source files below a folder, without entering folders to skip: site-packages may be huge."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith(SKIPPED_PREFIXES)]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test"))


def _module_texts(path: Path, seen: set[str]) -> Iterator[str]:
    """Yield a module's documentation strings that were not seen, joined to texts of a few thousand characters."""
    if (tree := _parse(path)) is None:
        return
    texts: list[str] = []
    text = ""
    for piece in _docstrings(tree):
        if piece in seen or not _encodes(piece):
            continue
        seen.add(piece)
        if len(text) >= LONG_ENOUGH:
            texts.append(text)
            text = ""
        text += f"\n{piece}\n" if text else f"{piece}\n"
    if len(text) < SHORTEST and texts:
        texts[-1] += f"\n{text}" if text else ""
    else:
        texts.append(text)
    yield from (text for text in texts if len(text) >= SHORTEST)


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a source file, or None where it holds no valid Python, as some templates do."""
    collects = gc.isenabled()
    gc.disable()  # a tree has no cycles; collecting while a million nodes are made: 2.5 -> 4.9 s for all modules
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None
    finally:
        if collects:
            gc.enable()


def _docstrings(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Yield the documentation strings of a module or class and of what it defines, in their order."""
    definitions = [
        child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    yield (ast.get_docstring(node) or "").strip()
    for definition in definitions:
        if isinstance(definition, ast.ClassDef):
            yield from _docstrings(definition)
        else:
            yield (ast.get_docstring(definition) or "").strip()


def _encodes(text: str) -> bool:
    """Return whether there is text, and none of it is half a surrogate pair."""
    return bool(text) and not any("\ud800" <= character <= "\udfff" for character in text)
