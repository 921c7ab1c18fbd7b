"""Words of a text as 64-bit hashes, all at once in numpy: what duplicate removal and decontamination compare.

A word is a run of letters, digits and marks, after NFKC and lower-casing; a character of a script without spaces
(Han, Kana, Thai …) is a word by itself. Punctuation and white space only separate; invisible format characters
(soft hyphen, joiners) count for nothing. Hashes depend on the text alone, so they agree between processes and runs.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hfkit.quality import UNSPACED

# Characters hashed at once, which bounds memory at about 8 MB however long the text is; 2**20 takes 1.3 times as long.
_BLOCK = 1 << 17
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers can be undone modulo 2**64
_SEPARATOR, _WORD, _WORD_BY_ITSELF, _INVISIBLE = range(4)


class Words(NamedTuple):
    """The words of several texts, one text after another."""

    normalised: str
    """The texts after NFKC and lower-casing, one line end between two; the places below count its characters."""
    hashes: np.ndarray
    """(words,) uint64"""
    first: np.ndarray
    """First character of each word: (words,) int64."""
    end: np.ndarray
    """The character after each word's last: (words,) int64."""
    bounds: np.ndarray
    """Where each text's words begin, and the number of words: (texts + 1,) int64."""


def prepare_tables() -> None:
    """Compute the tables that hashing needs, so that processes forked afterwards have them (0.3 s)."""
    _kinds()
    _powers()


def hash_words(texts: Sequence[str]) -> Words:
    """Hash every word of the texts: one text of 500 bytes takes about as long as a hundred at once."""
    lowered = [(text if text.isascii() else unicodedata.normalize("NFKC", text)).lower() for text in texts]
    joined = "\n".join(lowered)
    blocks = [_hash_block("")]
    start = 0
    while start < len(joined):
        end = start + _BLOCK
        if end < len(joined):  # cut between words; a run of _BLOCK characters without a space is cut anywhere
            end = max(joined.rfind(" ", start, end), joined.rfind("\n", start, end)) + 1 or end
        hashes, first, last = _hash_block(joined[start:end])
        blocks.append((hashes, first + start, last + start))
        start = end
    hashes, first, last = (np.concatenate(column) for column in zip(*blocks, strict=True))
    begins = np.cumsum([0, *(len(text) + 1 for text in lowered)])  # the last one lies behind the last word
    return Words(joined, hashes, first, last, np.searchsorted(first, begins))


def hash_windows(words: Words, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash every run of ``size`` words inside one text: (hashes (windows,) uint64, first word (windows,) int64)."""
    count = max(len(words.hashes) - size + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset, multiplier in enumerate(multipliers(size) if count else ()):
        total += words.hashes[offset : offset + count] * multiplier
    text = np.repeat(np.arange(len(words.bounds) - 1), np.diff(words.bounds))  # which one each word belongs to
    inside = (text[:count] == text[len(text) - count :]).nonzero()[0]
    return _mix(total[inside]), inside


@lru_cache
def multipliers(count: int) -> np.ndarray:
    """One odd number per place, (count,) uint64, for multilinear hashing (Lemire & Kaser 2014, arXiv:1202.4961)."""
    return _mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_BASE)) | np.uint64(1)


def _hash_block(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[codes]
    if (invisible := kinds == _INVISIBLE).any():
        places = (~invisible).nonzero()[0]
        codes, kinds = codes[places], kinds[places]
    else:
        places = None
    in_word = kinds == _WORD
    alone = kinds == _WORD_BY_ITSELF
    begins, ends = alone | in_word, alone | in_word
    begins[1:] &= ~in_word[:-1] | alone[1:]
    ends[:-1] &= ~in_word[1:] | alone[:-1]
    first, last = begins.nonzero()[0], ends.nonzero()[0]
    power, inverse = _powers()
    # A word's hash is the sum of mixed(code) * BASE**place: a difference of prefix sums, shifted back to place 0.
    prefix = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_mix(codes.astype(np.uint64)) * power[: len(codes)], out=prefix[1:])
    hashes = (prefix[last + 1] - prefix[first]) * inverse[first]
    if places is not None:
        first, last = places[first], places[last]
    return _mix(hashes), first, last + 1


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit of the input over the output, in place (the finaliser of MurmurHash3, public domain)."""
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


@lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Powers 0 … _BLOCK - 1 of _BASE and of its inverse, modulo 2**64."""
    bases = (_BASE, pow(_BASE, -1, 2**64))
    exponents = np.zeros((2, _BLOCK), np.uint64) + np.array(bases, np.uint64)[:, None]
    exponents[:, 0] = 1
    powers = np.multiply.accumulate(exponents, axis=1)
    return powers[0], powers[1]


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """What each code point is to a word: (0x110000,) uint8. Takes about 0.1 s, once per process."""
    kinds = np.zeros(0x110000, np.uint8)
    by_category = {"L": _WORD, "M": _WORD, "N": _WORD, "Cf": _INVISIBLE}
    for code in range(0x20000):  # beyond lie Han, without spaces, and unassigned or invisible code points
        category = unicodedata.category(chr(code))
        kinds[code] = by_category.get(category, by_category.get(category[0], _SEPARATOR))
    kinds[0xE0000:0xE0200] = _INVISIBLE  # language tags and variation selectors
    for first, last in re.findall("(.)-(.)", UNSPACED):
        codes = np.arange(ord(first), ord(last) + 1)
        words = (kinds[codes] == _WORD) | (codes >= 0x20000)
        kinds[codes[words]] = _WORD_BY_ITSELF
    return kinds
