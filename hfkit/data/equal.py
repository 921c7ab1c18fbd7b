"""Documents brought together by equal keys in bounded memory: by sorting, through files once there are many."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

AT_ONCE = 1 << 20  # documents sorted at once: about 60 MB
_MOST_FILES = 256  # open at once; from 256 million documents on, more of them are sorted at once


def gather_equal(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], count: int, folder: Path | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the documents ordered by key, part by part: the documents, and where in the part each one's run begins.

    Documents of equal keys are always in the same part, and keep their order.

    Args:
        chunks: Keys, (documents, columns) uint64 of which the first is spread evenly over its range, and the documents'
            numbers, (documents,) int64.
        count: About how many documents there are.
        folder: Where temporary files go; None is the system's place.

    Example:
        >>> keys = np.array([[7], [5], [7], [5], [9]], np.uint64)
        >>> [(documents.tolist(), runs.tolist()) for documents, runs in gather_equal([(keys, np.arange(5))], 5)]
        [([1, 3, 0, 2, 4], [0, 0, 2, 2, 4])]
    """
    if count <= AT_ONCE:
        if parts := [_join(*chunk) for chunk in chunks]:
            yield _order(np.concatenate(parts))
        return
    bits = (min(_MOST_FILES, -(-count // AT_ONCE)) - 1).bit_length()
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 << bits)]
        width = 0
        for keys, documents in chunks:
            rows = _join(keys, documents)
            width = rows.shape[1]
            _spread(rows, files, np.uint64(64 - bits))
        for file in files:
            file.seek(0)
            yield _order(np.fromfile(file, np.uint64).reshape(-1, width))
            file.close()


def _join(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return np.column_stack([keys, documents.astype(np.uint64)])


def _spread(rows: np.ndarray, files: Sequence[IO[bytes]], shift: np.uint64) -> None:
    """Append each row to the file that the upper bits of its first key name."""
    owners = (rows[:, 0] >> shift).astype(np.int64)
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(len(files) + 1))
    for number, file in enumerate(files):
        file.write(rows[order[bounds[number] : bounds[number + 1]]].tobytes())


def _order(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = rows[:, :-1]
    order = np.lexsort(keys.T[::-1])  # stable: equal keys keep the documents' order
    starts = np.ones(len(order), bool)
    starts[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return rows[order, -1].astype(np.int64), run_starts(starts)


def run_starts(starts: np.ndarray) -> np.ndarray:
    """For each place of a sorted array, where its run of equal values begins, of which the starts are marked."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
