"""Which files a setting names, and what their contents are, remembered so that an unchanged file is hashed once."""

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from hfkit.data.documents import TEXT_FORMATS
from hfkit.data.readers import ROW_FORMATS, reason, split_name
from hfkit.files import digest, read_json, write_json
from hfkit.settings import BadInput, Files

FORMATS = (*TEXT_FORMATS, *ROW_FORMATS)
# A folder of data often holds a README.md or settings in .json, so those are read only where a path or glob names them.
NAMED_ONLY = (".md", ".json")
SAVED_DATASET = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves


def list_files(files: Files, what: str, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Return the files that paths, globs (with ``**``) and folders name: each once, in the order given, sorted within.

    Args:
        files: One or several; globs and folders (with the folders inside, and those that links there lead to) take the
            files of accepted formats, and leave out what begins with a dot.
        what: The setting that they come from, such as ``data.train_files``, for messages.
        formats: The file endings that are accepted, before .gz or .zst.

    Raises:
        BadInput: for a path that is missing, of another format or no UTF-8, and where nothing is named or all is empty.
    """
    entries = [files] if isinstance(files, str) else list(files or [])
    if not entries:
        raise BadInput(f"{what}: names no file")
    found: dict[Path, None] = {}
    for entry in entries:
        paths = _expand(entry, what, formats)
        if odd := [str(path) for path in paths if os.fsencode(path).decode(errors="replace") != str(path)]:
            raise BadInput(f"{what}: the name {odd[0]!a} is not UTF-8; rename it")
        if not any(path.stat().st_size for path in paths):
            raise BadInput(
                f"{what}: {entry} is empty" if len(paths) == 1 else f"{what}: all files of {entry} are empty"
            )
        found.update(dict.fromkeys(paths))
    return list(found)


def _expand(entry: str, what: str, formats: tuple[str, ...]) -> list[Path]:
    """Return the files that one path, folder or glob names."""
    path = Path(entry).expanduser()
    accepted = f"(accepted: {' '.join(formats)}, also .gz and .zst)"
    if path.is_dir():
        if any((path / name).exists() for name in SAVED_DATASET):
            raise BadInput(f"{what}: {entry} is a saved dataset; give it as data.dataset")
        unnamed = tuple(ending for ending in formats if ending not in NAMED_ONLY)
        shown = (file for file in _files_below(path) if not _is_hidden(file.relative_to(path)))
        if not (paths := _readable(shown, unnamed)):
            raise BadInput(f"{what}: the folder {entry} holds no text {accepted}")
        return paths
    if path.exists():
        if split_name(path)[0] not in formats:
            raise BadInput(f"{what}: {entry} has no format that can be read here {accepted}")
        return [path]
    if not glob.has_magic(entry):
        raise BadInput(f"{what}: no such file or folder: {entry}")
    if not (paths := _readable(map(Path, glob.glob(str(path), recursive=True)), formats)):
        raise BadInput(f"{what}: {entry} matches no file that can be read {accepted}")
    return paths


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and all shown folders inside, then of those that links lead to: each folder once."""
    seen: set[str] = set()
    waiting = [str(folder)]
    while waiting:
        for root, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(root)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (Path(root, name) for name in names)
            waiting += sorted(path for name in folders if os.path.islink(path := os.path.join(root, name)))


def _readable(paths: Iterable[Path], formats: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in paths if split_name(path)[0] in formats and path.is_file())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def content_digests(paths: list[Path], memory: Path | None = None) -> list[str]:
    """Return the SHA-256 of each file's content.

    Args:
        memory: A JSON file that remembers the digests by path, size, time of change and inode; a file for which all
            of these are as they were is not read again.
    """
    known = (read_json(memory) if memory else None) or {}
    before = dict(known)
    digests = []
    for path in paths:
        name, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        if known.get(name, [])[:-1] != stamp:
            try:
                known[name] = [*stamp, digest(path)]
            except OSError as error:
                raise BadInput(f"{path}: cannot be read: {reason(error)}") from None
        digests.append(known[name][-1])
    if memory and known != before:
        with suppress(OSError):  # they are hashed again then; whoever has to write there says what is wrong
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known)
    return digests
