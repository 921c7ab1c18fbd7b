"""From raw documents to the text that is trained on: hold out, clean, deduplicate, decontaminate, account for it.

Three passes over files, so that memory does not grow with the corpus: read every document, hold out the validation
share and clean the rest (worker processes), keeping a hash and a signature of each in flat files; find duplicates among
those by sorting; write what stays as Parquet. Evaluation text is never changed.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.data.account import Account
from hfkit.data.dedup import exact_hash, signatures
from hfkit.data.documents import Document
from hfkit.data.holdout import Holdout, build_holdout
from hfkit.data.hooks import Hook, load_hooks
from hfkit.data.sources import Source
from hfkit.data.texts import TextWriter
from hfkit.data.winnow import draft_path, write_kept
from hfkit.data.words import prepare_tables
from hfkit.data.workers import map_in_order
from hfkit.progress import Progress
from hfkit.settings import BadInput, DataConfig
from hfkit.text import clean

MANY = 0.1  # share of contaminated documents from which the audit remarks on it
PIECE = 1 << 20  # characters handed to a worker at once


def refine(folder: Path, config: DataConfig, sources: list[Source], evaluation: dict[str, Source]) -> dict[str, Any]:
    """Fill ``folder`` with train-<n>.parquet, validation.parquet and test.parquet; return the account.

    Args:
        sources: Training sources in their order.
        evaluation: ``validation`` and ``test`` where they are given; validation is held out from the sources otherwise.

    Raises:
        BadInput: if a document cannot be read, or no training text is left.
    """
    account = Account(sources={source.name: Counter() for source in sources})
    prepare_tables()
    for name, source in evaluation.items():
        with TextWriter(folder / f"{name}.parquet") as writer:
            for document in source.documents():
                writer.write(document.text, document.where)
    holds_out = bool(sources) and "validation" not in evaluation and config.validation_share > 0
    refiner = Refiner(folder, config, account, build_holdout(config, sources) if holds_out else None)
    for number, source in enumerate(sources):
        refiner.clean_source(number, source)
    refiner.close()
    write_kept(folder, config, [source.name for source in sources], account)
    if sources and not any(counts["documents"] for counts in account.sources.values()):
        why = ", ".join(f"{rule} {count}" for rule, count in account.removed.items()) or "none was read"
        raise BadInput(f"no training text is left of {account.read} documents ({why})")
    if (overlapping := account.removed["contaminated"]) > MANY * account.read:
        account.notes.append(
            f"{overlapping} of {account.read} documents hold a passage of the validation or test text and were "
            "dropped: look at the passages, and set --data.decontaminate false if they are a frame that all share"
        )
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
    cleaned = [_clean_one(document.text, config, hooks) for document in documents]
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


def _clean_one(raw: str, config: DataConfig, hooks: list[tuple[str, Hook]]) -> tuple[str | None, list[str]]:
    text, rules = clean(raw, config.clean)
    for name, hook in hooks:
        if text is not None and (changed := hook(text)) != text:
            text, rules = changed, [*rules, name]
    if not text:
        return None, rules or ["empty"]
    try:
        text.encode()
    except UnicodeEncodeError:  # only with cleaning off; neither Parquet nor a tokenizer takes a lone surrogate
        return None, [*rules, "not_unicode"]
    return text, rules


class Refiner:
    """The first pass: reads, holds out and cleans, and keeps one row of hashes and signatures per cleaned document."""

    def __init__(self, folder: Path, config: DataConfig, account: Account, holdout: Holdout | None) -> None:
        self.folder, self.config, self.account, self.holdout = folder, config, account, holdout
        self.validation = TextWriter(folder / "validation.parquet") if holdout else None
        self.hashes = (folder / "hashes.bin").open("wb")
        self.signatures = (folder / "signatures.bin").open("wb")
        self.progress = Progress(None, "clean", "document")

    def close(self) -> None:
        """Finish the files."""
        if self.validation:
            self.validation.close()
        self.hashes.close()
        self.signatures.close()
        self.progress.close()

    def clean_source(self, number: int, source: Source) -> None:
        """Write draft-<number>.parquet: the source's cleaned training documents, duplicates and all."""
        work = map_in_order(partial(clean_documents, config=self.config), self._pieces(source))
        with TextWriter(draft_path(self.folder, number), passing=True) as writer:
            for piece, results in work:
                for document, result in zip(piece, results, strict=True):
                    if result.dropped:
                        self.account.remove(result.rules[-1], source.name, document.where, document.text)
                        continue
                    text = document.text if result.changed is None else result.changed
                    if result.rules:
                        self.account.change(result.rules, document.where, document.text, text)
                    writer.write(text, document.where)
                    self.hashes.write(result.hash)
                    self.signatures.write(result.signature)

    def _pieces(self, source: Source) -> Iterator[list[Document]]:
        """Yield training documents in pieces of a megabyte; held-out ones go to the validation file as they are."""
        piece: list[Document] = []
        size = 0
        for document in source.documents(self._skip if self.config.on_error == "skip" else None):
            self.account.read += 1
            self.progress.update(1)
            parts = list(self.holdout(document)) if self.holdout else [(document.text, False)]
            for text, held in parts:
                if held and self.validation:
                    self.validation.write(text, document.where)
                    self.account.hold_out(source.name, text, whole=len(parts) == 1)
                else:
                    piece.append(Document(text, document.where))
                    size += len(text)
            if size >= PIECE:
                yield piece
                piece, size = [], 0
        yield piece

    def _skip(self, problem: str) -> None:
        self.account.removed["unreadable"] += 1
        self.account.read += 1
        self.account.sample("unreadable", problem, "")
