"""Batches of tokenized pairs: similar lengths together, by token budget or by number, as a function of the step."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from hfkit.data.batches import Batch, Plan, Reader, Split, Step
from hfkit.data.order import EMPTY, share_of_rank
from hfkit.data.pairs import plan_batches
from hfkit.data.shards import IGNORE_INDEX
from hfkit.settings import TrainConfig


@dataclass(frozen=True)
class EncodedPairs:
    """Tokenized pairs, ready to be padded."""

    sources: list[list[int]]
    targets: list[list[int]]
    pad: int
    start_id: int | None
    """The decoder's first input; None for a causal model, which reads the target behind the source."""

    @property
    def lengths(self) -> np.ndarray:
        """(pairs,) what a pair counts in a token budget: its longer side; for a causal model both."""
        sizes = np.array([[len(s), len(t)] for s, t in zip(self.sources, self.targets, strict=True)])
        return sizes.sum(1) if self.start_id is None else sizes.max(1)

    def collate(self, rows: Sequence[int], filled: np.ndarray | None = None) -> Batch:
        """Return the tensors of rows, padded on the right; rows that are not `filled` have no targets."""
        sources, targets = [self.sources[row] for row in rows], [self.targets[row] for row in rows]
        wanted = [t if filled is None or filled[i] else [IGNORE_INDEX] * len(t) for i, t in enumerate(targets)]
        if self.start_id is None:
            whole = [source + target for source, target in zip(sources, targets, strict=True)]
            skip = [[IGNORE_INDEX] * (len(source) - 1) for source in sources]
            return {
                "input_ids": _pad([ids[:-1] for ids in whole], self.pad),
                "targets": _pad([s + t for s, t in zip(skip, wanted, strict=True)], IGNORE_INDEX),
            }
        return {
            "input_ids": _pad(sources, self.pad),
            "attention_mask": _pad([[1] * len(ids) for ids in sources], 0),
            "decoder_input_ids": _pad([[self.start_id, *ids[:-1]] for ids in targets], self.pad),
            "targets": _pad(wanted, IGNORE_INDEX),
        }


def _pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


Batches = Callable[[int], list[np.ndarray]]
"""Epoch → its batches as arrays of row numbers."""


def plan_pairs(config: TrainConfig, lengths: np.ndarray, seed: int, rank: int, world_size: int) -> tuple[Plan, Batches]:
    """Return the number of steps, and the batches of each epoch: one a step, over all processes.

    With `global_batch_tokens` a batch has as many pairs as fit it, padded; otherwise `global_batch_size` pairs.
    """
    budget = config.global_batch_tokens

    @lru_cache(maxsize=2)
    def batches(epoch: int) -> list[np.ndarray]:
        if budget is not None:
            return plan_batches(lengths, budget, seed, epoch)
        return _group(lengths, config.global_batch_size, seed, epoch)

    epochs_of = len(batches(0))  # the sorted lengths decide it, so it is the same for every epoch
    steps = config.max_steps or math.ceil(round(epochs_of * (config.epochs or 1.0), 6))  # as `plan_steps` rounds
    largest = max(len(batch) for batch in batches(0))
    split = Split(budget or config.global_batch_size, config.micro_batch_size or largest, rank, world_size)
    return Plan(steps, split, None), batches


def _group(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return batches of ``size`` rows of similar length, in random order; equal lengths are dealt anew each epoch."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    groups = np.split(order, range(size, len(order), size))
    return [groups[place] for place in generator.permutation(len(groups))]


def pair_batches(pairs: EncodedPairs, batches: Batches, split: Split) -> Reader:
    """Return step → this process's share of the step's batch."""
    lengths = pairs.lengths
    num_targets = np.array([len(target) for target in pairs.targets])
    tokens = num_targets + np.array([len(source) for source in pairs.sources])
    per_epoch = len(batches(0))

    def read(step: int) -> Step:
        epoch, place = divmod(step, per_epoch)
        rows = batches(epoch)[place]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        micro = min(split.micro_batch_size, -(-len(rows) // split.world_size))
        shares = share_of_rank(np.arange(len(rows)), split.rank, split.world_size, micro)
        micro_batches = [
            pairs.collate(np.where(slots == EMPTY, rows[-1], rows[slots]).tolist(), slots != EMPTY) for slots in shares
        ]
        names = ", ".join(map(str, rows[:8]))
        return Step(micro_batches, int(num_targets[rows].sum()), int(tokens[rows].sum()), f"pairs {names} …")

    return read


def evaluation_batches(pairs: EncodedPairs, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield this process's batches of all pairs, sorted by length; every process yields as many."""
    order = np.argsort(-pairs.lengths, kind="stable")
    order = np.concatenate([order, np.full(-len(order) % world_size, EMPTY)])[rank::world_size]
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        yield pairs.collate(np.where(part == EMPTY, 0, part).tolist(), part != EMPTY)
