"""Overlap between training and evaluation text: the passages of 13 words that they share.

Thirteen words is GPT-3's n-gram length (Brown et al. 2020, arXiv:2005.14165, appendix C). Words are compared after
NFKC and lower-casing, whatever punctuation and white space lies between them; see `hfkit/data/words.py`. An evaluation
document of 8 to 12 words is compared as a whole; a shorter one is too common a phrase to prove anything.

Passages are compared by 58-bit hashes: a billion training words against ten million evaluation words give 0.03 false
matches.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from hfkit.data.words import Words, hash_windows, hash_words
from hfkit.settings import BadInput

SHORTEST = 8  # words of the shortest evaluation document that is looked for
_LONGEST = 63  # words a passage: the length is kept in the upper 6 bits of its hash
_HASH_BITS = np.uint64(58)


def passage_hashes(texts: Iterable[str], words: int = 13) -> np.ndarray:
    """Hash every passage of ``words`` words of the evaluation text: sorted, without repeats, (passages,) uint64."""
    if not 1 <= words <= _LONGEST:
        raise BadInput(f"a passage must have between 1 and {_LONGEST} words, not {words}")
    parts = [np.empty(0, np.uint64)]
    for text in texts:
        found = hash_words([text])
        if len(found.hashes) >= min(words, SHORTEST):
            parts.append(_hash_passages(found, min(words, len(found.hashes)))[0])
    hashes = np.concatenate(parts)
    parts.clear()
    hashes.sort()  # in place, and faster than np.unique, which builds a table of several times the size
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]


def find_overlap(text: str, hashes: np.ndarray, words: int = 13) -> str | None:
    """The first passage of the training text that the evaluation text holds too, in normalised form, or None.

    Args:
        text: A training document.
        hashes: What `passage_hashes` gave for the evaluation text and the same ``words``.
        words: Words a passage.

    Example:
        >>> held_out = passage_hashes(["It was the best of times, it was the worst of times"], words=6)
        >>> find_overlap("Dickens wrote: The BEST of times; IT WAS grand.", hashes=held_out, words=6)
        'the best of times; it was'
    """
    return find_overlaps([text], hashes, words)[0]


def find_overlaps(texts: Sequence[str], hashes: np.ndarray, words: int = 13) -> list[str | None]:
    """`find_overlap` of each text; faster than one by one where texts are short."""
    found = hash_words(texts)
    first: dict[int, tuple[int, int]] = {}  # text → first shared passage: its first word, its length
    for length in range(min(words, SHORTEST), words + 1):
        low, high = np.searchsorted(hashes, np.array([length, length + 1], np.uint64) << _HASH_BITS)
        if low == high:
            continue
        known = hashes[low:high]
        passages, starts = _hash_passages(found, length)
        shared = starts[known[np.minimum(np.searchsorted(known, passages), len(known) - 1)] == passages]
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
