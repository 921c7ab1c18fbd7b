"""The order of training: a bijection for every size, equal batches for every split, mixtures true to their weights."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkit.data.order import EMPTY, build_mixture, mix_sources, permute, share_of_rank, shuffle
from hfkit.settings import BadInput


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 257, 1000, 65537])
def test_every_epoch_is_a_permutation(size: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (2**63 + 11, 5)]:
        assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@given(size=st.integers(1, 400), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_any_size_seed_and_epoch_give_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_points_of_a_huge_order_are_distinct_and_need_no_memory_of_its_size() -> None:
    size = 10**12 + 39
    chosen = permute(np.arange(size - 5000, size), size, seed=3, epoch=2)
    assert len(set(chosen.tolist())) == 5000 and chosen.min() >= 0 and chosen.max() < size
    assert chosen.max() > size * 0.99 and chosen.min() < size * 0.01  # spread over the whole of it


def test_seeds_and_epochs_give_orders_of_their_own() -> None:
    keys = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {tuple(permute(np.arange(1000), 1000, seed, epoch).tolist()) for seed, epoch in keys}
    assert len(orders) == 16 and tuple(range(1000)) not in orders


def test_a_point_of_the_order_depends_on_nothing_but_its_position() -> None:
    whole = permute(np.arange(1000), 1000, seed=5, epoch=1)
    assert permute(np.array([999, 4, 4]), 1000, seed=5, epoch=1).tolist() == whole[[999, 4, 4]].tolist()
    assert (permute(np.arange(1000), 1000, seed=5, epoch=1) == whole).all()


def test_an_endless_run_is_one_permutation_after_another() -> None:
    run = shuffle(np.arange(51), 17, seed=1)
    for epoch in range(3):
        assert (run[17 * epoch : 17 * epoch + 17] == permute(np.arange(17), 17, 1, epoch)).all()
    assert (shuffle(np.arange(15, 20), 17, seed=1) == run[15:20]).all()  # a step over the border


SPLITS = [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]


@pytest.mark.parametrize("length", [8, 5, 1])
@pytest.mark.parametrize("world, micro", SPLITS)
def test_every_split_covers_the_same_global_batch_with_equal_passes(world: int, micro: int, length: int) -> None:
    step = np.arange(100, 100 + length)
    shares = [share_of_rank(step, rank, world, micro) for rank in range(world)]
    passes = -(-length // (world * micro))
    assert [[len(part) for part in share] for share in shares] == [[micro] * passes] * world
    # Pass by pass, rank by rank: the step in its own order, then what fills it up.
    slots = np.concatenate([share[number] for number in range(passes) for share in shares])
    assert slots[:length].tolist() == step.tolist()
    assert (slots[length:] == EMPTY).all() and len(slots) == passes * world * micro


WEIGHTS = st.lists(st.floats(0.02, 1.0), min_size=2, max_size=9)


@given(weights=WEIGHTS)
@settings(max_examples=30, deadline=None)
def test_no_source_is_ever_more_than_a_slot_from_its_due(weights: list[float]) -> None:
    source, turn = build_mixture(weights, block=500)
    taken = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, 501)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(taken - due).max() <= 1 + 1e-9
    assert (turn == taken[np.arange(500), source] - 1).all()


def test_many_small_sources_beside_large_ones_get_their_due() -> None:
    weights = [515, 417, 24, 23, *[20] * 7]  # serving whoever is furthest behind leaves one 1.14 slots short here
    source, _ = build_mixture(weights, block=500)
    due = np.arange(1, 501)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(np.cumsum(source[:, None] == np.arange(11), axis=0) - due).max() <= 1


@given(weights=WEIGHTS, blocks=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_turns_of_a_source_count_up_without_gap_across_blocks(weights: list[float], blocks: int) -> None:
    source, turn = mix_sources(np.arange(300 * blocks), build_mixture(weights, block=300))
    for number in range(len(weights)):
        mine = turn[source == number]
        assert mine.tolist() == list(range(len(mine)))


def test_equal_weights_take_turns() -> None:
    source, turn = mix_sources(np.arange(12), build_mixture([1, 1, 1], block=6))
    assert source.tolist() == [0, 1, 2] * 4 and turn.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_mixture_is_read_at_any_position_alone() -> None:
    mixture = build_mixture([5, 3, 1], block=64)
    whole = np.stack(mix_sources(np.arange(640), mixture))
    for position in (0, 63, 64, 639):
        assert np.stack(mix_sources(np.array([position]), mixture))[:, 0].tolist() == whole[:, position].tolist()


def test_a_weight_that_would_get_no_slot_is_refused() -> None:
    with pytest.raises(BadInput, match="source 2 of the mixture has a weight below 1/4096 of the total"):
        build_mixture([1.0, 1e-5])
    assert prod(np.bincount(build_mixture([4095.0, 1.0])[0])) == 4095
