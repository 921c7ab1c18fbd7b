"""Which of the cleaned documents stay: not those that repeat an earlier one, nor those that hold evaluation text."""

from functools import partial
from pathlib import Path

import numpy as np

from hfkit.data.account import Account
from hfkit.data.contamination import find_overlaps, passage_hashes
from hfkit.data.dedup import find_exact_duplicates, find_near_duplicates
from hfkit.data.texts import Group, TextWriter, list_groups, read_group, read_table, read_texts, text_sizes
from hfkit.data.workers import map_in_order
from hfkit.progress import Progress
from hfkit.settings import DataConfig


def draft_path(folder: Path, number: int) -> Path:
    """Return the file of a source's cleaned documents, duplicates and all."""
    return folder / f"draft-{number}.parquet"


def write_kept(folder: Path, config: DataConfig, sources: list[str], account: Account) -> None:
    """Find duplicates and overlaps among the drafts, and write what stays as train-<n>.parquet."""
    winnow = Winnow(folder, config, account)
    check = partial(_overlaps, passages=_evaluation_passages(folder, config))
    with Progress(len(winnow.first) or None, "deduplicate", "document") as progress:
        for number, source in enumerate(sources):
            draft = draft_path(folder, number)
            with TextWriter(folder / f"train-{number}.parquet") as writer:
                for group, overlaps in map_in_order(check, list_groups(draft)):
                    winnow.write_group(writer, source, group, overlaps)
                    progress.update(len(overlaps))
            draft.unlink()


class Winnow:
    """Knows the duplicates of all drafts, and takes the row groups one after another."""

    def __init__(self, folder: Path, config: DataConfig, account: Account) -> None:
        self.account = account
        self.first, self.rule = _find_duplicates(folder, config)
        repeats = self.first != np.arange(len(self.first))
        self.heads = set(np.unique(self.first[repeats]).tolist())
        self.index = 0  # of the next document, in all drafts

    def write_group(self, writer: TextWriter, source: str, group: Group, overlaps: list[str | None]) -> None:
        """Write the documents of a group that stay; account for all of them."""
        table = read_table(group)
        stays = np.ones(len(table), dtype=bool)
        for row, (size, overlap) in enumerate(zip(text_sizes(table), overlaps, strict=True)):
            index, self.index = self.index, self.index + 1
            first = int(self.first[index]) if len(self.first) else index
            stays[row] = first == index and overlap is None
            if stays[row]:
                self.account.keep(source, size)
            if stays[row] and index not in self.heads:
                continue
            text, where = table["text"][row].as_py(), table["where"][row].as_py()
            if stays[row]:
                self.account.begin_cluster(index, where, text)
            elif first != index:
                self.account.remove(str(self.rule[index]), source, where, text)
                self.account.add_to_cluster(first, where, text)
            else:
                self.account.remove("contaminated", source, where, text, passage=str(overlap))
        writer.write_table(table.filter(stays))


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
    return passage_hashes(text for path in paths for text in read_texts(path))


def _overlaps(group: Group, passages: np.ndarray | None) -> list[str | None]:
    """Return the passage that each document of a group shares with the evaluation text (in a worker process)."""
    texts = read_group(group)
    return find_overlaps(texts, passages) if passages is not None and len(passages) else [None] * len(texts)
