"""What the model reads at a step: packed training rows and evaluation windows, as tensors.

Everything here is a pure function of (data, seed, step, rank): nothing is held between steps, so resuming at step s is
calling ``read(s)``, whatever s is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd

import numpy as np
import torch
from torch import Tensor

from hfkit.data.order import EMPTY, build_mixture, mix_sources, share_of_rank, shuffle
from hfkit.data.shards import IGNORE_INDEX, TokenStream
from hfkit.settings import BadInput, TrainConfig

Batch = dict[str, Tensor]
BLOCK = 1024  # places whose order is computed together: a permutation costs by the call


@dataclass(frozen=True)
class Step:
    """One process's share of an optimizer step."""

    micro_batches: list[Batch]
    """One forward and backward pass each."""
    targets: float
    """Targets (or their summed weights) of the step over all processes: what the summed loss is divided by."""
    tokens: int
    """Non-pad input positions of the step over all processes."""
    names: str = ""
    """Which sequences they are, for the message of a step that fails."""


Reader = Callable[[int], Step]


@dataclass(frozen=True)
class Split:
    """Which sequences a step takes, and how they are divided: over processes, then over passes."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    stages: tuple[tuple[int, int], ...] = ()
    """(steps, sequences a step) of each stage before the steps of ``global_batch_size``."""

    def positions(self, step: int, last: int | None = None) -> np.ndarray:
        """Return the places of a step's sequences in the endless order.

        Args:
            last: Total sequences of the run, where that is not a whole number of steps: the last step is then short.

        Example:
            >>> [Split(4, 1, stages=((2, 1), (1, 2))).positions(step, last=7).tolist() for step in range(5)]
            [[0], [1], [2, 3], [4, 5, 6], []]
        """
        begin, size = 0, self.global_batch_size
        for steps, sequences in self.stages:
            if step < steps:
                size = sequences
                break
            begin, step = begin + steps * sequences, step - steps
        begin += step * size
        return np.arange(begin, begin + size if last is None else max(begin, min(begin + size, last)))

    def steps_of(self, sequences: int) -> int:
        """Return the number of steps that take so many sequences, the last one maybe short."""
        done = 0
        for steps, size in self.stages:
            if sequences <= steps * size:
                return done - (-sequences // size)
            done, sequences = done + steps, sequences - steps * size
        return done - (-sequences // self.global_batch_size)

    def share(self, count: int) -> list[np.ndarray]:
        """Return this process's part of a step's ``count`` sequences, by their numbers, pass by pass."""
        return share_of_rank(np.arange(count), self.rank, self.world_size, self.micro_batch_size)


def packed_rows(
    streams: Sequence[TokenStream],
    weights: Sequence[float],
    length: int,
    split: Split,
    seed: int,
    *,
    last: int | None = None,
    pad: int = 0,
) -> Reader:
    """Return step → this process's packed rows.

    Args:
        streams: One per source; each is permuted by itself, epoch after epoch.
        weights: Share of each source in the sequences.
        length: Targets per row.
        last: Total sequences of the run, where that is not a whole number of steps: the last step is then short.
        pad: Id that fills empty slots.
    """
    sizes = [stream.num_rows(length) for stream in streams]
    mixture = build_mixture(weights) if len(streams) > 1 else None

    @lru_cache(2)
    def order(block: int) -> tuple[np.ndarray, np.ndarray]:
        """(places,) source and row of each place of a block."""
        positions = np.arange(block * BLOCK, (block + 1) * BLOCK)
        if mixture is None:
            return np.zeros(BLOCK, dtype=np.int64), shuffle(positions, sizes[0], seed)
        source, turn = mix_sources(positions, mixture)
        row = np.empty_like(turn)
        for number, size in enumerate(sizes):
            row[source == number] = shuffle(turn[source == number], size, seed + number)
        return source, row

    def sequences(step: int) -> tuple[np.ndarray, np.ndarray]:
        """(sequences,) source and row of each sequence of the global batch."""
        positions = split.positions(step, last)
        blocks = np.unique(positions // BLOCK)
        if not len(blocks):
            return positions, positions
        source, row = (np.concatenate(parts) for parts in zip(*map(order, blocks.tolist()), strict=True))
        places = positions - blocks[0] * BLOCK
        return source[places], row[places]

    def read(step: int) -> Step:
        source, row = sequences(step)
        targets = tokens = 0
        for number, stream in enumerate(streams):
            mine = row[source == number]
            targets += stream.num_targets(mine, length)
            tokens += int(np.minimum(length, len(stream.tokens) - mine * length).sum())
        batches = [_collate(streams, source, row, slots, length, pad) for slots in split.share(len(row))]
        return Step(batches, targets, tokens, f"rows {', '.join(map(str, row[:8]))}{' …' if len(row) > 8 else ''}")

    return read


def _collate(
    streams: Sequence[TokenStream], source: np.ndarray, row: np.ndarray, slots: np.ndarray, length: int, pad: int
) -> Batch:
    shape = (len(slots), length)
    ids, targets = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    positions = np.broadcast_to(np.arange(length), shape).copy()
    filled = slots != EMPTY
    for number in np.unique(source[slots[filled]]):
        here = filled.copy()
        here[filled] = source[slots[filled]] == number
        ids[here], targets[here], positions[here] = streams[number].read_rows(row[slots[here]], length)
    batch = {"input_ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}
    if (positions[:, 1:] == 0).any():  # rows inside one document need no mask: the causal kernel is faster
        batch["position_ids"] = torch.from_numpy(positions)
    return batch


def evaluation_windows(
    streams: Sequence[TokenStream], length: int, batch_size: int, rank: int = 0, world_size: int = 1, pad: int = 0
) -> Iterator[Batch]:
    """Yield this process's windows: each document by itself, cut from its start into windows of ``length`` targets.

    Windows are sorted by length, so that little is padding; the sum over all of them does not depend on batch size or
    processes. Every process yields as many batches: sharded models meet in each forward pass.
    """
    windows = np.concatenate([_windows_of(stream, number, length) for number, stream in enumerate(streams)])
    windows = np.concatenate([windows, np.zeros((-len(windows) % world_size, 3), dtype=np.int64)])  # empty ones
    windows = windows[np.argsort(-windows[:, 2], kind="stable")][rank::world_size]
    for begin in range(0, len(windows), batch_size):
        part = windows[begin : begin + batch_size]
        longest = max(1, int(part[0, 2]))
        ids = np.full((len(part), longest + 1), pad, dtype=np.int64)
        for row, (number, start, size) in enumerate(part[part[:, 2] > 0]):  # the empty ones come last
            ids[row, : size + 1] = streams[number].tokens[start : start + size + 1]
        real = np.arange(longest) < part[:, 2:3]
        yield {
            "input_ids": torch.from_numpy(np.where(real, ids[:, :-1], pad)),
            "targets": torch.from_numpy(np.where(real, ids[:, 1:], IGNORE_INDEX)),
        }


def _windows_of(stream: TokenStream, number: int, length: int) -> np.ndarray:
    """(windows, 3): stream number, offset of the first input, and number of targets of each window."""
    targets = np.diff(stream.starts) - 1  # per document
    count = np.maximum(0, -(-targets // length))
    document = np.repeat(np.arange(len(targets)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    offset = within * length
    return np.stack(
        [
            np.full(len(document), number),
            stream.starts[document] + offset,
            np.minimum(length, targets[document] - offset),
        ],
        axis=1,
    )


@dataclass(frozen=True)
class Plan:
    """How long a run is, and how its steps are divided."""

    max_steps: int
    split: Split
    last: int | None
    """Sequences of the whole run, where `epochs` ends it inside a step."""

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise BadInput("train.epochs is so small a share of the data that the run has no step; give more")


def plan_steps(config: TrainConfig, rows: int, length: int, rank: int = 0, world_size: int = 1) -> Plan:
    """Return the number of steps and the division of each.

    Args:
        rows: Sequences of one epoch.
        length: Tokens of a sequence.

    Raises:
        BadInput: where the global batch cannot be divided as asked.
    """
    size = config.global_batch_size
    if config.global_batch_tokens is not None:
        size, left = divmod(config.global_batch_tokens, length)
        if left or not size:
            raise BadInput(
                f"train.global_batch_tokens {config.global_batch_tokens} is not a multiple of "
                f"data.sequence_length {length}"
            )
    stages = tuple((steps, sequences) for steps, sequences in config.batch_stages)
    sizes = [("global_batch_size", size), *(("batch_stages:", sequences) for _, sequences in stages)]
    for name, part in sizes:
        if part % world_size:
            raise BadInput(f"train.{name} {part} cannot be divided among {world_size} processes")
    micro = config.micro_batch_size or _largest_divisor(gcd(*(part // world_size for _, part in sizes)))
    for name, part in sizes:
        if part // world_size % micro:
            raise BadInput(
                f"train.{name} {part} over {world_size} processes is {part // world_size} sequences each, "
                f"not a multiple of train.micro_batch_size {micro}"
            )
    split = Split(size, micro, rank, world_size, stages)
    last = None if config.epochs is None else ceil(round(rows * config.epochs, 6))  # 30 · 0.1 is 3.0000000000000004
    steps = split.steps_of(last) if last is not None else config.max_steps or 1000
    if stages and steps <= (staged := sum(number for number, _ in stages)):
        raise BadInput(f"train.batch_stages take {staged} steps, and the run has only {steps}")
    return Plan(steps, split, last)


def _largest_divisor(number: int) -> int:
    """Return the largest divisor up to 8."""
    return max(n for n in range(1, min(number, 8) + 1) if number % n == 0)
