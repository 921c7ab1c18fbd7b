"""What the model reads at a step: packed training rows and evaluation windows, as tensors.

Everything here is a pure function of (data, seed, step, rank): nothing is held between steps, so resuming at step s is
calling ``read(s)``, whatever s is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from hfkit.data.order import EMPTY, build_mixture, mix_sources, share_of_rank, shuffle
from hfkit.data.shards import IGNORE_INDEX, TokenStream
from hfkit.settings import BadInput, TrainConfig

Batch = dict[str, Tensor]


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
    """How a step's sequences are divided: over processes, then over passes."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1


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

    def sequences(step: int) -> tuple[np.ndarray, np.ndarray]:
        """(sequences,) source and row of each sequence of the global batch."""
        begin = step * split.global_batch_size
        end = begin + split.global_batch_size if last is None else min(begin + split.global_batch_size, last)
        positions = np.arange(begin, end)
        if mixture is None:
            return np.zeros(len(positions), dtype=np.int64), shuffle(positions, sizes[0], seed)
        source, turn = mix_sources(positions, mixture)
        row = np.empty_like(turn)
        for number, size in enumerate(sizes):
            row[source == number] = shuffle(turn[source == number], size, seed + number)
        return source, row

    def read(step: int) -> Step:
        source, row = sequences(step)
        targets = tokens = 0
        for number, stream in enumerate(streams):
            mine = row[source == number]
            targets += stream.num_targets(mine, length)
            tokens += int(np.minimum(length, len(stream.tokens) - mine * length).sum())
        shares = share_of_rank(np.arange(len(row)), split.rank, split.world_size, split.micro_batch_size)
        batches = [_collate(streams, source, row, slots, length, pad) for slots in shares]
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
    if size % world_size:
        raise BadInput(f"train.global_batch_size {size} cannot be divided among {world_size} processes")
    share = size // world_size
    micro = config.micro_batch_size or max(n for n in range(1, min(share, 8) + 1) if share % n == 0)
    if share % micro:
        raise BadInput(
            f"train.global_batch_size {size} over {world_size} processes is {share} sequences each, "
            f"not a multiple of train.micro_batch_size {micro}"
        )
    split = Split(size, micro, rank, world_size)
    if config.epochs is None:
        return Plan(config.max_steps or 1000, split, None)
    last = ceil(round(rows * config.epochs, 6))  # 30 · 0.1 is 3.0000000000000004
    return Plan(-(-last // size), split, last)
