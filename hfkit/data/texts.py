"""Texts on disk: Parquet files with the columns ``text`` and ``where``, which ``datasets`` opens as they are."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("where", pyarrow.string())])
GROUP = 1 << 22  # characters of a row group: what is held in memory while writing and reading


class TextWriter:
    """Writes texts to a Parquet file, a megabyte or so at a time."""

    def __init__(self, path: Path) -> None:
        self.file = pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=1)
        self.texts: list[str] = []
        self.wheres: list[str] = []
        self.size = 0

    def __enter__(self) -> "TextWriter":
        return self

    def __exit__(self, *_: object) -> None:
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

    def flush(self) -> None:
        """Write the texts gathered so far as one row group."""
        if self.texts:
            self.file.write_table(pyarrow.table([self.texts, self.wheres], schema=SCHEMA))
        self.texts, self.wheres, self.size = [], [], 0


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (text, where) of a file that ``TextWriter`` wrote, a row group at a time."""
    file = pyarrow.parquet.ParquetFile(path)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        yield from zip(table["text"].to_pylist(), table["where"].to_pylist(), strict=True)
