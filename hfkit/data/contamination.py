"""Overlap between training and evaluation text: the passages of 13 words that they share.

Thirteen words is GPT-3's n-gram length (Brown et al. 2020, arXiv:2005.14165, appendix C). Words are compared after
NFKC and lower-casing, whatever punctuation and white space lies between them; see `hfkit/data/words.py`. An evaluation
document of 8 to 12 words is compared as a whole; a shorter one is too common a phrase to prove anything.

Passages are compared by 58-bit hashes: a billion training words against ten million evaluation words give 0.03 false
matches. The hashes lie on disk, in sorted runs; what is held in memory is a Bloom filter of them, of 16 to 64 MB, so
that few passages of the training text are looked for on disk (Bloom 1970, doi:10.1145/362686.362692). Above 30 million
passages of evaluation text more are looked for in vain, and nothing else changes.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hfkit.data.words import Words, hash_windows, hash_words
from hfkit.files import read_json, write_json
from hfkit.settings import BadInput

SHORTEST = 8  # words of the shortest evaluation document that is looked for
RUN = 1 << 18  # hashes that are sorted at once, 2 MB
_LONGEST = 63  # words a passage: the length is kept in the upper 6 bits of its hash
_HASH_BITS = np.uint64(58)
# Logarithms of the filter's size in bits: 16 MB, which suffices for 8 million passages, to 64 MB.
_LEAST_FILTER_BITS, _MOST_FILTER_BITS = 27, 29
_BITS_A_PASSAGE = 16
_PLACES = [np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)]


def write_passages(folder: Path, texts: Iterable[str], words: int = 13) -> None:
    """Write what `Passages` opens: the hashes of every passage of ``words`` words of the evaluation text."""
    if not 1 <= words <= _LONGEST:
        raise BadInput(f"a passage must have between 1 and {_LONGEST} words, not {words}")
    count, lengths = 0, set()
    with (folder / "passages.bin").open("wb") as file:
        for run in _runs(_hash_evaluation(texts, words)):
            run.sort()
            file.write(run.tobytes())
            count += len(run)
            lengths |= set(np.unique(run >> _HASH_BITS).tolist())
    write_json(folder / "passages.json", {"words": words, "count": count, "lengths": sorted(lengths)})


def _hash_evaluation(texts: Iterable[str], words: int) -> Iterator[np.ndarray]:
    for text in texts:
        found = hash_words([text])
        if len(found.hashes) >= min(words, SHORTEST):
            yield _hash_passages(found, min(words, len(found.hashes)))[0]


def _runs(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the same numbers in arrays of `RUN`; only the last one may be shorter."""
    waiting, size = [np.empty(0, np.uint64)], 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= RUN:
            joined = np.concatenate(waiting)
            whole = size - size % RUN
            yield from (joined[start : start + RUN].copy() for start in range(0, whole, RUN))
            waiting, size = [joined[whole:].copy()], size - whole
    yield np.concatenate(waiting)


class Passages:
    """The passages of the evaluation text, as `write_passages` left them in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "passages.bin"
        facts = read_json(folder / "passages.json")
        assert facts is not None, "write_passages came before"
        self.count: int = facts["count"]
        self.lengths: list[int] = facts["lengths"]
        wanted = (_BITS_A_PASSAGE * self.count).bit_length()
        bits = min(max(wanted, _LEAST_FILTER_BITS), _MOST_FILTER_BITS)
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits - 3, np.uint8)
        for run in self._read_runs():
            for places in self._places(run):
                np.bitwise_or.at(self.filter, places >> np.uint64(3), _bit(places))

    def contain(self, hashes: np.ndarray) -> np.ndarray:
        """Return which of the hashes belong to a passage of the evaluation text: (hashes,) bool."""
        known = np.ones(len(hashes), bool)
        for places in self._places(hashes):
            known &= self.filter[places >> np.uint64(3)] & _bit(places) != 0
        likely = np.flatnonzero(known)
        known[likely] = self._look_up(hashes[likely]) if len(likely) else False
        return known

    def _look_up(self, hashes: np.ndarray) -> np.ndarray:
        found = np.zeros(len(hashes), bool)
        for run in self._read_runs():
            found |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        return found

    def _read_runs(self) -> Iterator[np.ndarray]:
        for start in range(0, self.count, RUN):  # mapped one at a time: pages that are not read cost nothing
            size = min(RUN, self.count - start)
            yield np.memmap(self.path, np.uint64, "r", offset=8 * start, shape=(size,))

    def _places(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        return (hashes * odd >> self.shift for odd in _PLACES)


def _bit(places: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))


def find_overlap(text: str, passages: Passages) -> str | None:
    """The first passage of a training text that the evaluation text holds too, in normalised form, or None."""
    return find_overlaps([text], passages)[0]


def find_overlaps(texts: Sequence[str], passages: Passages) -> list[str | None]:
    """`find_overlap` of each text; faster than one by one where texts are short."""
    found = hash_words(texts)
    first: dict[int, tuple[int, int]] = {}  # text → first shared passage: its first word, its length
    for length in passages.lengths:
        hashes, starts = _hash_passages(found, length)
        shared = starts[passages.contain(hashes)]
        numbers, earliest = np.unique(np.searchsorted(found.bounds, shared, side="right") - 1, return_index=True)
        for number, start in zip(numbers.tolist(), shared[earliest].tolist(), strict=True):
            first[number] = min(first.get(number, (start, length)), (start, length))
    overlaps: list[str | None] = [None] * len(texts)
    for number, (start, length) in first.items():
        overlaps[number] = found.normalised[found.first[start] : found.end[start + length - 1]]
    return overlaps


def _hash_passages(found: Words, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`hash_windows` with the length in the upper bits, so that one sorted array serves all lengths."""
    hashes, starts = hash_windows(found, length)
    return (hashes >> np.uint64(6)) | (np.uint64(length) << _HASH_BITS), starts
