"""Texts on disk: Parquet files with the columns ``text`` and ``where``, which ``datasets`` opens as they are."""

import os
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from hfkit.settings import BadInput

SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("where", pyarrow.string())])
GROUP = 1 << 20  # bytes of text in a row group, at least: what a worker takes at once, and what is held in memory

Group = tuple[Path, int]
"""A file that `TextWriter` wrote, and the number of one of its row groups."""


class TextWriter:
    """Writes texts to a Parquet file, a row group at a time.

    A group ends with the text that fills it, however the texts arrive, so that the file depends on the texts alone.

    Args:
        passing: The file is read once and deleted, so that compressing it would not pay.
        schema: Its columns; the first one is ``text``.
    """

    def __init__(self, path: Path, passing: bool = False, schema: pyarrow.Schema = SCHEMA) -> None:
        compression = "none" if passing else "zstd"
        self.schema = schema
        self.file = pyarrow.parquet.ParquetWriter(path, schema, compression=compression, use_dictionary=False)
        self.pending = schema.empty_table()
        self.rows: list[tuple[Any, ...]] = []
        self.size = 0

    def __enter__(self) -> "TextWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """Write what is left and finish the file."""
        self._hand_over()
        self._write_group(self.pending)
        self.file.close()

    def write(self, text: str, *more: Any) -> None:
        """Append a text, and what the other columns hold."""
        self.rows.append((text, *more))
        self.size += len(text)
        if self.size >= GROUP:
            self._hand_over()

    def write_table(self, table: pyarrow.Table) -> None:
        """Append texts."""
        self._hand_over()
        self._append(table)

    def _hand_over(self) -> None:
        if self.rows:
            columns = [list(column) for column in zip(*self.rows, strict=True)]
            try:
                table = pyarrow.table(columns, schema=self.schema)
            except pyarrow.ArrowCapacityError:
                _, where, *_ = max(self.rows, key=lambda row: len(row[0]))
                raise BadInput(
                    f"{where}: is over 2 GiB, more than one document may hold; set data.document to paragraph or line"
                ) from None
            self._append(table)
            self.rows, self.size = [], 0

    def _append(self, table: pyarrow.Table) -> None:
        """Write the groups that are full."""
        table = pyarrow.concat_tables([self.pending, table])
        ends = np.cumsum(text_sizes(table))
        start = size = 0
        while (last := int(np.searchsorted(ends, size + GROUP))) < len(ends):
            self._write_group(table.slice(start, last + 1 - start))
            start, size = last + 1, ends[last]
        self.pending = table.slice(start)

    def _write_group(self, table: pyarrow.Table) -> None:
        if len(table):
            self.file.write_table(table.combine_chunks())


def join_texts(paths: Sequence[Path], target: Path, schema: pyarrow.Schema = SCHEMA) -> None:
    """Write the texts of several files, one file after another, as one file; a single file gets another name."""
    target.unlink(missing_ok=True)  # of an attempt that was stopped; it may be another name of what is read here
    if len(paths) == 1:
        try:
            os.link(paths[0], target)
        except OSError:  # not every file system has links
            shutil.copyfile(paths[0], target)
        return
    with TextWriter(target, schema=schema) as writer:
        for path in paths:
            for group in list_groups(path):
                writer.write_table(read_table(group))


def list_groups(path: Path) -> list[Group]:
    """Return the row groups of a file, which worker processes read for themselves."""
    return [(path, number) for number in range(_open(path).num_row_groups)]


def read_table(group: Group) -> pyarrow.Table:
    """Return one row group as a table."""
    path, number = group
    return _open(path).read_row_group(number, use_threads=False)


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    """Open a file, or find it open: its footer grows with it, so reading that for each group would be quadratic."""
    status = path.stat()
    return _open_as(path, status.st_ino, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=2)
def _open_as(path: Path, *_: int) -> pyarrow.parquet.ParquetFile:
    return pyarrow.parquet.ParquetFile(path)


def forget_files() -> None:
    """Close the files that were read, so that those which were deleted give their space back."""
    _open_as.cache_clear()


def read_group(group: Group) -> list[str]:
    """Return the texts of one row group."""
    return read_table(group)["text"].to_pylist()


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file, a row group at a time."""
    for group in list_groups(path):
        yield from read_group(group)


def text_sizes(table: pyarrow.Table) -> list[int]:
    """Return the UTF-8 bytes of each text."""
    return pyarrow.compute.binary_length(table["text"]).to_pylist()
