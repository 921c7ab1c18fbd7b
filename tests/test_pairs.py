"""Pairs: what is read, what is dropped and counted, and batches that keep their budget."""

import os
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkit.data.pair_batches import plan_pairs
from hfkit.data.pairs import Pair, clean_pairs, load_pairs, plan_batches, read_pairs
from hfkit.data.readers import Row, read_rows
from hfkit.settings import BadInput, PairDataConfig, TrainConfig

MULTI30K = Path(os.environ.get("HFKIT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "multi30k-en-de"


def test_pairs_are_read_from_nested_and_flat_rows(tmp_path: Path) -> None:
    (tmp_path / "nested.jsonl").write_text('{"translation": {"en": "a dog", "de": "ein Hund", "fr": "un chien"}}\n')
    (tmp_path / "flat.csv").write_text("id,de,en\n1,ein Hund,a dog\n")
    expected = [Pair("a dog", "ein Hund")]
    for name in ("nested.jsonl", "flat.csv"):
        assert list(read_pairs(read_rows(tmp_path / name), "en", "de")) == expected


def test_missing_language_names_the_row_and_the_languages_there_are() -> None:
    good = Row({"translation": {"en": "a", "de": "b"}}, "x.jsonl:1")
    bad = Row({"translation": {"en": "a", "de": None}}, "x.jsonl:2")
    with pytest.raises(
        BadInput, match=r"^x.jsonl:1: translation: no column 'fr'; the columns are en, de. .*target_key"
    ):
        list(read_pairs([good], "en", "fr"))
    with pytest.raises(BadInput, match=r"^y.csv:7: no column 'en'; the columns are english, german. .*source_key"):
        list(read_pairs([Row({"english": "a", "german": "b"}, "y.csv:7")], "en", "de"))
    with pytest.raises(BadInput, match=r"^x.jsonl:2: translation: de: is null, not text"):
        list(read_pairs([good, bad], "en", "de"))
    problems: list[str] = []
    assert list(read_pairs([bad, good], "en", "de", problems.append)) == [Pair("a", "b")]
    assert problems == ["x.jsonl:2: translation: de: is null, not text"]


def test_every_rule_drops_and_counts() -> None:
    good = [Pair("A dog runs.", "Ein Hund läuft."), Pair("A dog runs.", "Ein Hund rennt."), Pair("OK", "In Ordnung")]
    bad = {
        "empty": [Pair("", "nichts"), Pair("nothing", " \u3000")],
        "copied": [Pair("Hello  world", "hello world")],
        "length_ratio": [Pair("Yes.", "x" * 101), Pair("y" * 101, "Ja.")],
        "contaminated": [Pair("a CAT sleeps.", "Eine Katze schläft.")],
        "exact_duplicates": [Pair(" a dog runs.", "Ein Hund läuft."), good[2]],
    }
    kept, dropped = clean_pairs([*good, *chain.from_iterable(bad.values())], ["A cat  sleeps."])
    assert kept == good
    assert dropped == {rule: len(pairs) for rule, pairs in bad.items()}


@pytest.mark.parametrize(
    ("english", "other"),
    [
        ("A man in an orange hat starring at something.", "一个戴着橙色帽子的男人盯着什么东西看。"),
        ("The weather is very nice today, let us go for a walk.", "วันนี้อากาศดีมาก ไปเดินเล่นกันเถอะ"),
        ("The weather is very nice today.", "Сегодня очень хорошая погода."),
    ],
)
def test_scripts_of_many_bytes_are_not_taken_for_extreme_lengths(english: str, other: str) -> None:
    assert len(clean_pairs([Pair(english, other), Pair(other, english)], [])[0]) == 2


def test_nothing_left_is_refused_with_the_counts() -> None:
    with pytest.raises(BadInput, match=r"no training pair is left after cleaning .*copied 1"):
        clean_pairs([Pair("same", "same")], [])


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="needs the shared Multi30k data")
def test_real_clean_data_loses_next_to_nothing() -> None:
    files = sorted(path for path in MULTI30K.rglob("*.jsonl*") if "train" in path.name)
    pairs = list(read_pairs((row for path in files for row in read_rows(path)), "en", "de"))
    kept, dropped = clean_pairs(pairs, [])
    assert len(pairs) > 20_000
    assert len(pairs) - len(kept) - dropped["exact_duplicates"] < len(pairs) / 1000


LENGTHS = st.lists(st.integers(0, 64), max_size=200).map(lambda values: np.array(values, dtype=np.int64))


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, budget=st.integers(64, 512), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_batches_hold_every_row_once_and_keep_the_budget(
    lengths: np.ndarray, budget: int, seed: int, epoch: int
) -> None:
    batches = plan_batches(lengths, budget, seed, epoch)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    assert all(len(batch) * lengths[batch].max() <= budget for batch in batches)
    ranges = sorted((lengths[batch].min(), lengths[batch].max()) for batch in batches)
    assert all(last <= first for (_, last), (first, _) in pairwise(ranges))
    again = plan_batches(lengths.copy(), budget, seed, epoch)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_the_built_in_set_is_limited_like_any_other() -> None:
    data = load_pairs(PairDataConfig(max_documents=5))
    assert len(data.train) == 5 and len(data.test) > 5


def test_batches_waste_little_and_change_with_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=5000)
    plans = [plan_batches(lengths, 2048, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    padded = sum(len(batch) * lengths[batch].max() for batch in plans[0])
    assert lengths.sum() / padded > 0.97
    assert lengths.sum() / (2048 * len(plans[0])) > 0.95
    firsts = [tuple(plan[0].tolist()) for plan in plans]
    assert len(set(firsts)) == 3
    order = [int(lengths[batch].max()) for batch in plans[0]]
    assert order != sorted(order)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 100), (0.07, 7), (1.1, 110), (0.501, 51)])
def test_epochs_end_after_their_share_of_the_batches(epochs: float, steps: int) -> None:
    config = TrainConfig(epochs=epochs, global_batch_size=4)  # 0.07 * 100 is 7.000000000000001
    plan, _ = plan_pairs(config, np.arange(5, 405), seed=0, rank=0, world_size=1)
    assert plan.max_steps == steps


def test_a_row_over_the_budget_is_refused() -> None:
    with pytest.raises(BadInput, match="a row of 9 tokens does not fit a batch of 8"):
        plan_batches(np.array([3, 9]), 8, seed=0, epoch=0)
    assert plan_batches(np.array([], dtype=np.int64), 8, seed=0, epoch=0) == []
