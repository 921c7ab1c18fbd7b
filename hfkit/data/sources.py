"""Where text and rows come from: files, datasets, mixtures of both, or the built-in corpus.

A `Source` says what it is called, which weight it has, what its content is (`fingerprint`) and how to read it: as one
stream of documents, or as parts that worker processes read separately; one part after another is the same stream.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from hfkit.data.catalog import Name, identify_named, load_named, name_of, named_rows
from hfkit.data.corpus import builtin_documents, identify_builtin
from hfkit.data.documents import Document, Rules, read_documents
from hfkit.data.listing import content_digests, list_files
from hfkit.data.readers import ROW_FORMATS, OnBad, Row, read_rows, report, split_name, text_of
from hfkit.files import digest_of
from hfkit.settings import BadInput, DataConfig, Files, RowsConfig

PART_ROWS = 10_000  # rows of a downloaded dataset in one part


@dataclass(frozen=True)
class Part:
    """A piece of a source that another process can read: picklable, and nothing is opened before it is read."""

    read: Callable[..., Iterator[Document]]
    arguments: tuple[Any, ...] = ()

    def documents(self, on_bad: OnBad = None) -> Iterator[Document]:
        """Yield the documents in their order; `on_bad` is told of those that cannot be read, as for `read_rows`."""
        return self.read(*self.arguments, on_bad)


@dataclass(frozen=True)
class Source:
    """Text from one origin."""

    name: str
    """What reports call it."""
    weight: float
    """Share of the training sequences, relative to the other sources."""
    parts: Callable[[], list[Part]]
    """Returns the parts, which do not know the limit."""
    identify: Callable[[Path | None], Any]
    """Returns JSON that changes whenever a document does."""
    limit: int | None = None
    """Documents to read at most."""

    def documents(self, on_bad: OnBad = None) -> Iterator[Document]:
        """Yield the documents, up to the limit, always in the same order."""
        return islice(chain.from_iterable(part.documents(on_bad) for part in self.parts()), self.limit)

    def separate_parts(self) -> "list[Part | Source]":
        """Return what can be read in any order; a limit counts from the first document, so that is one part."""
        return [*self.parts()] if self.limit is None else [self]

    def fingerprint(self, memory: Path | None = None) -> str:
        """Return a hash of all that decides which documents come: contents, how they are cut, and the limit.

        Args:
            memory: Where `content_digests` remembers the files' digests.
        """
        return digest_of([self.identify(memory), self.limit])


def resolve_sources(config: DataConfig) -> list[Source]:
    """Return the sources of the training text that the settings name; the built-in corpus where they name none.

    Raises:
        BadInput: for files that are not there or not readable as text, and for two sources of one name.
    """
    rules = Rules(config.text_column, config.document, config.document_start)
    limit = config.max_documents
    if config.train_files is not None:
        return [_file_source("train_files", config.train_files, "data.train_files", rules, limit)]
    if config.dataset is not None:
        return [_named_source(name_of(config, config.split, config.streaming), rules, limit)]
    if not config.sources:
        return [Source("builtin", 1.0, _builtin_parts, lambda memory: identify_builtin(), limit)]
    return _mixture(config, rules)


def _mixture(config: DataConfig, rules: Rules) -> list[Source]:
    """Return the sources that `data.sources` lists."""
    sources: dict[str, Source] = {}
    for item in config.sources:
        own_rules = Rules(item.text_column or rules.text_column, rules.document, rules.document_start)
        if item.dataset is not None:
            name = name_of(item, item.split, config.streaming)
            label = item.name or str(name)
            source = _named_source(name, own_rules, config.max_documents, label, item.weight)
        else:
            label = item.name or (item.path if isinstance(item.path, str) else " ".join(item.path or []))
            source = _file_source(label, item.path, "data.sources: path", own_rules, config.max_documents, item.weight)
        if label in sources:
            raise BadInput(f"data.sources: two sources are called {label}; give each a name")
        sources[label] = source
    return list(sources.values())


def resolve_evaluation(config: DataConfig, which: Literal["validation", "test"]) -> Source | None:
    """Return the source of the validation or test text: its files, else the dataset's split, else None."""
    rules = Rules(config.text_column, config.document, config.document_start)
    files, split = _evaluation_settings(config, which)
    if files is not None:
        return _file_source(which, files, f"data.{which}_files", rules)
    if config.dataset is not None and split is not None:
        return _named_source(name_of(config, split, config.streaming), rules, label=which)
    return None


def read_table(
    config: RowsConfig, which: Literal["train", "validation", "test"], on_bad: OnBad = None
) -> Iterator[Row] | None:
    """Return the rows that the settings name for a split, or None where they name none.

    Files come before a dataset; `max_documents` limits the training rows. Files must hold rows: a .txt is refused.

    Raises:
        BadInput: for what cannot be found (at once) or read (while the rows are taken).
    """
    files, split = (config.train_files, config.split) if which == "train" else _evaluation_settings(config, which)
    if files is not None:
        paths = list_files(files, f"data.{which}_files", ROW_FORMATS)
        rows: Iterator[Row] = chain.from_iterable(read_rows(path, on_bad) for path in paths)
    elif config.dataset is not None and split is not None:
        name = name_of(config, split)
        rows = named_rows(load_named(name), name)
    else:
        return None
    return islice(rows, config.max_documents if which == "train" else None)


def _evaluation_settings(config: RowsConfig, which: Literal["validation", "test"]) -> tuple[Files, str | None]:
    if which == "validation":
        return config.validation_files, config.validation_split
    return config.test_files, config.test_split


def _file_source(
    name: str, files: Files, what: str, rules: Rules, limit: int | None = None, weight: float = 1.0
) -> Source:
    paths = list_files(files, what)
    how = [rules.text_column, rules.document, rules.document_start]

    def identify(memory: Path | None) -> Any:
        return [how, [split_name(path) for path in paths], content_digests(paths, memory)]

    return Source(name, weight, lambda: [Part(read_documents, (path, rules)) for path in paths], identify, limit)


def _named_source(
    name: Name, rules: Rules, limit: int | None = None, label: str | None = None, weight: float = 1.0
) -> Source:
    def identify(memory: Path | None) -> Any:
        return [rules.text_column, identify_named(name, memory)]

    return Source(label or str(name), weight, partial(_named_parts, name, rules.text_column), identify, limit)


def _named_parts(name: Name, column: str) -> list[Part]:
    """Return a stream as one part, a downloaded dataset in ranges of rows, which pickle as paths and not as rows."""
    dataset = load_named(name)
    if name.streaming or not hasattr(dataset, "select"):
        return [Part(_named_documents, (dataset, name, 0, column))]
    starts = range(0, len(dataset), PART_ROWS)
    ranges = [(start, range(start, min(start + PART_ROWS, len(dataset)))) for start in starts]
    return [Part(_named_documents, (dataset.select(rows), name, start, column)) for start, rows in ranges]


def _named_documents(dataset: Any, name: Name, first: int, column: str, on_bad: OnBad = None) -> Iterator[Document]:
    for row in named_rows(dataset, name, first):
        try:
            yield Document(text_of(row, column), row.where)
        except BadInput as problem:
            report(str(problem), on_bad)


def _builtin_parts() -> list[Part]:
    return [Part(_read_builtin)]


def _read_builtin(on_bad: OnBad = None) -> Iterator[Document]:
    return builtin_documents()
