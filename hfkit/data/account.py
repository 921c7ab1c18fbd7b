"""What happened to the documents of a corpus: the text part of ``audit.json``."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfkit.files import read_json, write_json

SAMPLES = 5  # documents shown in the audit per rule
EXCERPT = 400  # characters of each
PASSAGES = 10_000  # of the evaluation text that are counted; the most frequent ones are shown
CLUSTERS = 50  # duplicate clusters shown; all of them are in overlaps.parquet


@dataclass
class Account:
    """Counts and samples, per rule and per source."""

    read: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    clusters: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Of the first document → what is shown of it (where it stays), of its duplicates, and how many there are."""
    passages: dict[str, Counter[str]] = field(default_factory=dict)
    """Source → passage of the evaluation text → documents that were dropped for it."""
    lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def remove(self, rule: str, source: str, where: str, text: str, **more: str) -> None:
        """Count a document that ``rule`` dropped, and keep it as a sample if there are few."""
        self.removed[rule] += 1
        self.sources[source].update({f"removed {rule}": 1, f"bytes {rule}": _size(text)})
        self.sample(rule, where, text, **more)

    def skip(self, source: str, problem: str) -> None:
        """Count a document that could not be read; the problem says where it is."""
        self.read += 1
        self.remove("unreadable", source, problem, "")

    def share_passage(self, source: str, passage: str) -> None:
        """Count a passage of evaluation text that a document holds, if it is one of the source's first ones."""
        passages, passage = self.passages.setdefault(source, Counter()), " ".join(passage.split())
        if passage in passages or len(passages) < PASSAGES:
            passages[passage] += 1

    def change(self, rules: list[str], where: str, before: str, after: str) -> None:
        """Count a document that rules changed, and keep the place where it begins to differ as a sample."""
        self.changed.update(rules)
        if any(len(self.samples.get(rule, [])) < SAMPLES for rule in rules):
            start = max(0, first_difference(before, after) - EXCERPT // 4)
            for rule in rules:
                self.sample(rule, where, before[start:], cleaned=after[start : start + EXCERPT])

    def sample(self, rule: str, where: str, text: str, **more: str) -> None:
        """Keep an excerpt for the audit page."""
        kept = self.samples.setdefault(rule, [])
        if len(kept) < SAMPLES:
            kept.append({"where": Path(where).name, "text": text[:EXCERPT], **more})

    def keep(self, source: str, size: int) -> None:
        """Count a document that stays, of ``size`` bytes."""
        self.kept += 1
        self.sources[source].update(documents=1, bytes=size)
        self.lengths[size.bit_length()] += 1

    def hold_out(self, source: str, text: str, whole: bool) -> None:
        """Count text that went to the validation side; the front of a document that was cut counts as kept itself."""
        self.kept += whole
        self.sources[source].update(validation_documents=1, validation_bytes=_size(text))

    def begin_cluster(self, first: int, where: str, text: str) -> None:
        """Show a document that stays while later ones are dropped as its duplicates."""
        self._cluster(first)["kept"] = _excerpt(where, text)

    def add_to_cluster(self, first: int, where: str, text: str) -> None:
        """Show a duplicate beside the document that stays, if there are few."""
        cluster = self._cluster(first)
        cluster["size"] += 1
        if len(cluster["removed"]) < SAMPLES:
            cluster["removed"].append(_excerpt(where, text))

    def _cluster(self, first: int) -> dict[str, Any]:
        return self.clusters.setdefault(first, {"kept": None, "removed": [], "size": 0})

    def add(self, later: "Account") -> None:
        """Add what happened to the documents after these."""
        self.read += later.read
        self.kept += later.kept
        self.removed.update(later.removed)
        self.changed.update(later.changed)
        self.lengths.update(later.lengths)
        for rule, samples in later.samples.items():
            self.samples[rule] = [*self.samples.get(rule, []), *samples][:SAMPLES]
        for first, cluster in later.clusters.items():
            joined = self._cluster(first)
            joined["kept"] = joined["kept"] or cluster["kept"]
            joined["removed"] = [*joined["removed"], *cluster["removed"]][:SAMPLES]
            joined["size"] += cluster["size"]
        for mine, its in ((self.sources, later.sources), (self.passages, later.passages)):
            for name, counts in its.items():
                mine.setdefault(name, Counter()).update(counts)

    def save(self, path: Path) -> None:
        """Write the account, for another process."""
        write_json(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Account":
        """Read what `save` wrote."""
        saved = read_json(path)
        assert saved is not None, "the process that began this account saved it"
        by_number = {name: {int(key): value for key, value in saved[name].items()} for name in ("clusters", "lengths")}
        by_number["lengths"] = Counter(by_number["lengths"])
        counters = {name: Counter(saved[name]) for name in ("removed", "changed")}
        by_source = {
            kind: {name: Counter(counts) for name, counts in saved[kind].items()} for kind in ("sources", "passages")
        }
        return cls(**{**saved, **counters, **by_number, **by_source})

    def _shared_passages(self) -> list[list[Any]]:
        """Return of each source the passages that most documents were dropped for."""
        return [
            [name, passage, documents]
            for name, passages in self.passages.items()
            for passage, documents in passages.most_common(SAMPLES)
        ]

    def remark_on_overlap(self, share: float) -> None:
        """Note which sources lost more than a share of their documents for passages of the evaluation text."""
        for name, passages in self.passages.items():
            row = _row(self.sources[name])
            read = row["documents"] + row["validation_documents"] + row["removed"]
            lost = row["removed_by_rule"]["contaminated"]["documents"]
            if lost > share * read:
                passage, documents = passages.most_common(1)[0]
                self.notes.append(
                    f"{name}: {lost} of {read} documents hold a passage of the validation or test text and were "
                    f"dropped, {documents} of them for “{passage}”: where that is a frame that all documents share, "
                    "set --data.decontaminate false"
                )

    def facts(self) -> dict[str, Any]:
        """Return the account as JSON."""
        histogram = [[f"< {1 << bits:,} bytes", n] for bits, n in sorted(self.lengths.items())]
        return {
            "documents": {"read": self.read, "kept": self.kept},
            "removed": {"exact_duplicates": 0, "near_duplicates": 0, "contaminated": 0, **self.removed},
            "changed": dict(self.changed),
            "bytes": sum(counts["bytes"] + counts["validation_bytes"] for counts in self.sources.values()),
            "sources": [{"name": name, **_row(counts)} for name, counts in self.sources.items()],
            "samples": self.samples,
            "duplicates": [self.clusters[first] for first in sorted(self.clusters) if self.clusters[first]["kept"]],
            "passages": self._shared_passages(),
            "lengths": histogram,
            "notes": self.notes,
        }


def first_difference(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common.

    Example:
        >>> first_difference("cafÃ© au lait", "café au lait")
        3
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _excerpt(where: str, text: str) -> str:
    return f"{Path(where).name}: {text[:EXCERPT]}"


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _row(counts: Counter[str]) -> dict[str, Any]:
    """The counts of one source under the same names for all, and what each rule removed of it."""
    names = ("documents", "bytes", "validation_documents", "validation_bytes")
    rules = [name.partition(" ")[2] for name in counts if name.startswith("removed ")]
    by_rule = {rule: {"documents": counts[f"removed {rule}"], "bytes": counts[f"bytes {rule}"]} for rule in rules}
    removed = sum(part["documents"] for part in by_rule.values())
    return {**{name: counts[name] for name in names}, "removed": removed, "removed_by_rule": by_rule}
