"""Rows of fixed width in files, read by range or by number without holding a file in memory.

A memory map would do the same, but every page that was touched counts as the process's own until the map is closed:
with 512 bytes a document that grows with the corpus.
"""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

_MOST_OPEN = 256  # files; a process may open 1,024 on most systems, and a corpus may lie in more


class Rows:
    """The rows of several files, one file after another: (rows, width), indexed like an array by slice or numbers."""

    def __init__(self, paths: Sequence[Path], dtype: type[np.generic], width: int) -> None:
        self.dtype, self.width = np.dtype(dtype), width
        self.bytes = self.dtype.itemsize * width
        self.paths = list(paths)
        self.files: dict[int, int] = {}  # those that are open, the one that was read last at the end
        self.bounds = np.cumsum([0, *(path.stat().st_size // self.bytes for path in paths)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        if isinstance(which, slice):
            return self._shaped([self._read(*piece) for piece in self._pieces(*which.indices(len(self))[:2])])
        numbers, places = np.unique(which, return_inverse=True)
        owners = np.searchsorted(self.bounds, numbers, side="right") - 1
        offsets = numbers - self.bounds[owners]
        rows = [self._read(*row, 1) for row in zip(owners.tolist(), offsets.tolist(), strict=True)]
        return self._shaped(rows)[places]

    def close(self) -> None:
        """Close the files."""
        while self.files:
            os.close(self.files.popitem()[1])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return what lies between two rows, file by file: file, first row in it, rows."""
        pieces = [
            (number, max(start - first, 0), min(stop, last) - max(start, first))
            for number, (first, last) in enumerate(pairwise(self.bounds.tolist()))
        ]
        return [piece for piece in pieces if piece[2] > 0]

    def _read(self, file: int, row: int, count: int) -> bytes:
        return os.pread(self._open(file), count * self.bytes, row * self.bytes)

    def _open(self, file: int) -> int:
        """Open a file, or find it open; the one that was not read for longest makes room."""
        if file not in self.files and len(self.files) == _MOST_OPEN:
            os.close(self.files.pop(next(iter(self.files))))
        self.files[file] = self.files.pop(file) if file in self.files else os.open(self.paths[file], os.O_RDONLY)
        return self.files[file]

    def _shaped(self, pieces: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(pieces), self.dtype).reshape(-1, self.width)
