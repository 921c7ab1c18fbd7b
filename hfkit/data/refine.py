"""From raw documents to the text that is trained on: hold out, clean, deduplicate, decontaminate, account for it.

Three steps over files, so that memory does not grow with the corpus: `write_draft` reads every document, holds out the
validation share and cleans the rest (worker processes), keeping a hash and a signature of each in flat files; `compare`
finds duplicates among those by sorting; `write_kept` writes what stays as Parquet. Evaluation text is never changed.
`refine` takes the steps one after another, a source at a time; `hfkit/data/spread.py` takes them on many machines.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.data.account import Account
from hfkit.data.dedup import exact_hash, signatures
from hfkit.data.documents import Document
from hfkit.data.drafts import OVERLAPS, Draft
from hfkit.data.holdout import Holdout, build_holdout, choose_split, holds_out
from hfkit.data.hooks import Hook, call_hook, load_hooks
from hfkit.data.sources import Part, Source
from hfkit.data.texts import TextWriter, join_texts
from hfkit.data.winnow import compare, open_passages, write_kept
from hfkit.data.words import prepare_tables
from hfkit.data.workers import map_in_order
from hfkit.progress import Progress
from hfkit.settings import BadInput, DataConfig
from hfkit.text import clean

MANY = 0.1  # share of a source's documents that hold evaluation text, above which the audit remarks on it
PIECE = 1 << 20  # characters handed to a worker at once


def refine(folder: Path, config: DataConfig, sources: list[Source], evaluation: dict[str, Source]) -> dict[str, Any]:
    """Write train-<n>.parquet, validation.parquet, test.parquet and overlaps.parquet into a folder; return the account.

    Args:
        sources: Training sources in their order.
        evaluation: ``validation`` and ``test`` where they are given; validation is held out from the sources otherwise.

    Raises:
        BadInput: if a document cannot be read, or no training text is left.
    """
    scratch = folder / "scratch"
    scratch.mkdir()
    prepare_tables()
    write_evaluation(folder, evaluation)
    config = choose_split(config, sources, evaluation)
    holdout = choose_holdout(config, sources, evaluation)
    drafts = [Draft(scratch, number, number, source.name) for number, source in enumerate(sources)]
    accounts = [Account(sources={source.name: Counter()}) for source in sources]
    for draft, source, account in zip(drafts, sources, accounts, strict=True):
        write_draft(draft, source, config, holdout, account)
    compare(scratch, drafts, config, join_validation(folder, drafts))
    passages = open_passages(scratch, config)
    for draft, first, account in zip(drafts, first_numbers(drafts), accounts, strict=True):
        write_kept(draft, first, passages, account)
    join_kept(folder, drafts)
    shutil.rmtree(scratch)
    return conclude(accounts)


def write_evaluation(folder: Path, evaluation: dict[str, Source]) -> None:
    """Write the evaluation text that is given, as it is."""
    for name, source in evaluation.items():
        with TextWriter(folder / f"{name}.parquet") as writer:
            for document in source.documents():
                writer.write(document.text, document.where)


def choose_holdout(config: DataConfig, sources: list[Source], evaluation: dict[str, Source]) -> Holdout | None:
    """Return the rule that holds out validation text, or None where it is given or not wanted."""
    return build_holdout(config, sources) if holds_out(config, sources, evaluation) else None


def join_validation(folder: Path, drafts: Sequence[Draft]) -> list[Path]:
    """Write validation.parquet where text was held out; return all files of evaluation text."""
    held_out = [draft.validation for draft in drafts if draft.validation.exists()]
    if held_out:
        join_texts(held_out, folder / "validation.parquet")
    return [path for name in ("validation", "test") if (path := folder / f"{name}.parquet").exists()]


def first_numbers(drafts: Sequence[Draft]) -> list[int]:
    """Return the number of each draft's first document among the cleaned ones of all drafts."""
    return list(accumulate((draft.count() for draft in drafts), initial=0))[:-1]


def join_kept(folder: Path, drafts: Sequence[Draft]) -> None:
    """Write train-<n>.parquet for each source, and overlaps.parquet."""
    for number in sorted({draft.source for draft in drafts}):
        join_texts([draft.kept for draft in drafts if draft.source == number], folder / f"train-{number}.parquet")
    if drafts:
        join_texts([draft.overlaps for draft in drafts], folder / "overlaps.parquet", OVERLAPS)


def conclude(accounts: Sequence[Account]) -> dict[str, Any]:
    """Add the drafts' accounts up; say what is notable.

    Raises:
        BadInput: if no training text is left.
    """
    account = Account()
    for part in accounts:
        account.add(part)
    account.remark_on_overlap(MANY)
    if accounts and not any(counts["documents"] for counts in account.sources.values()):
        held_out = "all are held out for validation" if account.read else "none was read"
        why = ", ".join(f"{rule} {count}" for rule, count in account.removed.items()) or held_out
        raise BadInput("; ".join([f"no training text is left of {account.read} documents ({why})", *account.notes]))
    assert account.read == account.kept + sum(account.removed.values()), "every document is kept or accounted for"
    for note in account.notes:
        print(f"note: {note}", file=sys.stderr)
    return account.facts()


class Cleaned(NamedTuple):
    """What a worker found out about a document."""

    dropped: bool
    rules: list[str]
    """Those that acted; the last one is the reason where the document is dropped."""
    changed: str | None
    """The text where it is another than before, so that only those travel back."""
    hash: bytes
    signature: bytes


def clean_documents(documents: Sequence[Document], config: DataConfig) -> list[Cleaned]:
    """Clean documents, and hash what is left (in a worker process)."""
    hooks = list(zip(config.hooks, load_hooks(config.hooks), strict=True))
    cleaned = [_clean_one(document, config, hooks) for document in documents]
    kept = [text for text, _ in cleaned if text is not None]
    rows = iter(signatures(kept, config.dedup) if config.dedup.near else [])
    return [
        Cleaned(
            text is None,
            rules,
            text if text != document.text else None,
            exact_hash(text) if text is not None and config.dedup.exact else b"",
            next(rows).tobytes() if text is not None and config.dedup.near else b"",
        )
        for document, (text, rules) in zip(documents, cleaned, strict=True)
    ]


def _clean_one(document: Document, config: DataConfig, hooks: list[tuple[str, Hook]]) -> tuple[str | None, list[str]]:
    text, rules = clean(document.text, config.clean)
    for name, hook in hooks:
        if text is not None and (changed := call_hook(name, hook, text, document.where)) != text:
            text, rules = changed, [*rules, name]
    if not text:
        return None, rules or ["empty"]
    try:
        text.encode()
    except UnicodeEncodeError:  # only with cleaning off; neither Parquet nor a tokenizer takes a lone surrogate
        return None, [*rules, "not_unicode"]
    return text, rules


def write_draft(
    draft: Draft,
    source: Source | Part,
    config: DataConfig,
    holdout: Holdout | None,
    account: Account,
    workers: int | None = None,
) -> None:
    """Read, hold out and clean one part of the training text; keep a hash and a signature per cleaned document.

    Args:
        account: Gets what became of each document.
        workers: Processes; None suits the machine.
    """
    reader = Reader(draft, config, holdout, account)
    work = map_in_order(partial(clean_documents, config=config), reader.read_pieces(source), workers)
    with (
        reader,
        TextWriter(draft.text, passing=True) as cleaned,
        draft.hashes.open("wb") as hashes,
        draft.signatures.open("wb") as signed,
    ):
        for piece, results in work:
            for document, result in zip(piece, results, strict=True):
                if result.dropped:
                    account.remove(result.rules[-1], draft.name, document.where, document.text)
                    continue
                text = document.text if result.changed is None else result.changed
                if result.rules:
                    account.change(result.rules, document.where, document.text, text)
                cleaned.write(text, document.where)
                hashes.write(result.hash)
                signed.write(result.signature)


class Reader:
    """Reads a part of the training text in pieces; held-out documents go to the validation file as they are."""

    def __init__(self, draft: Draft, config: DataConfig, holdout: Holdout | None, account: Account) -> None:
        self.draft, self.config, self.holdout, self.account = draft, config, holdout, account
        self.validation = TextWriter(draft.validation) if holdout else None
        self.progress = Progress(None, f"clean {draft.name}", "document")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.progress.close()
        if self.validation and kind is None:
            self.validation.close()

    def read_pieces(self, source: Source | Part) -> Iterator[list[Document]]:
        """Yield training documents in pieces of a megabyte."""
        piece: list[Document] = []
        size = 0
        for document in source.documents(self._skip if self.config.on_error == "skip" else None):
            self.account.read += 1
            self.progress.update(1)
            parts = list(self.holdout(document)) if self.holdout else [(document.text, False)]
            for text, held in parts:
                if held and self.validation:
                    self.validation.write(text, document.where)
                    self.account.hold_out(self.draft.name, text, whole=len(parts) == 1)
                else:
                    piece.append(Document(text, document.where))
                    size += len(text)
            if size >= PIECE:
                yield piece
                piece, size = [], 0
        yield piece

    def _skip(self, problem: str) -> None:
        self.account.skip(self.draft.name, problem)
