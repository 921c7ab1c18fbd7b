"""Preparation as a whole: planted defects, the account, what is reused, kills, damage and bad input."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

import hfkit.data.prepare as prepare
from hfkit.data import texts
from hfkit.data.account import EXCERPT
from hfkit.data.prepare import prepare_data
from hfkit.data.shards import TokenStream
from hfkit.data.tokens import count_round_trip_failures
from hfkit.settings import BadInput, CleanConfig, DataConfig, DedupConfig, SourceConfig, TokenizerConfig
from hfkit.tokenizer import END_OF_TEXT, PAD, SPECIAL_TOKENS
from planted import Planted, plant
from runs import Ended, Server, Words, shared_server, write_corpus
from test_checkpoint import limit_file_size

SMALL = TokenizerConfig(vocab_size=300)


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The planted corpus."""
    return plant(tmp_path_factory.mktemp("planted"))


def settings_of(planted: Planted, cache: Path) -> Words:
    """Return the recipe's settings for the planted corpus."""
    return {
        "data.train_files": planted.folder / "train.jsonl",
        "data.test_files": planted.folder / "test.txt",
        "data.document": "line",
        "data.validation_share": 0,
        "data.on_error": "skip",
        "data.cache_dir": cache,
        "tokenizer.vocab_size": 400,
    }


@pytest.fixture(scope="module")
def ended(server: Server, planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The recipe, run on the planted corpus."""
    folder = tmp_path_factory.mktemp("prepared")
    done = server.run("prepare", settings_of(planted, folder / "cache"), folder / "run")
    assert done.code == 0, done.stderr
    return done


def read_audit(ended: Ended) -> dict[str, Any]:
    """Return audit.json."""
    return json.loads((ended.output_dir / "audit.json").read_text())


def kept_texts(cache: Path) -> list[str]:
    """Return the training texts in the cache."""
    (path,) = cache.glob("text-*/train-0.parquet")
    return pyarrow.parquet.read_table(path)["text"].to_pylist()


def small(folder: Path, documents: int = 40, **changed: Any) -> DataConfig:
    """Return the settings of a corpus that is prepared in a moment."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, documents)
    return DataConfig(**{"train_files": str(corpus), "cache_dir": folder / "cache", **changed})


# What is removed, and what is not


def check_planted(planted: Planted, audit: dict[str, Any], kept: list[str]) -> None:
    """Compare what was found with what was planted."""
    there = set(kept)
    removed = audit["removed"]
    assert set(planted.untouched) <= there  # byte for byte
    assert set(planted.repaired) <= there
    assert removed["exact_duplicates"] == planted.exact_copies
    missed = sum(text in there for text in planted.near_copies) / len(planted.near_copies)
    lost = sum(text not in there for text in planted.far_copies) / len(planted.far_copies)
    assert missed <= 0.05 and lost <= 0.01
    assert removed["near_duplicates"] == len(planted.near_copies) * (1 - missed) + len(planted.far_copies) * lost
    assert not there & set(planted.contaminated) and removed["contaminated"] == len(planted.contaminated)
    assert removed["unreadable"] == planted.unreadable and removed["empty"] == planted.empty
    half = len(planted.repaired) // 2
    assert audit["changed"] == {"mojibake": half, "controls": half}
    assert audit["documents"] == {"read": planted.documents, "kept": len(kept)}
    assert planted.documents == len(kept) + sum(removed.values())


def test_planted_defects_are_found_and_clean_text_stays_as_it_is(planted: Planted, ended: Ended) -> None:
    check_planted(planted, read_audit(ended), kept_texts(ended.output_dir.parent / "cache"))


@pytest.mark.slow
def test_planted_defects_beside_a_line_of_ten_megabytes(server: Server, tmp_path: Path) -> None:
    planted = plant(tmp_path, seed=1, line=10_000_000, scale=4)
    done = server.run("prepare", settings_of(planted, tmp_path / "cache"), tmp_path / "run")
    check_planted(planted, read_audit(done), kept_texts(tmp_path / "cache"))


def test_the_audit_shows_what_each_rule_did(planted: Planted, ended: Ended) -> None:
    audit = read_audit(ended)
    samples = audit["samples"]
    assert {"mojibake", "controls", "exact_duplicates", "near_duplicates", "contaminated"} <= samples.keys()
    assert any(row["cleaned"].startswith("schön") for row in samples["mojibake"])
    assert all(row["passage"] for row in samples["contaminated"])
    assert any("half a surrogate pair" in row["where"] for row in samples["unreadable"])
    assert (
        audit["duplicates"][0]["removed"] and sum(count for _, count in audit["lengths"]) == audit["documents"]["kept"]
    )
    (source,) = audit["sources"]
    assert source["documents"] == audit["documents"]["kept"] and source["tokens"] == audit["tokens"]
    assert source["epochs"] == 1.0 and 1 < source["bytes_per_token"] < 8
    by_rule = source["removed_by_rule"]
    assert {rule: part["documents"] for rule, part in by_rule.items()} == {
        k: n for k, n in audit["removed"].items() if n
    }
    assert source["removed"] == sum(audit["removed"].values()) and by_rule["near_duplicates"]["bytes"] > 100_000
    assert len(audit["passages"]) == 5 and all(len(passage.split()) == 13 for _, passage, _ in audit["passages"])
    assert audit["tokenizer"]["round_trip_failures"] == 0 and audit["tokenizer"]["vocab_size"] == 400
    assert "Corpus audit" in (ended.output_dir / "audit.html").read_text()


def test_every_overlap_is_listed(planted: Planted, ended: Ended) -> None:
    cache = ended.output_dir.parent / "cache"
    (path,) = cache.glob("text-*/overlaps.parquet")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    removed, counts = read_audit(ended)["removed"], Counter(row["rule"] for row in rows)
    for rule in ("exact_duplicates", "near_duplicates", "contaminated"):
        assert counts[rule] == removed[rule] > 0
    first = {row["cluster"]: row["text"] for row in rows if row["rule"] == "kept_first"}
    kept = {text[:EXCERPT] for text in kept_texts(cache)}
    assert set(first.values()) <= kept and len(first) == counts["kept_first"]
    for row in rows:
        if row["rule"].endswith("duplicates"):
            assert row["text"].lower().split()[:5] == first[row["cluster"]].lower().split()[:5]


def test_special_tokens_in_text_stay_text(planted: Planted, ended: Ended) -> None:
    (folder,) = (ended.output_dir.parent / "cache").glob("tokens-*")
    stream = TokenStream(folder, "train-0", vocab_size=400)
    eos, pad = SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(PAD)
    assert any(END_OF_TEXT in text and PAD in text for text in planted.untouched)
    assert (stream.tokens[stream.starts[1:] - 1] == eos).all() and (stream.tokens == eos).sum() == stream.num_documents
    assert (stream.tokens == pad).sum() == 0


def test_prepared_text_opens_as_a_dataset(ended: Ended) -> None:
    folder = json.loads(ended.stdout)["text"]
    opened = datasets.load_dataset("parquet", data_files=f"{folder}/train-*.parquet", split="train")
    assert opened.column_names == ["text", "where"] and len(opened) == read_audit(ended)["documents"]["kept"]
    assert opened.filter(lambda row: row["where"].endswith("train.jsonl:1")).num_rows == 1


def test_a_stream_that_is_not_the_text_is_counted(tmp_path: Path) -> None:
    data = prepare_data(small(tmp_path), SMALL)
    (tokens,) = (tmp_path / "cache").glob("tokens-*")
    paths = [data.text / "train-0.parquet"]
    assert count_round_trip_failures(tokens, paths, data.tokenizer) == 0
    with (tokens / "train-0.tokens").open("r+b") as file:
        file.write(bytes(2))
    assert count_round_trip_failures(tokens, paths, data.tokenizer) == 1


# Sources


def test_mixtures_report_their_epochs(tmp_path: Path) -> None:
    paths = [write_corpus(tmp_path / f"{seed}.jsonl", 40 * seed, seed) for seed in (1, 2)]
    sources = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, (3.0, 1.0), strict=True)]
    data = prepare_data(DataConfig(sources=sources, cache_dir=tmp_path / "cache", validation_share=0), SMALL)
    tokens = [row["tokens"] for row in data.audit["sources"]]
    assert [row["epochs"] for row in data.audit["sources"]] == [
        pytest.approx(0.75 * sum(tokens) / tokens[0], abs=0.001),
        pytest.approx(0.25 * sum(tokens) / tokens[1], abs=0.001),
    ]
    assert data.weights == [3.0, 1.0] and len(data.train) == 2


def test_a_source_with_a_frame_of_the_evaluation_text_is_remarked_on(tmp_path: Path) -> None:
    frame = "this frame of more than thirteen words stands at the head of\neach document of the source"
    rows = [json.dumps({"text": f"{frame} {'abcdefghij'[number] * 9}"}) for number in range(10)]
    (tmp_path / "framed.jsonl").write_text("\n".join(rows))
    (tmp_path / "held_out.txt").write_text(f"{frame} and in the evaluation text")
    sources = [
        SourceConfig(path=str(tmp_path / "framed.jsonl"), name="framed"),
        SourceConfig(path=str(write_corpus(tmp_path / "other.jsonl", 200)), name="other"),
    ]
    files = {"validation_files": str(tmp_path / "held_out.txt"), "cache_dir": tmp_path / "cache"}
    audit = prepare_data(DataConfig(sources=sources, dedup=DedupConfig(near=False), **files), SMALL).audit
    (note,) = audit["notes"]
    assert note.startswith("framed: 10 of 10 documents") and "10 of them for “this frame of" in note
    assert audit["passages"] == [["framed", " ".join(frame.split()[:13]), 10]] and "\n" not in note


def test_a_streamed_dataset_is_written_as_it_comes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 50)
    folder = tmp_path / "streamed"
    folder.mkdir()
    datasets.Dataset.from_json(str(corpus), cache_dir=str(tmp_path)).to_parquet(folder / "train.parquet")
    common: dict[str, Any] = {"validation_share": 0, "max_documents": 30}
    streamed = DataConfig(dataset=str(folder), streaming=True, cache_dir=tmp_path / "one", **common)
    local = DataConfig(train_files=str(corpus), cache_dir=tmp_path / "two", **common)
    first, second = (prepare_data(config, SMALL) for config in (streamed, local))
    assert kept_texts(tmp_path / "one") == kept_texts(tmp_path / "two") and len(kept_texts(tmp_path / "one")) == 30
    assert first.train[0].tokens.tolist() == second.train[0].tokens.tolist()
    assert prepare_data(streamed, SMALL).reused


def test_hooks_change_and_drop_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_shouts.py").write_text("def shout(text):\n    return None if 'bake' in text else text.upper()\n")
    monkeypatch.chdir(tmp_path)
    data = prepare_data(small(tmp_path, hooks=["my_shouts.shout"], validation_share=0), SMALL)
    kept = kept_texts(tmp_path / "cache")
    dropped = data.audit["removed"]["my_shouts.shout"]
    assert kept and dropped and all(text == text.upper() for text in kept)
    assert data.audit["changed"] == {"my_shouts.shout": len(kept)} and len(kept) + dropped == 40


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", "fails on {}:1: ZeroDivisionError: division by zero"),
        ("return 7", "returns 7 for {}:1, not text"),
    ],
)
def test_a_hook_that_fails_is_named_with_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    module = f"rules_{body.split()[-1]}"
    (tmp_path / f"{module}.py").write_text(f"def bad(text):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        prepare_data(small(tmp_path, hooks=[f"{module}.bad"], validation_share=0), SMALL)
    assert str(caught.value).startswith(f"data.hooks: {module}.bad {said.format(tmp_path / 'corpus.jsonl')}")


# What is reused


def refuse(*_: object, **__: object) -> None:
    """Stands for work that must not happen."""
    raise AssertionError("work was done again")


def test_a_second_run_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(small(tmp_path), SMALL)
    for name in ("refine", "train_tokenizer", "write_streams"):
        monkeypatch.setattr(prepare, name, refuse)
    again = prepare_data(small(tmp_path), SMALL)
    assert again.reused and not first.reused and again.key == first.key
    assert {**again.audit, "reused": False} == first.audit


def test_one_rule_the_tokenizer_or_one_byte_changes_the_key(tmp_path: Path) -> None:
    def key(tokenizer: TokenizerConfig = SMALL, **changed: Any) -> str:
        return prepare_data(small(tmp_path, **changed), tokenizer).key

    keys = [
        key(),
        key(clean=CleanConfig(whitespace=True)),
        key(dedup=DedupConfig(threshold=0.7)),
        key(decontaminate=False),
        key(TokenizerConfig(vocab_size=290)),
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(corpus.read_bytes().replace(b".", b"!", 1))
    keys.append(key())
    assert len(set(keys)) == len(keys)


def hashes(cache: Path) -> dict[str, str]:
    """Return the digest of every prepared file but the manifests, which hold times."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.suffix in (".tokens", ".starts", ".parquet")
    }


def kill_after(delay: float) -> Callable[[int, Path], None]:
    """Return what kills a run ``delay`` seconds after its start."""

    def kill(pid: int, _: Path) -> None:
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGKILL)

    return kill


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_preparation_ends_in_the_same_shards(
    kills: int, server: Server, planted: Planted, ended: Ended, tmp_path: Path
) -> None:
    expected = hashes(ended.output_dir.parent / "cache")
    assert len(expected) == 7  # train and test: text, tokens and starts; what overlaps
    cache, draw, hits, longest = tmp_path / "cache", random.Random(kills), 0, 4.0
    interrupted = 0
    while hits < kills:
        shutil.rmtree(cache, ignore_errors=True)
        killed = server.run(
            "prepare", settings_of(planted, cache), tmp_path / "run", kill_after(draw.uniform(0, longest))
        )
        if killed.code != -signal.SIGKILL:
            longest *= 0.8
            continue
        hits += 1
        interrupted += bool(list(cache.glob(".tmp-*")))
        again = server.run("prepare", settings_of(planted, cache), tmp_path / "run")
        assert again.code == 0, again.stderr
        assert hashes(cache) == expected
        assert not list(cache.glob(".tmp-*"))
    assert interrupted or kills < 10  # while a folder was being built, that is, and not only before or between


@pytest.mark.parametrize("name", ["text-*/train-0.parquet", "tokens-*/train-0.tokens", "tokens-*/train-0.starts"])
def test_a_damaged_file_is_named_and_built_again(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = prepare_data(small(tmp_path), SMALL)
    expected = hashes(tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(name)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    again = prepare_data(small(tmp_path), SMALL)
    assert f"{path.parent}: {path.name} is damaged" in capfd.readouterr().err
    assert not again.reused and again.key == first.key and hashes(tmp_path / "cache") == expected


# What cannot be prepared


def damaged(folder: Path, kind: str) -> tuple[Path, str]:
    """Write a file that cannot be read, and return it with what the message must say."""
    path = folder / "bad.jsonl"
    good = b'{"text": "one two three"}\n' * 3
    if kind == "broken line":
        path.write_bytes(good + b'{"text": "cut\n' + good)
        return path, f"{path}:4: column"
    if kind == "wrong column":
        path.write_bytes(good.replace(b"text", b"body"))
        return path, f"{path}:1: no column 'text'; the columns are body. Set --data.text_column."
    path = folder / "bad.jsonl.gz"
    packed = gzip.compress(b"".join(b'{"text": "number %d"}\n' % number for number in range(150_000)))
    path.write_bytes(packed[: len(packed) // 2])
    return path, "bad.jsonl.gz"


@pytest.mark.parametrize("kind", ["broken line", "wrong column", "corrupt gzip"])
def test_bad_input_is_named(kind: str, tmp_path: Path) -> None:
    path, message = damaged(tmp_path, kind)
    with pytest.raises(BadInput) as caught:
        prepare_data(DataConfig(train_files=str(path), cache_dir=tmp_path / "cache"), SMALL)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("text-*")) and not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize("kind", ["broken line", "corrupt gzip"])
def test_bad_input_can_be_skipped_and_is_counted(kind: str, tmp_path: Path) -> None:
    path, _ = damaged(tmp_path, kind)
    settings: dict[str, Any] = {"dedup": DedupConfig(exact=False, near=False), "validation_share": 0}
    config = DataConfig(train_files=str(path), cache_dir=tmp_path / "cache", on_error="skip", **settings)
    audit = prepare_data(config, SMALL).audit
    assert audit["removed"]["unreadable"] == 1
    assert audit["documents"]["read"] == audit["documents"]["kept"] + sum(audit["removed"].values())
    assert path.name in audit["samples"]["unreadable"][0]["where"]


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads every file, so that the system's answer is put in its mouth."""
    config = small(tmp_path)
    inner = Path.open

    def forbidden(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "corpus.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return inner(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(BadInput, match=r"corpus\.jsonl.*Permission denied"):
        prepare_data(config, SMALL)


def fill_disk() -> None:
    """Let every file of the run end at 100 kB."""
    limit_file_size(100_000)


def test_a_full_disk_is_said_and_leaves_nothing_behind(server: Server, planted: Planted, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    full = server.run("prepare", settings_of(planted, cache), tmp_path / "run", before="test_prepare.fill_disk")
    assert full.code == 2 and "error: no room left on the disk" in full.stderr and "Traceback" not in full.stderr
    assert not list(cache.glob(".tmp-*")) and not list(cache.glob("text-*"))
    assert server.run("prepare", settings_of(planted, cache), tmp_path / "run").code == 0


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("kilobytes", [200, 4_000])
def test_a_small_disk_is_said_and_a_larger_one_suffices(
    kilobytes: int, server: Server, planted: Planted, ended: Ended, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk]).returncode:
        pytest.skip("may not mount")
    try:
        full = server.run("prepare", settings_of(planted, disk / "cache"), tmp_path / "run")
        assert full.code == 2 and "error: no room left on the disk" in full.stderr and "Traceback" not in full.stderr
        assert not list(disk.glob("cache/.tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert server.run("prepare", settings_of(planted, disk / "cache"), tmp_path / "run").code == 0
        assert hashes(disk / "cache") == hashes(ended.output_dir.parent / "cache")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_nothing_left_is_bad_input(tmp_path: Path) -> None:
    config = small(tmp_path, clean=CleanConfig(min_characters=10_000))
    with pytest.raises(BadInput, match=r"no training text is left of 40 documents \(length 3[0-9]"):
        prepare_data(config, SMALL)


FRAME = "this header of more than thirteen words stands at the head of each of the books"


def test_a_single_book_may_repeat_itself(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join([FRAME, *(f"chapter {number}" for number in range(200)), FRAME]))
    data = prepare_data(DataConfig(train_files=str(book), cache_dir=tmp_path / "cache"), SMALL)
    assert data.validation is not None and data.audit["documents"] == {"read": 1, "kept": 1}


def test_books_that_share_a_header_are_refused_with_the_passage_and_the_remedy(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"{FRAME}\n" + " ".join(f"word{number}x{i}" for i in range(50)))
    config = DataConfig(train_files=str(tmp_path / "*.txt"), cache_dir=tmp_path / "cache")
    with pytest.raises(BadInput, match=r"5 documents \(contaminated 4\);.*“this header of.*data\.decontaminate false"):
        prepare_data(config, SMALL)
    assert prepare_data(replace(config, decontaminate=False), SMALL).audit["documents"]["kept"] == 5


def test_equal_documents_are_held_out_together(tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("\n\n".join(["one and the same paragraph"] * 8))
    config = DataConfig(train_files=str(tmp_path / "same.txt"), document="paragraph", cache_dir=tmp_path / "cache")
    with pytest.raises(BadInput, match=r"8 documents \(all are held out for validation\)"):
        prepare_data(config, SMALL)


def test_a_document_over_the_files_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test allocates two gigabytes, so that pyarrow's answer is put in its mouth."""

    def refuse_table(*_: Any, **__: Any) -> None:
        raise pyarrow.ArrowCapacityError("array cannot contain more than 2147483646 bytes")

    monkeypatch.setattr(texts.pyarrow, "table", refuse_table)
    with pytest.raises(BadInput, match=r"corpus\.jsonl:\d+: is over 2 GiB.*data\.document"):
        prepare_data(small(tmp_path), SMALL)
