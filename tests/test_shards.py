"""Streams on disk: every token but a document's first is a target once, and every damaged file is named."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkit.data import shards
from hfkit.data.shards import IGNORE_INDEX, TokenStream, damaged_file, read_manifest, seal, token_dtype
from hfkit.files import write_json
from hfkit.settings import BadInput
from streams import number_documents, write_stream

SHAPES = [[], [1], [2], [1, 1, 1], [9], [8, 8], [5, 1, 7, 2], [3, 1, 1, 20, 1], [16, 1]]


def targets_with_context(stream: TokenStream, length: int) -> list[tuple[int, int]]:
    """(offset in the stream, target) of every target that the rows hold."""
    rows = np.arange(stream.num_rows(length))
    targets = stream.read_rows(rows, length)[1]
    row, column = np.nonzero(targets != IGNORE_INDEX)
    return list(zip((row * length + column + 1).tolist(), targets[row, column].tolist(), strict=True))


def expected_targets(documents: list[list[int]]) -> list[tuple[int, int]]:
    offsets = np.cumsum([0, *map(len, documents)])
    return [
        (int(start) + place, document[place])
        for start, document in zip(offsets, documents, strict=False)
        for place in range(1, len(document))
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_token_but_a_documents_first_is_a_target_exactly_once(
    shape: list[int], length: int, tmp_path: Path
) -> None:
    documents = number_documents(shape)
    stream = write_stream(tmp_path, documents)
    assert targets_with_context(stream, length) == expected_targets(documents)
    assert stream.num_targets(np.arange(stream.num_rows(length)), length) == sum(shape) - len(shape)


def test_rows_of_a_small_stream_are_as_worked_out_by_hand(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, [[5, 6, 0], [0], [7, 8, 9, 0]])  # 5 6 0 | 0 | 7 8 9 0
    ids, targets, positions = stream.read_rows(np.arange(2), 4)
    x = IGNORE_INDEX
    assert stream.num_rows(4) == 2
    assert ids.tolist() == [[5, 6, 0, 0], [7, 8, 9, 0]]
    assert targets.tolist() == [[6, 0, x, x], [8, 9, 0, x]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_positions_restart_at_rows_and_documents(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, number_documents([5, 1, 7, 3]))
    positions = stream.read_rows(np.arange(stream.num_rows(6)), 6)[2]
    # Documents begin at 0, 5, 6, 13; rows at 0, 6, 12.
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 0, 0]]


@given(shape=st.lists(st.integers(1, 30), max_size=12), length=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_targets_counted_from_offsets_are_those_that_rows_hold(
    shape: list[int], length: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        documents = number_documents(shape)
        stream = write_stream(Path(folder), documents)
        assert targets_with_context(stream, length) == expected_targets(documents)
        if count := stream.num_rows(length):
            rows = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8)))
            ids, targets, positions = stream.read_rows(rows, length)
            assert stream.num_targets(rows, length) == (targets != IGNORE_INDEX).sum()
            inputs = np.minimum(rows[:, None] * length + np.arange(length), len(stream.tokens) - 1)
            assert (ids == stream.tokens[inputs]).all()
            assert (positions[:, 0] == 0).all() and (positions <= np.arange(length)).all()


def test_documents_come_back_one_by_one(tmp_path: Path) -> None:
    documents = number_documents([4, 1, 9])
    stream = write_stream(tmp_path, documents)
    assert [stream.document(index).tolist() for index in range(stream.num_documents)] == documents
    assert write_stream(tmp_path, [], name="empty").num_documents == 0


@pytest.mark.parametrize("vocab_size, bytes_per_id", [(300, 2), (65536, 2), (65537, 4), (200_000, 4)])
def test_ids_take_two_bytes_while_they_fit(vocab_size: int, bytes_per_id: int, tmp_path: Path) -> None:
    assert token_dtype(vocab_size).itemsize == bytes_per_id
    stream = write_stream(tmp_path, [[1, vocab_size - 1, 0]], vocab_size)
    assert (tmp_path / "s.tokens").stat().st_size == 3 * bytes_per_id
    assert stream.tokens.tolist() == [1, vocab_size - 1, 0]


@pytest.mark.parametrize("bad", [300, 65536 + 5])
def test_an_id_beyond_the_vocabulary_is_refused(bad: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"the tokenizer gave id {bad}, beyond its 300 tokens"):
        write_stream(tmp_path, [[1, bad, 0]], vocab_size=300)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A folder as preparation leaves it."""
    folder = tmp_path / "prepared"
    (folder / "tokenizer").mkdir(parents=True)
    write_stream(folder, number_documents([40, 3, 17]), name="train")
    write_stream(folder, number_documents([12]), name="validation")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    seal(folder, {"key": "abc"})
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


FILES = ["train.tokens", "train.starts", "validation.tokens", "validation.starts", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("damage", [flip, cut, grow, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_each_damaged_file_of_a_sealed_folder_is_named(name: str, damage: Callable[[Path], None], sealed: Path) -> None:
    assert damaged_file(sealed) is None
    damage(sealed / name)
    assert damaged_file(sealed) == name


def test_a_manifest_is_whole_or_none(sealed: Path) -> None:
    path = sealed / "manifest.json"
    manifest = read_manifest(sealed)
    assert manifest is not None and manifest["key"] == "abc" and sorted(manifest["files"]) == sorted(FILES)
    content = path.read_text()
    for size in range(0, len(content) - 1, 37):  # torn anywhere; the last character is the line's end
        path.write_text(content[:size])
        assert read_manifest(sealed) is None
    for changed in ({"key": "abd"}, {"format": 2}, {"digest": "0"}):
        write_json(path, {**json.loads(content), **changed})
        assert read_manifest(sealed) is None
    path.write_text(content)
    assert read_manifest(sealed) == manifest
    shutil.rmtree(sealed)
    assert read_manifest(sealed) is None and damaged_file(sealed) == "manifest.json"


def test_a_huge_file_is_read_through_only_where_its_time_has_changed(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ALWAYS_HASHED", 8)
    time = (sealed / "train.tokens").stat().st_mtime_ns
    flip(sealed / "train.tokens")
    assert damaged_file(sealed) == "train.tokens"
    os.utime(sealed / "train.tokens", ns=(time, time))  # a change that also keeps size and time goes unseen
    assert damaged_file(sealed) is None
    cut(sealed / "train.tokens")
    os.utime(sealed / "train.tokens", ns=(time, time))
    assert damaged_file(sealed) == "train.tokens"
