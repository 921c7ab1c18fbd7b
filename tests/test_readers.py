"""The strict reader: rows come whole and with their place; every kind of damage is named, with file and line."""

import csv
import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hfkit.data.documents import Rules, read_documents
from hfkit.data.readers import Row, given_texts, read_rows, text_lines, text_of
from hfkit.settings import BadInput

ROWS = [{"text": f"row {number} é 日本", "label": number % 2} for number in range(50)]
LINES = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def changed(number: int, line: bytes) -> bytes:
    """Return the 50 rows with another line `number` (from 1)."""
    return b"".join([*LINES[: number - 1], line, *LINES[number:]])


def problem_of(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), path.name)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_come_back_as_written(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.jsonl{ending}", b"".join(LINES))
    assert list(read_rows(path)) == [Row(row, f"{path}:{number}") for number, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ","), (".tsv.zst", "\t")])
def test_csv_rows_come_back_as_written_and_know_their_line(tmp_path: Path, ending: str, delimiter: str) -> None:
    buffer = io.StringIO()
    texts = ["plain", "two\nlines", 'a "quote"', f"a{delimiter}b", "", "é 日本", "x" * 200_000]
    csv.writer(buffer, delimiter=delimiter).writerows([("text", "label"), *((text, "1") for text in texts)])
    path = write(tmp_path / f"a{ending}", buffer.getvalue().encode())
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [{"text": text, "label": "1"} for text in texts]
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "3", "5", "6", "7", "8", "9"]


def test_parquet_rows_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 20), path, row_group_size=300)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS * 20
    assert rows[999].where == f"{path}:1000"


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_joined_compressed_files_are_read_to_the_end(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.jsonl.{ending}", b"".join(LINES))
    path.write_bytes(path.read_bytes() * 2)
    assert [row.values for row in read_rows(path)] == ROWS * 2


BAD_LINES = {
    "cut row": (b'{"text": "a\n', "a.jsonl:3: column 12: Invalid control character at"),
    "no comma": (b'{"text": "a" "label": 1}\n', "a.jsonl:3: column 14: Expecting ',' delimiter"),
    "two values": (b'{"text": "a"} {}\n', "a.jsonl:3: column 15: Extra data"),
    "not an object": (b'["a", 1]\n', "a.jsonl:3: starts with '['; each line must be one JSON object, {…}"),
    "a string": (b'"a"\n', "a.jsonl:3: starts with '\"'; each line must be one JSON object, {…}"),
    "duplicate key": (b'{"text": "a", "label": 1, "text": "b"}\n', "a.jsonl:3: text: the key is given twice"),
    "duplicate inside": (b'{"text": {"x": 1, "x": 2}}\n', "a.jsonl:3: x: the key is given twice"),
    "NaN": (b'{"text": "a", "label": NaN}\n', "a.jsonl:3: label: is not a finite number"),
    "infinity inside": (b'{"text": "a", "scores": [1, -Infinity]}\n', "a.jsonl:3: scores: is not a finite number"),
    "too large": (b'{"text": "a", "label": 1e999}\n', "a.jsonl:3: label: is not a finite number"),
    "NUL": (b'{"text": "a\0"}\n', "a.jsonl:3: byte 12 is NUL: the file is damaged or not UTF-8 text"),
    "Latin-1": (b'{"text": "caf\xe9"}\n', "a.jsonl:3: byte 14 is not UTF-8 (0xe9); save the file as UTF-8"),
    "blank": (b"\n", "a.jsonl:3: blank line between rows"),
    "deep": (b'{"a":' * 100_000 + b"\n", "a.jsonl:3: is nested too deeply"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_json_line_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    line, message = BAD_LINES[kind]
    path = write(tmp_path / "a.jsonl", changed(3, line))
    assert problem_of(path) == message
    problems: list[str] = []
    assert [row.values for row in read_rows(path, problems.append)] == ROWS[:2] + ROWS[3:]
    assert [problem.replace(str(path), path.name) for problem in problems] == [message]


def test_endless_integer_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n")
    assert problem_of(path).startswith("a.jsonl:1: Exceeds the limit (4300 digits)")


def test_nul_tail_of_a_torn_file_is_one_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"".join(LINES) + b"\0" * 4096)
    assert problem_of(path) == "a.jsonl:51: byte 1 is NUL: the file is damaged or not UTF-8 text"


def test_what_is_no_damage_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"".join(LINES).replace(b"\n", b"\r\n") + b"\r\n\n")
    assert [row.values for row in read_rows(path)] == ROWS
    path = write(tmp_path / "b.jsonl", b"".join(LINES).rstrip())
    assert [row.values for row in read_rows(path)] == ROWS


BAD_TABLES = {
    "ragged": (b"text,label\na,1\nb\n", "a.csv:3: 1 cells under 2 columns (text, label)"),
    "too wide": (b"text,label\na,b,1\n", "a.csv:2: 3 cells under 2 columns (text, label)"),
    "open quote": (b'text,label\na,1\n"b,1\nc,1\n', "a.csv:3: unexpected end of data"),
    "text after quote": (b'text,label\n"a"b,1\n', "a.csv:2: ',' expected after '\"'"),
    "two names": (b"text,text\na,b\n", "a.csv:1: text: two columns have this name"),
    "no name": (b"text,\na,b\n", "a.csv:1: the first line must name every column"),
    "no header": (b"\na,b\n", "a.csv:1: the first line must name every column"),
    "Latin-1": (b"text,label\na,1\ncaf\xe9,1\n", "a.csv:3: text: byte 4 is not UTF-8 (0xe9); save the file as UTF-8"),
    "NUL": (b"text,label\na,1\0\n", "a.csv:2: label: byte 2 is NUL: the file is damaged or not UTF-8 text"),
    "blank": (b"text,label\na,1\n\nb,1\n", "a.csv:3: blank line between rows"),
    "header only": (b"text,label\n", "a.csv: holds no rows"),
    "empty": (b"", "a.csv: holds no rows"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_bad_csv_is_named(tmp_path: Path, kind: str) -> None:
    content, message = BAD_TABLES[kind]
    assert problem_of(write(tmp_path / "a.csv", content)) == message


def test_csv_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text,label\na,1\n"b"x,1\nc\ncaf\xe9,1\nd,1\n\n')
    problems: list[str] = []
    assert [row.values["text"] for row in read_rows(path, problems.append)] == ["a", "d"]
    assert [problem.split(":")[1] for problem in problems] == ["3", "4", "5"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "cut at the end", "not compressed"])
def test_damaged_compressed_file_is_reported_once(tmp_path: Path, ending: str, damage: str) -> None:
    path = write(tmp_path / f"a.jsonl.{ending}", b"".join(LINES))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:200], "cut at the end": whole[:-3], "not compressed": LINES[0]}[damage])
    message = problem_of(path)
    assert message.startswith((f"a.jsonl.{ending}: cannot be read: ", f"after a.jsonl.{ending}:"))
    problems: list[str] = []
    rows = [row.values for row in read_rows(path, problems.append)]
    assert rows == ROWS[: len(rows)]
    assert [problem.replace(str(path), path.name) for problem in problems] == [message]


def test_other_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert problem_of(write(tmp_path / "a.jsonl", b"")) == "a.jsonl: holds no rows"
    assert problem_of(tmp_path / "none.jsonl") == "none.jsonl: cannot be read: No such file or directory"
    assert problem_of(write(tmp_path / "a.parquet", b"")).startswith(
        "a.parquet: cannot be read: Parquet file size is 0"
    )
    assert problem_of(write(tmp_path / "b.parquet", LINES[0])).startswith(
        "b.parquet: cannot be read: Parquet magic bytes"
    )
    assert problem_of(write(tmp_path / "a.xml", b"<a/>")).startswith("a.xml: rows are read from .jsonl, .csv, .tsv")


def test_parquet_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), path)
    assert problem_of(path) == "a.parquet:2: label: is not a finite number"


def test_lines_of_text_end_at_line_feeds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\ufeffone\u2028more\r\n\ntwo".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for path in (None, write(tmp_path / "a.txt", content), write(tmp_path / "a.txt.gz", content)):
        assert list(text_lines(path)) == ["one\u2028more", "", "two"]
    with pytest.raises(BadInput, match=r"b.txt:2: byte 4 is not UTF-8 \(0xe9\)"):
        list(text_lines(write(tmp_path / "b.txt", b"fine\ncaf\xe9\n")))
    cut = tmp_path / "c.txt.gz"
    cut.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(BadInput, match=r"c.txt.gz: cannot be read"):
        list(text_lines(cut))


@pytest.mark.parametrize(
    ("value", "piped", "message"),
    [
        ("-", b"", "classify: standard input is empty"),
        ("-", b"a\n \n", "classify: text 2 is empty"),
        ("-", b"a\ncaf\xe9\n", r"standard input:2: byte 4 is not UTF-8 \(0xe9\)"),
        ("caf\udce9", b"", "classify: text 1: character 4 is half a surrogate pair .* or a byte that is not UTF-8"),
    ],
)
def test_texts_that_cannot_be_used_are_one_line(
    value: str, piped: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    with pytest.raises(BadInput, match=message):
        given_texts(value, "classify")


def test_text_of_names_what_is_wrong() -> None:
    row = Row({"text": None, "label": 3, "half": "a\ud83d", "good": "é"}, "a.jsonl:7")
    assert text_of(row, "good") == "é"
    for column, message in {
        "body": "a.jsonl:7: no column 'body'; the columns are text, label, half, good. Set --data.text_column.",
        "text": "a.jsonl:7: text: is null, not text",
        "label": "a.jsonl:7: label: is int 3, not text",
        "half": r"a.jsonl:7: half: character 2 is half a surrogate pair ('\ud83d')",
    }.items():
        with pytest.raises(BadInput) as caught:
            text_of(row, column)
        assert str(caught.value) == message


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    peaks = []
    for copies in (1_000, 10_000):
        path = write(tmp_path / "a.jsonl.gz", line * copies)
        tracemalloc.start()
        assert sum(1 for _ in read_documents(path, Rules())) == copies
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 10_000_000


def test_line_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    text = "long line é " * 800_000
    path = write(tmp_path / "a.jsonl.zst", json.dumps({"text": text}).encode() + b"\n" + LINES[0])
    assert [row.values["text"] for row in read_rows(path)] == [text, ROWS[0]["text"]]
