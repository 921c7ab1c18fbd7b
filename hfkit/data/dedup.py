"""Exact and near duplicates among documents, by sorting hashes: no index of the corpus is held in memory.

The pipeline writes 16 bytes (`exact_hash`) and one signature (`signature`, 512 bytes) per document to memory-mapped
files as documents pass by; then `find_exact_duplicates` and `find_near_duplicates` read them. Peak memory of the search
is about 50 bytes a document and 20 MB, whatever the documents' length (measured at 100,000 and 400,000).

Near duplicates: MinHash signatures (Broder 1997, doi:10.1109/SEQUEN.1997.666900) over sets of `shingle` consecutive
words, computed by rensa. Signatures that agree on all rows of at least one band are candidates (Leskovec, Rajaraman &
Ullman, Mining of Massive Datasets, section 3.4.2); a candidate counts when the share of equal places, which estimates
the Jaccard similarity, reaches the threshold less the estimate's own spread. Clusters are connected components, so
that a document may be dropped for its likeness to one that is dropped as well; the first of each cluster stays.

With 128 permutations the estimate at Jaccard 0.8 spreads by sqrt(0.8 * 0.2 / 128) = 0.035. Accepting two such
spreads less, from 0.73, finds 97.7 % of the pairs at exactly 0.8 (99.9 % at 0.85), and takes one in 10 million pairs
at 0.5 (5.2 spreads away). 21 bands of 6 rows make a pair at 0.8 a candidate with probability 0.998.
"""

import hashlib
from collections.abc import Sequence
from math import sqrt

import numpy as np
from rensa import RMinHash

from hfkit.data.words import hash_windows, hash_words, multipliers
from hfkit.settings import DedupConfig

_SEED = 1
_NO_SHINGLE = np.uint32(0xFFFFFFFF)  # rensa's value where nothing was hashed
_SPREADS = 2.0  # accepted below the threshold, in standard deviations of the estimate
_CANDIDATE_RECALL = 0.995  # least probability that a pair at the threshold shares a band
_CHUNK = 1 << 14  # signatures read at once: 8 MB at 128 permutations
_MAX_LEADERS = 64  # documents of one bucket that are compared with all others in it


def exact_hash(text: str) -> bytes:
    """A 16-byte hash that ignores case and the amount of white space.

    Example:
        >>> exact_hash("One  Two\\n") == exact_hash("one two")
        True
    """
    normalised = " ".join(text.casefold().split())
    return hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def signature(text: str, config: DedupConfig) -> np.ndarray:
    """MinHash of one text's word shingles: (permutations,) uint32; see `signatures`, which is faster for many."""
    return signatures([text], config)[0]


def signatures(texts: Sequence[str], config: DedupConfig) -> np.ndarray:
    """MinHash of each text's word shingles: (texts, permutations) uint32, the same in every process and run.

    A word is a character in scripts without spaces (see `hfkit/data/words.py`). A text with fewer words than a shingle
    has no shingle: its signature says so, and `find_near_duplicates` leaves it to exact comparison.
    """
    words = hash_words(texts)
    shingles, starts = hash_windows(words, config.shingle)
    ends = np.searchsorted(starts, words.bounds).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, ends, config.permutations, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), config.permutations)


def find_exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """For each document the index of the first one with the same hash: (documents,) int64, itself where it is kept.

    Args:
        hashes: What `exact_hash` gave, (documents, 16) uint8; may be a memory map.
    """
    halves = np.ascontiguousarray(hashes).view(np.uint64)  # (documents, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal hashes keep the documents' order
    ordered = halves[order]
    starts = np.ones(len(order), bool)  # where a run of equal hashes begins
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[_run_starts(starts)]
    return first


def find_near_duplicates(signatures: np.ndarray, config: DedupConfig) -> np.ndarray:
    """For each document the index of the first of its cluster: (documents,) int64, itself where it is kept.

    Args:
        signatures: What `signature` gave, (documents, permutations) uint32; may be a memory map.
        config: Its threshold decides; see the top of this file for what is found and what is taken wrongly.
    """
    parent = np.arange(len(signatures))
    bands, rows = choose_bands(config)
    for band in range(bands):
        keys, has_shingle = _band_keys(signatures, band * rows, rows)
        documents = np.flatnonzero(has_shingle)
        documents = documents[np.argsort(keys[documents], kind="stable")]
        starts = np.ones(len(documents), bool)
        starts[1:] = keys[documents[1:]] != keys[documents[:-1]]
        _join_buckets(signatures, parent, documents, _run_starts(starts), accept_from(config))
    return _roots(parent, np.arange(len(parent)))


def choose_bands(config: DedupConfig) -> tuple[int, int]:
    """Bands and rows: the most rows (fewest false candidates) with which a pair at the threshold shares a band.

    Example:
        >>> choose_bands(DedupConfig())
        (21, 6)
    """
    for rows in range(config.permutations, 1, -1):
        bands = config.permutations // rows
        if 1 - (1 - config.threshold**rows) ** bands >= _CANDIDATE_RECALL:
            return bands, rows
    return config.permutations, 1


def accept_from(config: DedupConfig) -> float:
    """The share of equal places from which two signatures count as near duplicates.

    Example:
        >>> round(accept_from(DedupConfig()), 3)
        0.729
    """
    spread = sqrt(config.threshold * (1 - config.threshold) / config.permutations)
    return config.threshold - _SPREADS * spread


def _band_keys(signatures: np.ndarray, start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """One 64-bit hash of the band per document, and whether it has a shingle at all; the file is read in chunks."""
    keys = np.empty(len(signatures), np.uint64)
    has_shingle = np.empty(len(signatures), bool)
    for begin in range(0, len(signatures), _CHUNK):
        band = np.asarray(signatures[begin : begin + _CHUNK, start : start + rows])
        keys[begin : begin + _CHUNK] = band.astype(np.uint64) @ multipliers(rows)
        has_shingle[begin : begin + _CHUNK] = (band != _NO_SHINGLE).any(axis=1)
    return keys, has_shingle


def _run_starts(starts: np.ndarray) -> np.ndarray:
    """For each place of a sorted array, where its run of equal values begins."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))


def _join_buckets(
    signatures: np.ndarray, parent: np.ndarray, documents: np.ndarray, bucket: np.ndarray, accept: float
) -> None:
    """Compare the documents of each bucket and join those that agree; ``parent`` is changed.

    In each round the first document of every bucket is compared with the others, then leaves. A bucket is done when
    one document is left, or when all are in one cluster, which is after a round for most. A bucket in which more than
    `_MAX_LEADERS` documents stay apart (they share a frame and little else) is left to the other bands.
    """
    for _ in range(_MAX_LEADERS):
        leads = np.ones(len(documents), bool)
        leads[1:] = bucket[1:] != bucket[:-1]
        leader = documents[_run_starts(leads)]
        apart = _roots(parent, leader) != _roots(parent, documents)
        left, right = leader[apart], documents[apart]
        for begin in range(0, len(left), _CHUNK):
            pair = slice(begin, begin + _CHUNK)
            agree = (signatures[left[pair]] == signatures[right[pair]]).mean(axis=1) >= accept
            _join(parent, left[pair][agree], right[pair][agree])
        open_buckets = np.unique(bucket[_roots(parent, leader) != _roots(parent, documents)])
        stays = ~leads & np.isin(bucket, open_buckets)
        documents, bucket = documents[stays], bucket[stays]
        if not len(documents):
            return


def _roots(parent: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The first document of each one's cluster; the paths walked are shortened."""
    roots = parent[documents]
    while not np.array_equal(next_roots := parent[roots], roots):
        roots = next_roots
    parent[documents] = roots
    return roots


def _join(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join the clusters of each pair; a cluster's root is always its first document."""
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        low, high = np.minimum(left, right), np.maximum(left, right)
        np.minimum.at(parent, high, low)
        unequal = low != high
        left, right = low[unequal], high[unequal]
