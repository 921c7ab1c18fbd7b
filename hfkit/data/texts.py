"""Texts on disk: Parquet files with the columns ``text`` and ``where``, which ``datasets`` opens as they are."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet

SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("where", pyarrow.string())])
GROUP = 1 << 20  # characters of a row group, at least: what one worker takes at once, and what is held in memory

Group = tuple[Path, int]
"""A file that `TextWriter` wrote, and the number of one of its row groups."""


class TextWriter:
    """Writes texts to a Parquet file, a row group at a time.

    Args:
        passing: The file is read once and deleted, so that compressing it would not pay.
    """

    def __init__(self, path: Path, passing: bool = False) -> None:
        compression = "none" if passing else "zstd"
        self.file = pyarrow.parquet.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=False)
        self.texts: list[str] = []
        self.wheres: list[str] = []
        self.size = 0

    def __enter__(self) -> "TextWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """Write what is left and finish the file."""
        self.flush()
        self.file.close()

    def write(self, text: str, where: str) -> None:
        """Append a text."""
        self.texts.append(text)
        self.wheres.append(where)
        self.size += len(text)
        if self.size >= GROUP:
            self.flush()

    def write_table(self, table: pyarrow.Table) -> None:
        """Append texts as one row group; no call of `write` comes between."""
        if len(table):
            self.file.write_table(table)

    def flush(self) -> None:
        """Write the texts gathered so far as one row group."""
        self.write_table(pyarrow.table([self.texts, self.wheres], schema=SCHEMA))
        self.texts, self.wheres, self.size = [], [], 0


def list_groups(path: Path) -> list[Group]:
    """Return the row groups of a file, which worker processes read for themselves."""
    return [(path, group) for group in range(pyarrow.parquet.ParquetFile(path).num_row_groups)]


def read_table(group: Group) -> pyarrow.Table:
    """Return one row group as a table."""
    path, number = group
    return pyarrow.parquet.ParquetFile(path).read_row_group(number, use_threads=False)


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
