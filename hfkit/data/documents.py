"""Documents: the texts that a language model learns from, cut from text files or taken from a column of rows.

A text file is cut while it is read, so that memory is bounded by one document. Text is never changed here; only the
newline that ends a `line` or `paragraph` is left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hfkit.data.readers import OnBad, decode, read_lines, read_rows, reason, report, split_name, text_of
from hfkit.settings import BadInput

TEXT_FORMATS = (".txt", ".md")


class Document(NamedTuple):
    """One text, and where it begins, such as ``wiki.txt:17``."""

    text: str
    where: str


@dataclass(frozen=True)
class Rules:
    """What a document of a file is: see `DataConfig`."""

    text_column: str = "text"
    document: Literal["file", "paragraph", "line"] = "file"
    document_start: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.document_start or "")
        except re.error as error:
            raise BadInput(f"data.document_start {self.document_start!r} is no regular expression: {error}") from None


def read_documents(path: Path, rules: Rules, on_bad: OnBad = None) -> Iterator[Document]:
    """Yield the documents of a file in their order.

    Args:
        path: A text file (.txt, .md), cut by the rules, or a file of rows, of which each is one document.
        on_bad: As for `read_rows`; in a text file the document that holds the problem is left out.

    Raises:
        BadInput: at the first problem, if `on_bad` is not given.
    """
    if split_name(path)[0] in TEXT_FORMATS:
        yield from _cut_text(path, rules, on_bad)
        return
    for row in read_rows(path, on_bad):
        try:
            text = text_of(row, rules.text_column)
        except BadInput as problem:
            report(str(problem), on_bad)
        else:
            yield Document(text, row.where)


def _cut_text(path: Path, rules: Rules, on_bad: OnBad) -> Iterator[Document]:
    """Yield the documents of a text file that are not blank; report damaged ones, and a file without any."""
    empty = True
    try:
        for lines in _group_lines(path, rules):
            number = lines[0][0]
            try:
                text = "".join([_decode_at(path, number, line) for number, line in lines])
            except BadInput as problem:
                empty = False
                report(str(problem), on_bad)
                continue
            if not text or text.isspace():
                continue
            empty = False
            if rules.document_start is None and rules.document == "file":
                yield Document(text, str(path))
            elif rules.document_start is not None:
                yield Document(text, f"{path}:{number}")
            else:
                yield Document(text.removesuffix("\n").removesuffix("\r"), f"{path}:{number}")
    except OSError as error:
        report(f"{path}: cannot be read: {reason(error)}", on_bad)
        return
    if empty:
        report(f"{path}: holds no text", on_bad)


def _decode_at(path: Path, number: int, line: bytes) -> str:
    try:
        return decode(line)
    except BadInput as problem:
        raise BadInput(f"{path}:{number}: {problem}") from None


def _group_lines(path: Path, rules: Rules) -> Iterator[list[tuple[int, bytes]]]:
    """Yield the numbered lines of each document; what lies between paragraphs belongs to none."""
    start = None if rules.document_start is None else re.compile(rules.document_start)
    group: list[tuple[int, bytes]] = []
    for number, line in read_lines(path):
        if start is not None:
            begins = start.search(line.decode("utf-8", "replace").rstrip("\r\n")) is not None
            if all(
                not earlier.strip() for _, earlier in group
            ):  # blank lines above the first belong to it: none is lost
                begins = False
        else:
            begins = rules.document == "line" or (rules.document == "paragraph" and not line.strip())
        if begins and group:
            yield group
            group = []
        if start is None and rules.document == "paragraph" and not line.strip():
            continue
        group.append((number, line))
    if group:
        yield group
