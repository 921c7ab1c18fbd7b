"""Exact and near duplicates among documents, by sorting hashes: no index of the corpus is held in memory.

The pipeline writes 16 bytes (`exact_hash`) and one signature (`signature`, 512 bytes) per document to files as they
pass by; then `find_exact_duplicates` and `find_near_duplicates` read them, piece by piece. What the search holds of
each document is one number, in an array that may lie on disk; the rest of its memory, about 100 MB, is bounded.

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
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path

import numpy as np
from rensa import RMinHash

from hfkit.data.equal import gather_equal, run_starts
from hfkit.data.rows import Rows
from hfkit.data.words import hash_windows, hash_words, multipliers
from hfkit.progress import Progress
from hfkit.settings import DedupConfig

_SEED = 1
_NO_SHINGLE = np.uint32(0xFFFFFFFF)  # rensa's value where nothing was hashed
_SPREADS = 2.0  # accepted below the threshold, in standard deviations of the estimate
_CANDIDATE_RECALL = 0.995  # least probability that a pair at the threshold shares a band
_CHUNK = 1 << 12  # signatures read at once: 2 MB at 128 permutations
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


def find_exact_duplicates(
    hashes: np.ndarray | Rows, first: np.ndarray | None = None, folder: Path | None = None
) -> np.ndarray:
    """For each document the index of the first one with the same hash: (documents,) int64, itself where it is kept.

    Args:
        hashes: What `exact_hash` gave, (documents, 16) uint8.
        first: Where the result goes, such as a memory map; None makes an array.
        folder: Where temporary files go.
    """
    first = _each_its_own(len(hashes)) if first is None else first
    chunks = (
        (np.ascontiguousarray(hashes[begin:end]).view(np.uint64), np.arange(begin, end))
        for begin, end in _chunks(len(hashes))
    )
    for documents, runs in gather_equal(chunks, len(hashes), folder):
        first[documents] = documents[runs]
    return first


def find_near_duplicates(
    signatures: np.ndarray | Rows,
    config: DedupConfig,
    exact: np.ndarray | None = None,
    first: np.ndarray | None = None,
    folder: Path | None = None,
) -> np.ndarray:
    """For each document the index of the first of its cluster: (documents,) int64, itself where it is kept.

    Args:
        signatures: What `signature` gave, (documents, permutations) uint32.
        config: Its threshold decides; see the top of this file for what is found and what is taken wrongly.
        exact: What `find_exact_duplicates` gave; those that it drops are left out here.
        first: Where the result goes, such as a memory map that holds each document's own index; None makes an array.
        folder: Where temporary files go.
    """
    parent = _each_its_own(len(signatures)) if first is None else first
    bands, rows = choose_bands(config)
    with Progress(bands, "compare", "band") as progress:
        for band in range(bands):
            keys = _band_keys(signatures, slice(band * rows, band * rows + rows), exact)
            for documents, runs in gather_equal(keys, len(signatures), folder):
                repeated = np.bincount(runs, minlength=len(runs))[runs] > 1
                _join_buckets(signatures, parent, documents[repeated], runs[repeated], accept_from(config))
            progress.update(1)
    for begin, end in _chunks(len(parent)):
        _roots(parent, np.arange(begin, end))
    return parent


def _each_its_own(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))


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


def _band_keys(
    signatures: np.ndarray | Rows, columns: slice, exact: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield one 64-bit hash of the band for each document that has a shingle and copies none, and the documents."""
    for begin, end in _chunks(len(signatures)):
        band = signatures[begin:end][:, columns]
        takes_part = (band != _NO_SHINGLE).any(axis=1)
        if exact is not None:
            takes_part &= exact[begin:end] == np.arange(begin, end)
        keys = band[takes_part].astype(np.uint64) @ multipliers(band.shape[1])
        yield keys[:, None], begin + np.flatnonzero(takes_part)


def _join_buckets(
    signatures: np.ndarray | Rows, parent: np.ndarray, documents: np.ndarray, bucket: np.ndarray, accept: float
) -> None:
    """Compare the documents of each bucket and join those that agree; ``parent`` is changed.

    In each round the first document of every bucket is compared with the others, then leaves. A bucket is done when
    one document is left, or when all are in one cluster, which is after a round for most. A bucket in which more than
    `_MAX_LEADERS` documents stay apart (they share a frame and little else) is left to the other bands.
    """
    for _ in range(_MAX_LEADERS):
        leads = np.ones(len(documents), bool)
        leads[1:] = bucket[1:] != bucket[:-1]
        leader = documents[run_starts(leads)]
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
