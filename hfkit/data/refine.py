"""From raw documents to the text that is trained on: hold out, clean, deduplicate, decontaminate, account for it.

Three passes over files, so that memory does not grow with the corpus: read every document, hold out the validation
share and clean the rest (worker processes), keeping a hash and a signature of each in flat files; find duplicates among
those by sorting; write what stays as Parquet. Evaluation text is never changed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hfkit.data.account import EXCERPT, Account
from hfkit.data.contamination import find_overlaps, passage_hashes
from hfkit.data.dedup import exact_hash, find_exact_duplicates, find_near_duplicates, signatures
from hfkit.data.documents import Document
from hfkit.data.holdout import Holdout, build_holdout
from hfkit.data.hooks import Hook, load_hooks
from hfkit.data.sources import Source
from hfkit.data.texts import TextWriter, read_texts
from hfkit.data.workers import map_in_order
from hfkit.progress import Progress
from hfkit.settings import BadInput, DataConfig
from hfkit.text import clean

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
    for name, source in evaluation.items():
        with TextWriter(folder / f"{name}.parquet") as writer:
            for document in source.documents():
                writer.write(document.text, document.where)
    holds_out = bool(sources) and "validation" not in evaluation and config.validation_share > 0
    refiner = Refiner(folder, config, account, build_holdout(config, sources) if holds_out else None)
    for number, source in enumerate(sources):
        refiner.clean_source(number, source)
    refiner.close()
    write_kept(folder, config, sources, account)
    if sources and not any(counts["documents"] for counts in account.sources.values()):
        why = ", ".join(f"{rule} {count}" for rule, count in account.removed.items()) or "none was read"
        raise BadInput(f"no training text is left of {account.read} documents ({why})")
    assert account.read == account.kept + sum(account.removed.values()), "every document is kept or accounted for"
    return account.facts()


@dataclass(frozen=True)
class Cleaned:
    """What a worker found out about a document."""

    text: str | None
    rules: list[str]
    hash: bytes
    signature: bytes


def clean_documents(texts: list[str], config: DataConfig) -> list[Cleaned]:
    """Clean texts, and hash what is left (in a worker process)."""
    hooks = list(zip(config.hooks, load_hooks(config.hooks), strict=True))
    cleaned = [_clean_one(text, config, hooks) for text in texts]
    kept = [text for text, _ in cleaned if text is not None]
    rows = iter(signatures(kept, config.dedup)) if config.dedup.near else None
    return [
        Cleaned(
            text,
            rules,
            exact_hash(text) if text is not None and config.dedup.exact else b"",
            next(rows).tobytes() if text is not None and rows is not None else b"",
        )
        for text, rules in cleaned
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
        with TextWriter(self.folder / f"draft-{number}.parquet") as writer:
            for piece, cleaned in map_in_order(partial(_clean_piece, config=self.config), self._pieces(source)):
                for document, result in zip(piece, cleaned, strict=True):
                    if result.text is None:
                        self.account.remove(result.rules[-1], source.name, document.where, document.text)
                        continue
                    for rule in result.rules:
                        self.account.changed[rule] += 1
                        self.account.sample(rule, document.where, document.text, cleaned=result.text[:EXCERPT])
                    writer.write(result.text, document.where)
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


def _clean_piece(piece: list[Document], config: DataConfig) -> tuple[list[Document], list[Cleaned]]:
    return piece, clean_documents([document.text for document in piece], config)


def write_kept(folder: Path, config: DataConfig, sources: list[Source], account: Account) -> None:
    """The second and third pass: find duplicates and overlaps, write what stays as train-<n>.parquet."""
    cluster, kind = _find_duplicates(folder, config)
    heads = set(np.unique(cluster[cluster != np.arange(len(cluster))]).tolist())
    passages = _evaluation_passages(folder, config)
    index = 0
    with Progress(len(cluster) or None, "deduplicate", "document") as progress:
        for number, source in enumerate(sources):
            draft = folder / f"draft-{number}.parquet"
            with TextWriter(folder / f"train-{number}.parquet") as writer:
                check = partial(_overlaps, passages=passages)
                for piece, overlaps in map_in_order(check, _grouped(read_texts(draft))):
                    for (text, where), overlap in zip(piece, overlaps, strict=True):
                        progress.update(1)
                        if len(cluster) and cluster[index] != index:
                            account.remove(kind[index], source.name, where, text)
                            account.add_to_cluster(int(cluster[index]), where, text)
                        elif overlap is not None:
                            account.remove("contaminated", source.name, where, text, passage=overlap)
                        else:
                            if index in heads:
                                account.begin_cluster(index, where, text)
                            writer.write(text, where)
                            account.keep(source.name, len(text.encode()))
                        index += 1
            draft.unlink()


def _find_duplicates(folder: Path, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return, per cleaned document, the first of its cluster, and the rule by which it is a duplicate."""
    hashes, signatures = folder / "hashes.bin", folder / "signatures.bin"
    exact = near = np.empty(0, dtype=np.int64)
    if hashes.stat().st_size:
        exact = find_exact_duplicates(np.fromfile(hashes, dtype=np.uint8).reshape(-1, 16))
    if signatures.stat().st_size:
        shape = (-1, config.dedup.permutations)
        near = find_near_duplicates(np.memmap(signatures, dtype=np.uint32, mode="r").reshape(shape), config.dedup)
    hashes.unlink()
    signatures.unlink()
    first = exact if len(exact) else np.arange(len(near))
    cluster = np.where(first != np.arange(len(first)), first, near) if len(near) else first
    kind = np.where(first != np.arange(len(first)), "exact_duplicates", "near_duplicates")
    return cluster, kind


def _evaluation_passages(folder: Path, config: DataConfig) -> np.ndarray | None:
    """Return the hashes of every passage of the evaluation text, or None where nothing is to be compared."""
    if not config.decontaminate or config.split_by == "characters":  # the two ends of one text share their phrases
        return None
    paths = [path for name in ("validation", "test") if (path := folder / f"{name}.parquet").exists()]
    return passage_hashes(text for path in paths for text, _ in read_texts(path))


def _grouped(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    group: list[tuple[str, str]] = []
    size = 0
    for text, where in texts:
        group.append((text, where))
        size += len(text)
        if size >= PIECE:
            yield group
            group, size = [], 0
    yield group


def _overlaps(
    piece: list[tuple[str, str]], passages: np.ndarray | None
) -> tuple[list[tuple[str, str]], list[str | None]]:
    if passages is None or not len(passages):
        return piece, [None] * len(piece)
    return piece, find_overlaps([text for text, _ in piece], passages)
