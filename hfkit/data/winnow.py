"""Which of the cleaned documents stay: not those that repeat an earlier one, nor those that hold evaluation text.

What repeats a document is dropped as its duplicate even where that document is dropped for evaluation text, so that of
such a cluster nothing stays: what is near to evaluation text is not wanted either.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hfkit.data.account import EXCERPT, Account
from hfkit.data.contamination import Passages, find_overlaps, write_passages
from hfkit.data.drafts import OVERLAPS, Draft, Duplicates, find_duplicates
from hfkit.data.texts import Group, TextWriter, list_groups, read_group, read_table, read_texts, text_sizes
from hfkit.data.workers import map_in_order
from hfkit.progress import Progress
from hfkit.settings import DataConfig


def compare(scratch: Path, drafts: Sequence[Draft], config: DataConfig, evaluation: Sequence[Path]) -> None:
    """Find the duplicates among all drafts, and gather the passages of the evaluation text.

    Args:
        evaluation: Files of the validation and test text.
    """
    find_duplicates(scratch, drafts, config.dedup)
    if compares_passages(config):
        write_passages(scratch, (text for path in evaluation for text in read_texts(path)))


def compares_passages(config: DataConfig) -> bool:
    """Return whether training text may not hold evaluation text; the two ends of one text share their phrases."""
    return config.decontaminate and config.split_by == "document"


def open_passages(scratch: Path, config: DataConfig) -> Passages | None:
    """Return the passages that `compare` gathered, where there are any to look for."""
    passages = Passages(scratch) if compares_passages(config) else None
    return passages if passages and passages.count else None


def write_kept(
    draft: Draft, first: int, passages: Passages | None, account: Account, workers: int | None = None
) -> None:
    """Write the documents of a draft that stay, and the list of those that do not.

    Args:
        first: The number of the draft's first document among those of all drafts.
        passages: What `open_passages` gave, once for many drafts.
        account: Gets what became of each.
    """
    check = partial(_overlaps, passages=passages)
    with (
        TextWriter(draft.kept) as kept,
        TextWriter(draft.overlaps, schema=OVERLAPS) as overlapping,
        Progress(draft.count(), f"winnow {draft.name}", "document") as progress,
    ):
        winnow = Winnow(draft, first, account, kept, overlapping)
        for group, overlaps in map_in_order(check, list_groups(draft.text), workers):
            winnow.take(group, overlaps)
            progress.update(len(overlaps))


class Winnow:
    """Takes the row groups of a draft one after another."""

    def __init__(self, draft: Draft, first: int, account: Account, kept: TextWriter, overlapping: TextWriter) -> None:
        self.source, self.account, self.kept, self.overlapping = draft.name, account, kept, overlapping
        self.duplicates = Duplicates(draft.folder)
        self.index = first  # of the next document, among those of all drafts

    def take(self, group: Group, overlaps: list[str | None]) -> None:
        """Write the documents of a group that stay; account for all of them."""
        table = read_table(group)
        begin, self.index = self.index, self.index + len(table)
        known = zip(*self.duplicates.look_up(begin, self.index), text_sizes(table), overlaps, strict=True)
        stays = np.ones(len(table), dtype=bool)
        for row, (first, copies, heads, size, overlap) in enumerate(known):
            stays[row] = first == begin + row and overlap is None
            if stays[row]:
                self.account.keep(self.source, size)
            if heads or not stays[row]:
                text, where = table["text"][row].as_py(), table["where"][row].as_py()
                if first != begin + row:
                    self._repeat("exact_duplicates" if copies else "near_duplicates", first, where, text)
                elif overlap is not None:
                    self.account.remove("contaminated", self.source, where, text, passage=overlap)
                    self.account.share_passage(self.source, overlap)
                    self.overlapping.write(overlap, where, "contaminated", self.source, first if heads else -1)
                else:
                    self._begin(first, where, text)
        self.kept.write_table(table.filter(stays))

    def _begin(self, first: int, where: str, text: str) -> None:
        """List a document that stays before its duplicates."""
        self.overlapping.write(text[:EXCERPT], where, "kept_first", self.source, first)
        if first in self.duplicates.listed:
            self.account.begin_cluster(first, where, text)

    def _repeat(self, rule: str, first: int, where: str, text: str) -> None:
        """List a duplicate."""
        self.account.remove(rule, self.source, where, text)
        self.overlapping.write(text[:EXCERPT], where, rule, self.source, first)
        if first in self.duplicates.listed:
            self.account.add_to_cluster(first, where, text)


def _overlaps(group: Group, passages: Passages | None) -> list[str | None]:
    """Return the passage that each document of a group shares with the evaluation text (in a worker process)."""
    if passages is None:
        return [None] * read_table(group).num_rows
    return find_overlaps(read_group(group), passages)
