"""Duplicates and overlap: planted pairs at known similarity, datasketch and brute force as judges."""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from hfkit.data import contamination, dedup, equal, words
from hfkit.data.contamination import Passages, find_overlap, find_overlaps, write_passages
from hfkit.data.dedup import exact_hash, find_exact_duplicates, find_near_duplicates, signature, signatures
from hfkit.data.rows import Rows
from hfkit.settings import BadInput, DedupConfig

CONFIG = DedupConfig()


def passages_of(texts: Iterable[str], folder: Path, words: int = 13) -> Passages:
    write_passages(folder, texts, words)
    return Passages(folder)


def planted_pair(rng: random.Random, jaccard: float, *, han: bool = False, length: int = 300) -> tuple[str, str]:
    """Two texts whose sets of 5-word shingles (5-character in Chinese) have this Jaccard similarity, to 0.002."""
    shingles = length - 4
    shared = round(2 * shingles * jaccard / (1 + jaccard))
    numbers = rng.sample(range(20_000), 2 * length)
    one, other = numbers[:length], numbers[: shared + 4] + numbers[length : 2 * length - shared - 4]
    if han:
        return "".join(chr(0x4E00 + number) for number in one), "".join(chr(0x4E00 + number) for number in other)
    return " ".join(f"w{number}" for number in one), " ".join(f"w{number}" for number in other)


def shingle_set(text: str) -> set[tuple[str, ...]]:
    units = text.split() if " " in text else list(text)
    return {tuple(units[start : start + 5]) for start in range(len(units) - 4)}


def share_found(jaccard: float, pairs: int, *, han: bool = False) -> float:
    rng = random.Random(f"{jaccard} {han}")
    texts = [text for _ in range(pairs) for text in planted_pair(rng, jaccard, han=han)]
    first, second = (shingle_set(text) for text in texts[:2])
    assert abs(len(first & second) / len(first | second) - jaccard) < 0.003
    found = find_near_duplicates(np.stack([signature(text, CONFIG) for text in texts]), CONFIG)
    assert (found[::2] == np.arange(0, 2 * pairs, 2)).all()  # the first of each pair stays
    dropped = found[1::2] != np.arange(1, 2 * pairs, 2)
    assert (found[1::2][dropped] == np.arange(0, 2 * pairs, 2)[dropped]).all()  # and is named
    return dropped.mean()


@pytest.mark.parametrize("jaccard", [0.8, 0.85, 0.95])
def test_near_copies_from_the_threshold_on_are_found(jaccard: float) -> None:
    assert share_found(jaccard, pairs=400) >= 0.95


@pytest.mark.parametrize("jaccard", [0.1, 0.4, 0.49])
def test_texts_below_one_half_stay(jaccard: float) -> None:
    assert share_found(jaccard, pairs=400) <= 0.01


def test_chinese_is_compared_by_characters() -> None:
    assert share_found(0.8, pairs=200, han=True) >= 0.95
    assert share_found(0.49, pairs=200, han=True) <= 0.01


def test_clusters_agree_with_datasketch() -> None:
    """Pairs far from the threshold, where both methods must decide alike."""
    rng = random.Random(5)
    texts = [text for jaccard in (0.95, 0.3, 0.9, 0.5) * 15 for text in planted_pair(rng, jaccard, length=120)]
    lsh = MinHashLSH(threshold=0.7, num_perm=128)
    theirs = []
    for index, text in enumerate(texts):
        judge = MinHash(num_perm=128)
        judge.update_batch([" ".join(shingle).encode() for shingle in shingle_set(text)])
        theirs.append(min([key for key in lsh.query(judge) if _jaccard(texts[key], text) > 0.7], default=index))
        lsh.insert(index, judge)
    ours = find_near_duplicates(np.stack([signature(text, CONFIG) for text in texts]), CONFIG)
    assert ours.tolist() == theirs
    assert sum(index != first for index, first in enumerate(theirs)) == 30


def _jaccard(one: str, other: str) -> float:
    first, second = shingle_set(one), shingle_set(other)
    return len(first & second) / len(first | second)


def test_estimate_is_unbiased() -> None:
    rng = random.Random(2)
    for jaccard in (0.5, 0.8):
        pairs = [planted_pair(rng, jaccard) for _ in range(200)]
        shares = [(signature(one, CONFIG) == signature(other, CONFIG)).mean() for one, other in pairs]
        assert abs(np.mean(shares) - jaccard) < 4 * np.sqrt(jaccard * (1 - jaccard) / 128 / 200)


def test_clusters_are_the_connected_components_of_all_pairs() -> None:
    """Against brute force over all pairs, on signatures with many near and exact repeats and one crowded bucket."""
    rng = np.random.default_rng(3)
    signatures = rng.integers(0, 2**32, (12, 128), dtype=np.uint32)[rng.integers(0, 12, 150)]
    noise = rng.random(signatures.shape) < rng.uniform(0, 0.3, (150, 1))
    signatures[noise] = rng.integers(0, 2**32, noise.sum(), dtype=np.uint32)
    signatures[rng.permutation(150)[:30], :6] = 7  # thirty that share one band and little else
    accept = dedup.accept_from(CONFIG)
    expected = list(range(150))
    for one, other in combinations(range(150), 2):
        if (signatures[one] == signatures[other]).mean() >= accept:
            low, high = sorted((expected[one], expected[other]))
            expected = [low if root == high else root for root in expected]
    assert find_near_duplicates(signatures, CONFIG).tolist() == expected


def test_short_texts_are_left_to_exact_comparison() -> None:
    texts = [
        "one two three four",
        "one two three four",
        "",
        "!!!",
        "five words are enough here",
        "Five words: are enough here",
    ]
    found = find_near_duplicates(np.stack([signature(text, CONFIG) for text in texts]), CONFIG)
    assert found.tolist() == [0, 1, 2, 3, 4, 4]
    assert find_near_duplicates(np.empty((0, 128), np.uint32), CONFIG).tolist() == []


def test_exact_copies_are_all_found_and_nothing_else() -> None:
    rng = random.Random(4)
    texts = [rng.choice(["a", "A ", "b\n\nc", "B  C", "d", "déjà", "DÉJÀ", "文", "\ud800"]) for _ in range(500)]
    hashes = np.array([np.frombuffer(exact_hash(text), np.uint8) for text in texts])
    first: dict[str, int] = {}
    expected = [first.setdefault(" ".join(text.lower().split()), index) for index, text in enumerate(texts)]
    assert find_exact_duplicates(hashes).tolist() == expected
    assert find_exact_duplicates(np.empty((0, 16), np.uint8)).tolist() == []


def test_hashes_are_the_same_in_another_process(tmp_path: Path) -> None:
    text = "Ein Text, der überall gleich gehasht wird: 文字 und words."
    code = (
        "import sys; from hfkit.data.dedup import *; from hfkit.data.contamination import *; text = sys.argv[1]; "
        "print(exact_hash(text).hex(), signature(text, DedupConfig()).tobytes().hex()); "
        "write_passages(Path(sys.argv[2]), [text], 5)"
    )
    root = Path(dedup.__file__).parents[2]
    command = [sys.executable, "-c", code, text, str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert there.stdout.split() == [exact_hash(text).hex(), signature(text, CONFIG).tobytes().hex()]
    passages = (tmp_path / "passages.bin").read_bytes()
    assert len(passages) == 8 * passages_of([text], tmp_path, 5).count
    assert (tmp_path / "passages.bin").read_bytes() == passages


def test_rows_of_several_files_are_read_as_one_array(tmp_path: Path) -> None:
    table = np.random.default_rng(6).integers(0, 2**32, (100, 8), dtype=np.uint32)
    paths = []
    for number, piece in enumerate(np.split(table, [0, 30, 31, 90])):  # the first one is empty
        paths.append(tmp_path / str(number))
        piece.tofile(paths[-1])
    rows = Rows(paths, np.uint32, 8)
    assert len(rows) == 100 and (rows[0:100] == table).all() and rows[40:40].shape == (0, 8)
    assert (rows[29:32] == table[29:32]).all() and (rows[31:90][:, 2:4] == table[31:90, 2:4]).all()
    some = np.array([99, 0, 30, 30, 31, 5])
    assert (rows[some] == table[some]).all()
    rows.close()


def test_more_files_than_may_be_open_are_read(tmp_path: Path) -> None:
    table = np.random.default_rng(7).integers(0, 2**32, (600, 8), dtype=np.uint32)
    paths = [tmp_path / str(number) for number in range(300)]
    for number, path in enumerate(paths):
        table[2 * number : 2 * number + 2].tofile(path)
    opened, (soft, hard) = len(os.listdir("/dev/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = Rows(paths, np.uint32, 8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 280, hard))
    try:
        assert (rows[0:600] == table).all()
        some = np.random.default_rng(8).integers(0, 600, 2000)
        assert (rows[some] == table[some]).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        rows.close()
    assert len(os.listdir("/dev/fd")) == opened


def test_sorting_opens_a_bounded_number_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal, "AT_ONCE", 10)
    monkeypatch.setattr(equal, "_MOST_FILES", 4)
    keys = np.random.default_rng(9).integers(0, 2**64, (200, 1), np.uint64)
    for count, parts in ((11, 2), (20, 2), (21, 4), (200, 4)):
        found = list(equal.gather_equal([(keys[:count], np.arange(count))], count))
        assert len(found) == parts and sum(len(documents) for documents, _ in found) == count


def test_what_does_not_fit_in_memory_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures and hashes read in chunks from files, sorted through files, the result in a memory map."""
    rng = np.random.default_rng(6)
    texts = [" ".join(f"w{number}" for number in rng.integers(0, 300, 30)) for _ in range(500)]
    texts += [text + " end" for text in texts[::2]] + [text.upper() for text in texts[::3]]
    hashes = np.array([np.frombuffer(exact_hash(text), np.uint8) for text in texts])
    signed = signatures(texts, CONFIG)
    exact = find_exact_duplicates(hashes)
    near = find_near_duplicates(signed, CONFIG, exact)
    assert (exact != np.arange(len(texts))).sum() == 167 and (near != np.arange(len(texts))).sum() == 250
    hashes.tofile(tmp_path / "hashes")
    signed.tofile(tmp_path / "signatures")
    monkeypatch.setattr(dedup, "_CHUNK", 64)
    monkeypatch.setattr(equal, "AT_ONCE", 100)
    mapped = np.lib.format.open_memmap(tmp_path / "first.npy", "w+", np.int64, (len(texts),))
    mapped[:] = np.arange(len(texts))
    rows = Rows([tmp_path / "signatures"], np.uint32, 128)
    assert (find_exact_duplicates(Rows([tmp_path / "hashes"], np.uint8, 16), folder=tmp_path) == exact).all()
    assert (find_near_duplicates(rows, CONFIG, exact, mapped, tmp_path) == near).all() and (mapped == near).all()


def test_passages_beyond_a_run_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "RUN", 50)
    monkeypatch.setattr(contamination, "_MOST_FILTER_BITS", 10)  # so small that most passages are looked up in vain
    rng = random.Random(11)
    held_out = [" ".join(_random_words(rng, 60)) for _ in range(20)]
    passages = passages_of(held_out, tmp_path)
    assert passages.count == 20 * 48 and passages.filter.mean() > 100
    others = [" ".join(_random_words(rng, 60)) for _ in range(20)]
    assert all(find_overlaps([f"{text} {other}" for text, other in zip(held_out, others, strict=True)], passages))
    assert find_overlaps(others, passages) == [None] * 20


@pytest.mark.parametrize("jaccard", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("permutations", [64, 128, 256])
def test_bands_make_pairs_at_the_threshold_candidates(jaccard: float, permutations: int) -> None:
    bands, rows = dedup.choose_bands(DedupConfig(threshold=jaccard, permutations=permutations))
    assert bands * rows <= permutations
    assert 1 - (1 - jaccard**rows) ** bands >= 0.995


def test_words_are_runs_of_letters_and_single_han_characters() -> None:
    text = "Don't STOP: e-mail soft\u00adhyphen १२ हिन्दी 漢字かなカ ไทย ２０２４ x_y"
    found = words.hash_words([text])
    spelled = [found.normalised[first:end] for first, end in zip(found.first, found.end, strict=True)]
    assert spelled == [
        *("don", "t", "stop", "e", "mail", "soft\u00adhyphen", "१२", "हिन्दी"),
        *("漢", "字", "か", "な", "カ", "ไ", "ท", "ย", "2024", "x", "y"),
    ]
    assert words.hash_words(["softhyphen"]).hashes[0] == found.hashes[5]
    assert len(set(found.hashes.tolist())) == len(spelled)


def test_long_texts_are_hashed_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{number}" for number in range(500)) + "\n" + "文字" * 200
    whole = words.hash_words([text])
    monkeypatch.setattr(words, "_BLOCK", 100)
    pieces = words.hash_words([text])
    for one, other in zip(whole[1:], pieces[1:], strict=True):
        assert one.tolist() == other.tolist()


def _random_words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(3, 9))) for _ in range(count)]


def test_every_pasted_passage_is_found_whatever_surrounds_it(tmp_path: Path) -> None:
    rng = random.Random(8)
    held_out = [_random_words(rng, 60) for _ in range(50)]
    passages = passages_of((" ".join(document) for document in held_out), tmp_path)
    assert passages.count == 50 * (60 - 12)
    for trial in range(300):
        length = rng.randrange(13, 30)
        start = rng.randrange(60 - length + 1)
        passage = held_out[trial % 50][start : start + length]
        pasted = "".join(
            rng.choice([w.upper(), w.title(), w]) + rng.choice([" ", ", ", "\n\n> ", "—", "” (“"]) for w in passage
        )
        before, after = _random_words(rng, rng.randrange(40)), _random_words(rng, rng.randrange(40))
        found = find_overlap(f"{' '.join(before)}“{pasted}. {' '.join(after)}", passages)
        assert found is not None
        assert words.hash_words([found]).hashes.tolist() == words.hash_words([" ".join(passage[:13])]).hashes.tolist()


def test_twelve_shared_words_are_no_overlap(tmp_path: Path) -> None:
    rng = random.Random(9)
    document = _random_words(rng, 40)
    passages = passages_of([" ".join(document)], tmp_path)
    for start in range(28):
        assert find_overlap(" ".join(["zz", *document[start : start + 12], "zz"]), passages) is None
    assert find_overlap("", passages) is None
    assert find_overlap(" ".join(document), passages_of([], tmp_path)) is None


def test_short_evaluation_documents_are_looked_for_as_a_whole(tmp_path: Path) -> None:
    sentence = "a quite short sentence of only nine words here"
    passages = passages_of([sentence, "seven words are too common to count"], tmp_path)
    assert find_overlap(f"He wrote: {sentence.upper()}!", passages) == sentence
    assert find_overlap("a quite short sentence of only nine words", passages) is None
    longer = "one two three four five six seven eight nine ten eleven twelve thirteen"
    passages_of_both = passages_of([sentence, longer], tmp_path)
    assert find_overlap(f"{sentence}. {longer}", passages_of_both) == sentence
    assert find_overlap(f"{longer}. {sentence}", passages_of_both) == longer
    assert find_overlap("seven words are too common to count", passages) is None


def test_many_texts_at_once_give_what_each_gives_alone(tmp_path: Path) -> None:
    rng = random.Random(10)
    pool = [*_random_words(rng, 30), "文字", "é", "!", ""]
    texts = [" ".join(rng.choices(pool, k=rng.randrange(40))) for _ in range(200)] + ["", "\u0301a"]
    passages = passages_of(texts[:20], tmp_path, words=3)
    assert find_overlaps(texts, passages) == [find_overlap(text, passages) for text in texts]
    assert sum(overlap is None for overlap in find_overlaps(texts, passages)) > 20
    assert (signatures(texts, CONFIG) == np.stack([signature(text, CONFIG) for text in texts])).all()
    assert signatures([], CONFIG).shape == (0, 128)
    assert find_overlaps([], passages) == []


def test_chinese_passages_are_found(tmp_path: Path) -> None:
    passages = passages_of(["深度学习是机器学习的一个分支，它使用多层神经网络。"], tmp_path)
    assert find_overlap("他说：“深度学习是机器学习的一个分支”，对。", passages) == "深度学习是机器学习的一个分"
    assert find_overlap("深度学习是机器学习的一", passages) is None


def test_impossible_settings_are_refused() -> None:
    for setting in ({"threshold": 0.0}, {"shingle": 0}, {"permutations": 8}):
        with pytest.raises(BadInput, match=f"data.dedup.{next(iter(setting))}"):
            DedupConfig(**setting)


def test_passage_length_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="between 1 and 63"):
        write_passages(tmp_path, ["x"], words=64)
