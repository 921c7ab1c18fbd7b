"""A strict reader of local files: every row with its place, every problem as one `file:line: field: reason`.

`datasets` loads about half of all malformed JSON and CSV files silently and names no row for the rest, so local files
are read here. Rows come one at a time; memory is bounded by the longest row (.parquet: by a row group).

A blank line between rows is a problem, since a row may be missing there; blank lines at the end of a file are not.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from hfkit.settings import BadInput

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json-lines", ".json")
ROW_FORMATS = (*JSON_LINES, *DELIMITERS, ".parquet")
PARQUET_BATCH = 256  # rows decoded at a time

OnBad = Callable[[str], None] | None
"""Is told of a problem, whose row is then left out; None raises the problem as BadInput."""


class Row(NamedTuple):
    """One row of a file, and where it stands, such as ``reviews.jsonl:17``."""

    values: dict[str, Any]
    where: str


def split_name(path: Path) -> tuple[str, str]:
    """Return the format and the compression that a file's name ends with.

    Example:
        >>> split_name(Path("a.JSONL.gz")), split_name(Path("b.txt"))
        (('.jsonl', '.gz'), ('.txt', ''))
    """
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def read_rows(path: Path, on_bad: OnBad = None) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv, .tsv or .parquet file, plain or (but .parquet) compressed as .gz or .zst.

    Args:
        path: The file. A .json file is read as JSON Lines. CSV and TSV need a header line; their values are strings.
        on_bad: Is told of each problem, whose row is left out; where a file cannot be read on (a cut .gz, a CSV
            without a usable header), it is told once and the rest of the file is left out.

    Raises:
        BadInput: at the first problem, if `on_bad` is not given.
    """
    kind, compression = split_name(path)
    if kind in JSON_LINES:
        items = _json_rows(path)
    elif kind in DELIMITERS:
        items = _csv_rows(path, DELIMITERS[kind])
    elif kind == ".parquet" and not compression:
        items = _parquet_rows(path)
    else:
        raise BadInput(f"{path}: rows are read from .jsonl, .csv, .tsv (also .gz, .zst) and .parquet files")
    last = f"{path}: "
    empty = True
    try:
        for item in items:
            empty = False
            if isinstance(item, Row):
                last = f"after {item.where}: "
                yield item
            else:
                report(item, on_bad)
    except (OSError, pyarrow.ArrowException) as error:
        report(f"{last}cannot be read: {reason(error)}", on_bad)
        return
    if empty:
        report(f"{path}: holds no rows", on_bad)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its number (from 1), its ending and without a byte order mark, decompressing by name.

    Raises:
        OSError: if the file cannot be read, or its compressed data is damaged or cut short.
    """
    compression = COMPRESSIONS.get(split_name(path)[1])
    with path.open("rb") as raw:
        # pyarrow notices a cut stream in both formats; the zstandard package ends silently there.
        source = pyarrow.input_stream(raw, compression=compression) if compression else raw
        yield from _numbered(io.BufferedReader(source, 1 << 20) if compression else raw)


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers, the first one without a byte order mark."""
    for number, line in enumerate(lines, 1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def text_lines(path: Path | None) -> Iterator[str]:
    """Yield the lines of a text file, or of standard input where it is None, cut at line feeds and without them.

    Raises:
        BadInput: for what cannot be read or is not UTF-8, with its place.
    """
    name = "standard input" if path is None else str(path)
    try:
        for number, line in _numbered(sys.stdin.buffer) if path is None else read_lines(path):
            try:
                yield decode(line.rstrip(b"\r\n"))
            except BadInput as problem:
                raise BadInput(f"{name}:{number}: {problem}") from None
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {reason(error)}") from None


def given_texts(value: str, name: str) -> list[str]:
    """Return the text that a flag gives, or, where that is ``-``, the lines of standard input.

    Args:
        name: What a complaint calls the flag.

    Raises:
        BadInput: if there is none, or one is blank or not UTF-8.
    """
    texts = list(text_lines(None)) if value == "-" else [value]
    if not texts:
        raise BadInput(f"{name}: standard input is empty")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise BadInput(f"{name}: text {number} is empty")
        check_text(text, f"{name}: text {number}")
    return texts


def decode(line: bytes) -> str:
    """Return the line as text.

    Raises:
        BadInput: naming the first byte (from 1) that is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}); save the file as UTF-8"
        ) from None


def report(problem: str, on_bad: OnBad) -> None:
    """Pass a problem to `on_bad`, or raise it where there is none."""
    if on_bad is None:
        raise BadInput(problem)
    on_bad(problem)


def check_text(text: str, where: str) -> None:
    """Raise BadInput for text that UTF-8 cannot hold: half a surrogate pair, such as a wrong byte of a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        byte = ", or a byte that is not UTF-8" if "\udc80" <= half <= "\udcff" else ""
        raise BadInput(f"{where}: character {error.start + 1} is half a surrogate pair ({half!a}){byte}") from None


def text_of(row: Row, column: str, flag: str = "data.text_column") -> str:
    """Return the string in a row's column.

    Args:
        flag: The setting that names the column, for the message; empty where none does.

    Raises:
        BadInput: if there is no such column (the message names those there are), or it holds no valid string.
    """
    if column not in row.values:
        advice = f" Set --{flag}." if flag else ""
        raise BadInput(f"{row.where}: no column {column!r}; the columns are {', '.join(row.values)}.{advice}")
    value = row.values[column]
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise BadInput(f"{row.where}: {column}: is {kind}, not text")
    check_text(value, f"{row.where}: {column}")
    return value


def reason(error: Exception) -> str:
    """Return the first line of what an exception of the system or of a library says."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _json_rows(path: Path) -> Iterator[Row | str]:
    """Yield each row of a JSON Lines file, or the problem in its place."""
    blank = None
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if line.isspace():
            blank = blank or where
            continue
        if blank:
            yield f"{blank}: blank line between rows"
            blank = None
        try:
            yield Row(_parse_object(line), where)
        except BadInput as problem:
            yield f"{where}: {problem}"


def _parse_object(line: bytes) -> dict[str, Any]:
    """Return a line's JSON object; unlike `json.loads`, refuse keys given twice and numbers that are not finite."""
    text = _decode_row(line)
    if (start := text.lstrip()[:1]) != "{":
        raise BadInput(f"starts with {start!r}; each line must be one JSON object, {{…}}")
    try:
        return STRICT_JSON.decode(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"column {error.colno}: {error.msg}") from None
    except OverflowError:
        raise BadInput(f"{_field_not_finite(text)}: is not a finite number") from None
    except RecursionError:
        raise BadInput("is nested too deeply") from None
    except ValueError as error:  # a key given twice, or an integer of more than 4,300 digits
        raise BadInput(reason(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadInput(f"{next(key for key in keys if keys.count(key) > 1)}: the key is given twice")
    return values


def _finite(literal: str) -> float:
    if not math.isfinite(number := float(literal)):
        raise OverflowError(literal)
    return number


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def _field_not_finite(text: str) -> str:
    """Return the field of a JSON object that holds NaN or an infinite number, however deep."""
    for name, value in json.loads(text).items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return name
    return "a key given twice"


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row | str]:
    """Yield each row under the header of a CSV file, or the problem in its place; a row may span lines."""
    csv.field_size_limit(sys.maxsize)  # the default refuses cells over 128 KiB
    # An undecodable byte travels as a lone surrogate, so that the row and cell that hold it can be named.
    lines = (line.decode("utf-8", "surrogateescape") for _, line in read_lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    blank = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
            if header and not cells:
                blank = blank or where
                continue
            if blank:
                yield f"{blank}: blank line between rows"
                blank = None
            if header:
                yield Row(_named_cells(header, cells), where)
            else:
                header = _checked_header(cells)
        except StopIteration:
            return
        except (csv.Error, BadInput) as problem:
            yield f"{where}: {problem}"
            if not header:
                return


def _checked_header(cells: list[str]) -> list[str]:
    """Return the column names, each there and there once."""
    names = [_decode_row(cell.encode("utf-8", "surrogateescape")) for cell in cells]
    if not names or not all(names):
        raise BadInput("the first line must name every column")
    if len(set(names)) < len(names):
        raise BadInput(f"{next(name for name in names if names.count(name) > 1)}: two columns have this name")
    return names


def _named_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    """Return the cells under their column names, each checked to be text."""
    if len(cells) != len(header):
        raise BadInput(f"{len(cells)} cells under {len(header)} columns ({', '.join(header)})")
    for name, cell in zip(header, cells, strict=True):
        try:
            _decode_row(cell.encode("utf-8", "surrogateescape"))
        except BadInput as problem:
            raise BadInput(f"{name}: {problem}") from None
    return dict(zip(header, cells, strict=True))


def _decode_row(line: bytes) -> str:
    if (position := line.find(b"\0")) >= 0:
        raise BadInput(f"byte {position + 1} is NUL: the file is damaged or not UTF-8 text")
    return decode(line)


def _parquet_rows(path: Path) -> Iterator[Row | str]:
    """Yield each row of a Parquet file, or the problem in its place; rows are numbered from 1."""
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
        if len(set(names := file.schema_arrow.names)) < len(names):
            yield f"{path}: {next(name for name in names if names.count(name) > 1)}: two columns have this name"
            return
        batches = file.iter_batches(PARQUET_BATCH)
        rows = chain.from_iterable(zip(*batch.columns, strict=True) for batch in batches)
        for number, cells in enumerate(rows, 1):
            try:
                yield Row(_parquet_cells(names, cells), f"{path}:{number}")
            except BadInput as problem:
                yield f"{path}:{number}: {problem}"


def _parquet_cells(names: list[str], cells: Iterable[Any]) -> dict[str, Any]:
    """Return the cells as Python values under their column names."""
    values = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            values[name] = cell.as_py()
        except UnicodeDecodeError as error:
            raise BadInput(f"{name}: byte {error.start + 1} is not UTF-8") from None
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise BadInput(f"{name}: is not a finite number")
    return values
