"""The training text on its way: parts of it, each with its files in a scratch folder, and what became of each.

On one machine a part is a source; where preparation is spread over many tasks, a source has many parts. The order of
the parts is the order of the documents, and with it decides which of two duplicates stays.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from hfkit.data.account import CLUSTERS
from hfkit.data.dedup import find_exact_duplicates, find_near_duplicates
from hfkit.data.rows import Rows
from hfkit.settings import DedupConfig

OVERLAPS = pyarrow.schema(
    [
        ("text", pyarrow.string()),  # the passage shared with evaluation text, or the beginning of a duplicate
        ("where", pyarrow.string()),
        ("rule", pyarrow.string()),  # kept_first, exact_duplicates, near_duplicates or contaminated
        ("source", pyarrow.string()),
        ("cluster", pyarrow.int64()),  # the same for all duplicates of one document and that itself; else -1
    ]
)


@dataclass(frozen=True)
class Draft:
    """One part of the training text."""

    folder: Path
    number: int
    """Its place among all parts."""
    source: int
    """Its source's place among the sources."""
    name: str
    """The source's name."""

    @property
    def text(self) -> Path:
        """Cleaned documents, duplicates and all."""
        return self._file("text", "parquet")

    @property
    def validation(self) -> Path:
        """Documents that are held out, as they were read."""
        return self._file("validation", "parquet")

    @property
    def kept(self) -> Path:
        """Documents that stay."""
        return self._file("kept", "parquet")

    @property
    def overlaps(self) -> Path:
        """Those that do not, and why."""
        return self._file("overlaps", "parquet")

    @property
    def hashes(self) -> Path:
        """16 bytes a cleaned document."""
        return self._file("hashes", "bin")

    @property
    def signatures(self) -> Path:
        """A MinHash signature a cleaned document."""
        return self._file("signatures", "bin")

    @property
    def account(self) -> Path:
        """What became of the documents until they are compared, where that is another process's work."""
        return self._file("account", "json")

    @property
    def outcome(self) -> Path:
        """The whole account."""
        return self._file("outcome", "json")

    def _file(self, what: str, ending: str) -> Path:
        return self.folder / f"{what}-{self.number:05d}.{ending}"

    def count(self) -> int:
        """Return how many cleaned documents there are."""
        return pyarrow.parquet.read_metadata(self.text).num_rows


class Duplicates:
    """Which documents repeat earlier ones: arrays on disk, one place for each cleaned document of all drafts."""

    def __init__(self, folder: Path) -> None:
        self.exact, self.near, self.heads = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        self.listed = set(np.load(folder / "listed.npy").tolist())
        """The first documents of the clusters that the audit shows."""

    def look_up(self, begin: int, end: int) -> tuple[list[int], list[bool], list[bool]]:
        """Return of each document in a range its cluster's first, whether it copies one exactly, and whether it is one.

        A copy of a document that is itself near an earlier one belongs to that one's cluster.
        """
        exact = self.exact[begin:end]
        return self.near[exact].tolist(), (exact != np.arange(begin, end)).tolist(), self.heads[begin:end].tolist()


_ARRAYS = {"exact": np.int64, "near": np.int64, "heads": np.bool_}
_CHUNK = 1 << 16


def find_duplicates(folder: Path, drafts: Sequence[Draft], config: DedupConfig) -> None:
    """Write what `Duplicates` opens."""
    count = sum(draft.count() for draft in drafts)
    exact, near, heads = (_array_on_disk(folder / f"{name}.npy", kind, count) for name, kind in _ARRAYS.items())
    chunks = [slice(begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK)]
    for chunk in chunks:
        exact[chunk] = near[chunk] = np.arange(chunk.start, chunk.stop)
    if config.exact:
        hashes = Rows([draft.hashes for draft in drafts], np.uint8, 16)
        find_exact_duplicates(hashes, exact, folder)
        hashes.close()
    if config.near:
        signatures = Rows([draft.signatures for draft in drafts], np.uint32, config.permutations)
        find_near_duplicates(signatures, config, exact, near, folder)
        signatures.close()
    for chunk in chunks:
        first = near[exact[chunk]]
        heads[first[first != np.arange(chunk.start, chunk.stop)]] = True
    listed: list[int] = []
    for chunk in chunks:
        if len(listed) < CLUSTERS:
            listed += (chunk.start + np.flatnonzero(heads[chunk])).tolist()
    np.save(folder / "listed.npy", np.array(listed[:CLUSTERS], np.int64))
    for array in (exact, near, heads):
        array.flush()


def _array_on_disk(path: Path, kind: type[np.generic], count: int) -> np.memmap:
    array = np.lib.format.open_memmap(path, "w+", kind, (max(1, count),))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:  # a full disk is an error here; a page that cannot be written kills the process
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
