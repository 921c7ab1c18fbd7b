"""What each step and each evaluation reads: every token once, true counts, and nothing that depends on the split."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfkit.data.batches import Batch, Reader, Split, Step, evaluation_windows, packed_rows, plan_steps
from hfkit.data.shards import IGNORE_INDEX, TokenStream
from hfkit.settings import BadInput, TrainConfig
from streams import number_documents, write_stream

LENGTH = 8
PAD = 59999
SHAPE = [5, 1, 30, 2, 9, 1, 1, 17, 4, 40, 3]


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return write_stream(tmp_path, number_documents(SHAPE))


def readers(
    streams: list[TokenStream],
    world: int,
    micro: int,
    weights: Sequence[float] = (1.0, 1.0),
    global_batch: int = 4,
    last: int | None = None,
    stages: tuple[tuple[int, int], ...] = (),
) -> list[Reader]:
    """One reader per rank."""
    splits = [Split(global_batch, micro, rank, world, stages) for rank in range(world)]
    return [packed_rows(streams, weights, LENGTH, split, seed=3, last=last, pad=PAD) for split in splits]


def trained_on(batches: list[Batch]) -> Counter[tuple[int, int]]:
    """How often each (input, target) is trained on; all words of the streams differ, so the pair names its place."""
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        real = batch["targets"] != IGNORE_INDEX
        pairs.update(zip(batch["input_ids"][real].tolist(), batch["targets"][real].tolist(), strict=True))
    return pairs


def pairs_of(documents: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter((a, b) for document in documents for a, b in pairwise(document))


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_every_token_is_trained_on_once_in_an_epoch(world: int, micro: int, stream: TokenStream) -> None:
    rows = stream.num_rows(LENGTH)
    assert rows % 4, "the last step is to be a short one"
    ranks = readers([stream], world, micro, last=rows)
    steps = [[read(step) for read in ranks] for step in range(-(-rows // 4))]
    batches = [batch for step in steps for share in step for batch in share.micro_batches]
    assert trained_on(batches) == pairs_of(number_documents(SHAPE))
    for step in steps:
        assert {(share.targets, share.tokens, share.names) for share in step} == {
            (step[0].targets, step[0].tokens, step[0].names)
        }
        assert sum(count_targets(share) for share in step) == step[0].targets
        assert len({len(share.micro_batches) for share in step}) == 1  # all ranks meet in as many passes
    assert sum(step[0].targets for step in steps) == sum(SHAPE) - len(SHAPE)
    # Every token is read once, and each row's last target is the next one's first input; the stream's last is not read.
    assert sum(step[0].tokens for step in steps) == len(stream.tokens) - (len(stream.tokens) % LENGTH == 1)


STAGES = ((2, 4), (1, 8))  # before steps of 12


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_steps_that_grow_read_the_same_order_and_every_token_once(world: int, micro: int, stream: TokenStream) -> None:
    rows = stream.num_rows(LENGTH)
    grown = readers([stream], world, micro, global_batch=12, last=rows, stages=STAGES)
    steps = [[read(step) for read in grown] for step in reversed(range(4))][::-1]  # needing no history
    read = [[batch for share in step for batch in share.micro_batches] for step in steps]
    assert trained_on([batch for batches in read for batch in batches]) == pairs_of(number_documents(SHAPE))
    plain = readers([stream], 1, 1, global_batch=1, last=rows)[0]
    begin = 0
    for batches, size, step in zip(read, (4, 4, 8, 12), steps, strict=True):
        ones = [plain(place) for place in range(begin, min(begin + size, rows))]
        assert trained_on(batches) == trained_on([batch for one in ones for batch in one.micro_batches])
        assert step[0].targets == sum(one.targets for one in ones)
        assert step[0].tokens == sum(one.tokens for one in ones)
        assert len({len(share.micro_batches) for share in step}) == 1
        begin += size


def count_targets(share: Step) -> int:
    return sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in share.micro_batches)


def test_a_short_last_step_is_filled_with_pads_that_are_no_targets(stream: TokenStream) -> None:
    rows = stream.num_rows(LENGTH)
    last = [read(rows // 4) for read in readers([stream], 2, 2, last=4 * (rows // 4) + 1)]
    assert [len(share.micro_batches) for share in last] == [1, 1]
    first, second = (share.micro_batches[0] for share in last)
    assert (first["input_ids"][1] == PAD).all() and (second["input_ids"] == PAD).all()
    assert (first["targets"][1] == IGNORE_INDEX).all() and (second["targets"] == IGNORE_INDEX).all()
    assert last[0].tokens <= LENGTH and last[0].targets == count_targets(last[0])


def test_the_global_batch_is_the_same_for_every_split_and_needs_no_history(stream: TokenStream) -> None:
    for step in (0, 3, 1000):  # over epoch borders too
        whole = trained_on(readers([stream], 1, 4)[0](step).micro_batches)
        for world, micro in [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)]:
            shares = [read(step) for read in readers([stream], world, micro)]
            assert trained_on([batch for share in shares for batch in share.micro_batches]) == whole
            assert shares[0].targets == sum(whole.values())


def test_sources_are_mixed_by_weight_and_each_is_read_whole_before_it_is_read_again(tmp_path: Path) -> None:
    shapes = [[40, 9, 16], [3, 70, 25]]
    documents = [number_documents(shapes[0]), number_documents(shapes[1], first=1000)]
    streams = [write_stream(tmp_path, part, name=str(number)) for number, part in enumerate(documents)]
    sizes = [stream.num_rows(LENGTH) for stream in streams]  # 9 and 13 rows
    seen: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    counts = np.zeros(2, dtype=int)
    read = readers(streams, 1, 4, weights=[3.0, 1.0])[0]
    steps = sizes[1]  # 4 rows each, of which one is the second source's: one epoch of that
    for number in range(steps):
        step = read(number)
        for batch in step.micro_batches:
            of_second = (batch["targets"] >= 1000).any(1) | (batch["input_ids"] >= 1000).any(1)
            counts += [int((~of_second).sum()), int(of_second.sum())]
            for source, mine in enumerate((~of_second, of_second)):
                seen[source] += trained_on([{name: tensor[mine] for name, tensor in batch.items()}])
        assert step.targets == count_targets(step)
    assert counts.tolist() == [3 * steps, steps]
    assert seen[1] == pairs_of(documents[1])
    epochs, left = divmod(3 * steps, sizes[0])
    whole = pairs_of(documents[0])
    assert left and set(seen[0]) == set(whole)
    assert all(epochs <= seen[0][pair] // times <= epochs + 1 for pair, times in whole.items())


def test_positions_are_given_exactly_where_a_document_begins_inside_a_row(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, number_documents([4 * LENGTH, 3, 2 * LENGTH - 3, 8]))
    read = readers([stream], 1, 1, global_batch=1)[0]
    inside = {}
    for step in range(stream.num_rows(LENGTH)):
        batch = read(step).micro_batches[0]
        inside[int(batch["input_ids"][0, 0])] = "position_ids" in batch
        if "position_ids" in batch:
            starts = stream.starts - np.flatnonzero(stream.tokens == batch["input_ids"][0, 0].item())[0]
            within = [int(start) for start in starts if 0 <= start < LENGTH]
            assert torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist() == sorted({0, *within})
    firsts = stream.tokens[::LENGTH].tolist()
    assert [inside[first] for first in firsts] == [False] * 4 + [True, False, False]


def windows(streams: list[TokenStream], length: int, batch_size: int, world: int) -> list[list[Batch]]:
    return [list(evaluation_windows(streams, length, batch_size, rank, world, PAD)) for rank in range(world)]


def contexts(batches: list[Batch]) -> Counter[tuple[tuple[int, ...], int]]:
    """How often each target is predicted from which inputs before it, those of its window."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for batch in batches:
        for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
            found.update((tuple(ids[: n + 1]), target) for n, target in enumerate(targets) if target != IGNORE_INDEX)
    return found


@pytest.mark.parametrize("length", [1, 7, 64])
def test_evaluation_reads_every_target_once_in_the_same_context_however_it_is_split(
    length: int, tmp_path: Path
) -> None:
    documents = [number_documents(SHAPE), number_documents([6, 11, 1], first=1000)]
    streams = [write_stream(tmp_path, part, name=str(number)) for number, part in enumerate(documents)]
    # Worked out document by document: window k of a document holds its targets k·length + 1 … (k + 1)·length.
    expected = Counter(
        (tuple(document[place - 1 - (place - 1) % length : place]), document[place])
        for part in documents
        for document in part
        for place in range(1, len(document))
    )
    for batch_size in (1, 3, 8):
        for world in (1, 2, 3):
            ranks = windows(streams, length, batch_size, world)
            assert contexts([batch for rank in ranks for batch in rank]) == expected
            assert len({len(rank) for rank in ranks}) == 1  # sharded models meet in every forward pass


def test_evaluation_pads_little_and_with_the_pad(stream: TokenStream) -> None:
    for batch in windows([stream], 16, 4, 1)[0]:
        real = batch["targets"] != IGNORE_INDEX
        assert (batch["input_ids"][~real] == PAD).all() and (batch["input_ids"][real] != PAD).all()
        assert real[0].all()  # no batch is wider than its longest window


def test_a_document_of_n_tokens_and_eos_gives_n_targets(tmp_path: Path) -> None:
    for tokens in (1, 2, 15, 16, 17):
        stream = write_stream(tmp_path, [[*range(1, tokens + 1), 0]])
        assert sum(int((batch["targets"] >= 0).sum()) for batch in windows([stream], 16, 4, 1)[0]) == tokens


def test_text_without_a_target_gives_no_window(tmp_path: Path) -> None:
    assert windows([write_stream(tmp_path, [])], 8, 4, 2) == [[], []]
    assert windows([write_stream(tmp_path, [[0], [0]])], 8, 4, 1) == [[]]
    streams = [write_stream(tmp_path, [], name="a"), write_stream(tmp_path, [[1, 0]], name="b")]
    assert contexts([batch for rank in windows(streams, 8, 4, 2) for batch in rank]) == {((1,), 0): 1}


def plan(rows: int = 100, length: int = 16, world: int = 1, **settings: Any) -> tuple[int, int | None, int, int]:
    """Return (steps, sequences of the run, global batch, micro-batch)."""
    made = plan_steps(TrainConfig(**settings), rows, length, 0, world)
    return made.max_steps, made.last, made.split.global_batch_size, made.split.micro_batch_size


@pytest.mark.parametrize(
    "rows, epochs, size, steps, last",
    [
        (100, 1.0, 8, 13, 100),
        (96, 1.0, 8, 12, 96),
        (100, 3.0, 8, 38, 300),
        (21, 0.5, 5, 3, 11),  # ⌈10.5 / 5⌉
        (100, 1.1, 11, 10, 110),  # not ⌈110.00000000000001⌉
        (1, 0.25, 4, 1, 1),
    ],
)
def test_epochs_end_after_their_share_of_the_rows(rows: int, epochs: float, size: int, steps: int, last: int) -> None:
    assert plan(rows, epochs=epochs, global_batch_size=size, micro_batch_size=1)[:2] == (steps, last)


@pytest.mark.parametrize("rows, steps", [(1, 3), (16, 3), (17, 4), (20, 4), (28, 4), (29, 5)])
def test_epochs_end_where_growing_steps_have_read_their_share(rows: int, steps: int) -> None:
    settings: dict[str, Any] = {"epochs": 1, "global_batch_size": 12, "batch_stages": [[2, 4], [1, 8]]}
    split = Split(12, 4, stages=STAGES)
    places = [split.positions(step, rows) for step in range(steps)]
    if rows > 16:
        assert plan(rows, **settings)[:3] == (steps, rows, 12)
        assert np.concatenate(places).tolist() == list(range(rows)) and places[-1].size
    else:
        with pytest.raises(BadInput, match=r"train.batch_stages take 3 steps, and the run has only [1-3]"):
            plan(rows, **settings)


def test_stages_are_divided_like_the_rest() -> None:
    staged: dict[str, Any] = {"max_steps": 9, "global_batch_size": 24}
    assert plan(batch_stages=[[1, 4], [2, 12]], **staged) == (9, None, 24, 4)
    assert plan(world=2, batch_stages=[[1, 4], [2, 12]], **staged)[3] == 2
    with pytest.raises(BadInput, match=r"train.batch_stages: 3 cannot be divided among 2 processes"):
        plan(world=2, batch_stages=[[1, 3]], **staged)
    with pytest.raises(BadInput, match=r"train.batch_stages: 4 over 1 processes is 4 .*micro_batch_size 8"):
        plan(batch_stages=[[1, 4]], micro_batch_size=8, **staged)
    with pytest.raises(BadInput, match=r"train.batch_stages take 9 steps, and the run has only 9"):
        plan(batch_stages=[[9, 4]], **staged)


def test_steps_are_counted_without_epochs() -> None:
    assert plan(max_steps=7, global_batch_size=4) == (7, None, 4, 4)
    assert plan(global_batch_size=4)[:2] == (1000, None)


@pytest.mark.parametrize(
    "size, world, micro", [(32, 1, 8), (32, 8, 4), (12, 1, 6), (7, 1, 7), (11, 1, 1), (22, 2, 1), (18, 2, 3)]
)
def test_the_micro_batch_is_the_largest_divisor_up_to_eight(size: int, world: int, micro: int) -> None:
    assert plan(world=world, max_steps=1, global_batch_size=size)[3] == micro


def test_a_global_batch_in_tokens_is_that_many_sequences() -> None:
    assert plan(length=16, max_steps=1, global_batch_tokens=128) == (1, None, 8, 8)
    with pytest.raises(BadInput, match=r"global_batch_tokens 130 is not a multiple of data.sequence_length 16"):
        plan(length=16, max_steps=1, global_batch_tokens=130)
    with pytest.raises(BadInput, match=r"global_batch_tokens 8 is not a multiple"):
        plan(length=16, max_steps=1, global_batch_tokens=8)


def test_a_global_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(BadInput, match="global_batch_size 9 cannot be divided among 2 processes"):
        plan(world=2, max_steps=1, global_batch_size=9)
    with pytest.raises(
        BadInput, match=r"12 over 2 processes is 6 sequences each, not a multiple of .*micro_batch_size 4"
    ):
        plan(world=2, max_steps=1, global_batch_size=12, micro_batch_size=4)
