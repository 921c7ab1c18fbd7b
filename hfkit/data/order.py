"""Which sequence is read at which position of training: a keyed permutation, computed point by point.

Position → sequence is a pure function of (seed, epoch, position): nothing of the corpus' size is held in memory,
nothing needs saving, and the order is the same for any number of processes, any accumulation and after any resume.

Method: a balanced Feistel network on the smallest even number of bits that covers the size, with cycle walking
(values that fall outside are permuted again). A Feistel network is a bijection whatever its round function is
(Luby and Rackoff, 1988, doi:10.1137/0217022).
"""

from collections.abc import Sequence

import numpy as np

from hfkit.settings import BadInput

ROUNDS = 6
EMPTY = -1  # a slot without a sequence, where the last step of a run is short


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """Scramble 64-bit words (the SplitMix64 finaliser; Steele, Lea and Flood, 2014, doi:10.1145/2714064.2660195)."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return where each of ``indices`` (all below ``size``) goes in this epoch's shuffle.

    Example:
        >>> sorted(permute(np.arange(5), size=5, seed=1, epoch=0).tolist())
        [0, 1, 2, 3, 4]
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    with np.errstate(over="ignore"):
        keys = _mix(np.arange(ROUNDS, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64), epoch + 1)
        values = indices.astype(np.uint64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            left, right = values[outside] >> np.uint64(half), values[outside] & mask
            for key in keys:
                left, right = right, left ^ (_mix(right, int(key)) & mask)
            values[outside] = (left << np.uint64(half)) | right
            outside = values >= size
    return values.astype(np.int64)


def shuffle(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return the item (0 … size−1) at each position of an endless run: a fresh permutation for every epoch."""
    chosen = np.empty(len(positions), dtype=np.int64)
    epochs = positions // size
    for epoch in np.unique(epochs):  # a step can straddle two epochs
        here = epochs == epoch
        chosen[here] = permute(positions[here] % size, size, seed, int(epoch))
    return chosen


def build_mixture(weights: Sequence[float], block: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each slot of a block, and how many earlier slots of the block that source has.

    A mixture repeats this block for ever. Of the sources that are behind their share, each slot goes to the one whose
    next turn is due first, so that a source is never more than one slot from its due, however many there are (the
    quota method; Balinski and Young, Amer. Math. Monthly 82, 1975); shares are exact to 1/``block``.

    Example:
        >>> source, turn = build_mixture([2.0, 1.0], block=6)
        >>> source.tolist(), turn.tolist()
        ([0, 0, 1, 0, 0, 1], [0, 1, 0, 2, 3, 1])
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    source, turn = np.empty(block, dtype=np.int64), np.empty(block, dtype=np.int64)
    taken = np.zeros(len(shares), dtype=np.int64)
    for slot in range(block):
        behind = taken < shares * (slot + 1)
        source[slot] = np.argmin(np.where(behind, (taken + 1) / shares, np.inf))
        turn[slot] = taken[source[slot]]
        taken[source[slot]] += 1
    if (empty := np.flatnonzero(taken == 0)).size:
        raise BadInput(f"source {empty[0] + 1} of the mixture has a weight below 1/{block} of the total")
    return source, turn


def mix_sources(positions: np.ndarray, mixture: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each position of an endless run, its source and how many earlier positions that source had."""
    source, turn = mixture
    block, slot = np.divmod(positions, len(source))
    return source[slot], block * np.bincount(source)[source[slot]] + turn[slot]


def share_of_rank(step: np.ndarray, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Split one step's sequences into this rank's micro-batches; every split covers the same global batch.

    A short last step is filled with ``EMPTY`` slots, spread evenly, so that all ranks run as many passes.

    Example:
        >>> [share_of_rank(np.arange(8), rank, 2, 2) for rank in (0, 1)]
        [[array([0, 1]), array([4, 5])], [array([2, 3]), array([6, 7])]]
    """
    per_pass = world_size * micro_batch_size
    filled = np.full(-(-len(step) // per_pass) * per_pass, EMPTY, dtype=np.int64)
    filled[: len(step)] = step
    return [part[rank] for part in filled.reshape(-1, world_size, micro_batch_size)]
