"""Overlap between training and evaluation text: the passages of 13 words that they share.

Thirteen words is GPT-3's n-gram length (Brown et al. 2020, arXiv:2005.14165, appendix C). Words are compared after
NFKC and lower-casing, whatever punctuation and white space lies between them; see `hfkit/data/words.py`. An evaluation
document of 8 to 12 words is compared as a whole; a shorter one is too common a phrase to prove anything.

Passages are compared by 58-bit hashes: a billion training words against ten million evaluation words give 0.03 false
matches.
"""

from collections.abc import Iterable

import numpy as np

from hfkit.data.words import hash_windows, hash_words
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
        hashes = hash_words(text).hashes
        if len(hashes) >= min(words, SHORTEST):
            parts.append(_hash_passages(hashes, min(words, len(hashes))))
    return np.unique(np.concatenate(parts))


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
    normalised, found, first, end = hash_words(text)
    best: tuple[int, int] | None = None
    for length in range(min(words, SHORTEST), words + 1):
        low, high = np.searchsorted(hashes, np.array([length, length + 1], np.uint64) << _HASH_BITS)
        if low == high or len(found) < length:
            continue
        known = hashes[low:high]
        passages = _hash_passages(found, length)
        shared = np.flatnonzero(known[np.minimum(np.searchsorted(known, passages), len(known) - 1)] == passages)
        if len(shared) and (best is None or shared[0] < best[0]):
            best = int(shared[0]), length
    return None if best is None else normalised[first[best[0]] : end[best[0] + best[1] - 1]]


def _hash_passages(hashes: np.ndarray, length: int) -> np.ndarray:
    """Hash every run of ``length`` words, with the length in the upper bits so that one array serves all lengths."""
    return (hash_windows(hashes, length) >> np.uint64(6)) | (np.uint64(length) << _HASH_BITS)
