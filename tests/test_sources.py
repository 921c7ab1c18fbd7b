"""Sources: which files and datasets the settings name, how text is cut into documents, what changes a fingerprint."""

import gzip
import json
import os
import pickle
import sys
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfkit.data import corpus, listing
from hfkit.data.corpus import builtin_documents
from hfkit.data.documents import Document, Rules, read_documents
from hfkit.data.hooks import identify_hooks, load_hooks
from hfkit.data.listing import content_digests, list_files
from hfkit.data.sources import Source, read_table, resolve_evaluation, resolve_sources
from hfkit.settings import BadInput, DataConfig, RowsConfig, SourceConfig

WIKI_TEXT = " \n = One = \n \n Text of one . \n = = Part = = \n More . \n = Two = \n Text of two . \n"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(source: Source | None) -> list[str]:
    assert source is not None
    return [document.text for document in source.documents()]


def problem_of(**settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        for source in resolve_sources(DataConfig(**settings)):
            list(source.documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(path: Path, **rules: Any) -> list[tuple[str, str]]:
    documents = read_documents(path, Rules(**rules))
    return [(document.text, document.where.replace(str(path), path.name)) for document in documents]


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_come_once_in_the_order_given_and_sorted_within(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz", "c/d.jsonl.zst", "c/e.CSV", "z.txt", ".hidden.txt", ".git/x.txt", "c/code.py"):
        write(tmp_path / name, "x")
    for name in ("README.md", "settings.json"):  # only where named
        write(tmp_path / name, "x")

    def found(files: str | list[str]) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in list_files(files, "data.train_files")]

    root = str(tmp_path)
    assert found(root) == ["a.txt.gz", "b.txt", "c/d.jsonl.zst", "c/e.CSV", "z.txt"]
    assert found(f"{root}/**/*.txt") == ["b.txt", "z.txt"]
    assert found(f"{root}/**") == [
        "README.md",
        "a.txt.gz",
        "b.txt",
        "c/d.jsonl.zst",
        "c/e.CSV",
        "settings.json",
        "z.txt",
    ]
    assert found([f"{root}/z.txt", f"{root}/*.txt", f"{root}/README.md"]) == ["z.txt", "b.txt", "README.md"]


def test_links_to_folders_are_followed_and_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "far.txt", "x")
    write(tmp_path / "data" / "real" / "near.txt", "x")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "real")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    write(tmp_path / "data" / ".store" / "kept" / "part.txt", "x")  # hidden, and shown by its link
    (tmp_path / "data" / "part").symlink_to(tmp_path / "data" / ".store" / "kept")
    found = list_files(str(tmp_path / "data"), "data.train_files")
    assert [str(path.relative_to(tmp_path / "data")) for path in found] == [
        "link/far.txt",
        "part/part.txt",
        "real/near.txt",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such name")
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    said = problem_of(train_files=str(tmp_path))
    assert said == f"data.train_files: the name '{tmp_path}/caf\\udce9.txt' is not UTF-8; rename it"


def test_path_with_glob_characters_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "book [1].txt", "x")
    assert list_files(str(path), "data.train_files") == [path]


def test_bad_path_is_named_with_its_flag(tmp_path: Path) -> None:
    write(tmp_path / "code" / "a.py", "x")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "saved" / "state.json", "{}")
    accepted = "(accepted: .txt .md .jsonl .json-lines .json .csv .tsv .parquet, also .gz and .zst)"
    for name, message in {
        "none.txt": "data.train_files: no such file or folder: {}",
        "*.nothing": f"data.train_files: {{}} matches no file that can be read {accepted}",
        "code": f"data.train_files: the folder {{}} holds no text {accepted}",
        "code/a.py": f"data.train_files: {{}} has no format that can be read here {accepted}",
        "empty.txt": "data.train_files: {} is empty",
        "saved": "data.train_files: {} is a saved dataset; give it as data.dataset",
    }.items():
        path = str(tmp_path / name)
        assert problem_of(train_files=path) == message.format(path)
    assert problem_of(train_files=[]) == "data.train_files: names no file"
    with pytest.raises(BadInput, match=r"^data\.test_files: no such file"):
        resolve_evaluation(DataConfig(test_files="none.txt"), "test")


def test_changed_file_is_hashed_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / name, name) for name in ("a.txt", "b.txt")]
    memory = tmp_path / "cache" / "digests.json"
    read: list[str] = []
    digest = listing.digest

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(listing, "digest", counted)
    first = content_digests(paths, memory)
    assert (first, read) == (content_digests(paths), ["a.txt", "b.txt"] * 2)
    read.clear()
    assert (content_digests(paths, memory), read) == (first, [])
    write(paths[1], "c.txt")  # as long as before
    os.utime(paths[1], ns=(1, 1))
    assert content_digests(paths, memory)[0] == first[0] != content_digests(paths, memory)[1] != first[1]
    assert read == ["b.txt"]
    memory.write_text("damaged")
    assert content_digests(paths[:1], memory) == first[:1]


# Cutting -------------------------------------------------------------------------------------------------------------


def test_file_is_one_document_left_as_it_is(tmp_path: Path) -> None:
    text = "\n  one\r\n\n\ntwo é\x0b\x1c three\n\n"
    assert cut(write(tmp_path / "a.txt", text)) == [(text, "a.txt")]
    assert cut(write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))) == [(text, "a.txt.gz")]


def test_paragraphs_are_cut_at_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n one\ntwo \n\n \t\nthree\r\n\r\nfour\n\n")
    assert cut(path, document="paragraph") == [(" one\ntwo ", "a.txt:2"), ("three", "a.txt:6"), ("four", "a.txt:8")]


def test_lines_are_documents_but_empty_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one \n\n  \n two\r\nthree")
    assert cut(path, document="line") == [("one ", "a.txt:1"), (" two", "a.txt:4"), ("three", "a.txt:5")]


def test_matching_line_begins_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.txt", WIKI_TEXT)
    documents = cut(path, document_start="^ = [^=].* = $")
    assert "".join(text for text, _ in documents) == WIKI_TEXT  # nothing is lost, not even the blank line on top
    assert documents == [
        (" \n = One = \n \n Text of one . \n = = Part = = \n More . \n", "wiki.txt:1"),
        (" = Two = \n Text of two . \n", "wiki.txt:7"),
    ]
    path = write(tmp_path / "wiki.txt", "before\n" + WIKI_TEXT)
    documents = cut(path, document_start="^ = [^=].* = $", document="line")
    assert documents[0] == ("before\n \n", "wiki.txt:1")
    assert "".join(text for text, _ in documents) == "before\n" + WIKI_TEXT


def test_expression_that_is_none_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    assert problem_of(train_files=str(path), document_start="(").startswith(
        "data.document_start '(' is no regular expression: missing )"
    )


def test_undecodable_text_is_named_by_line_and_byte_and_its_document_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\ntwo\ncaf\xe9 x\n\nthree\n")
    message = f"{path}:4: byte 4 is not UTF-8 (0xe9); save the file as UTF-8"
    for document, kept in {"file": [], "paragraph": ["one", "three"], "line": ["one", "two", "three"]}.items():
        assert problem_of(train_files=str(path), document=document) == message
        problems: list[str] = []
        documents = read_documents(path, Rules(document=document), problems.append)  # type: ignore[arg-type]
        assert ([text for text, _ in documents], problems) == (kept, [message])


def test_text_file_that_breaks_off_or_is_blank_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"line %d\n" % number for number in range(10_000)))
    cut_short = write(tmp_path / "a.txt.gz", whole[: len(whole) // 2])
    assert problem_of(train_files=str(cut_short)) == f"{cut_short}: cannot be read: Truncated compressed stream"
    blank = write(tmp_path / "blank.txt", "\n \n")
    assert problem_of(train_files=str(blank)) == f"{blank}: holds no text"
    problems: list[str] = []
    assert list(read_documents(blank, Rules(), problems.append)) == []
    assert problems == [f"{blank}: holds no text"]


def test_cutting_keeps_one_document_in_memory(tmp_path: Path) -> None:
    peaks = []
    for copies in (500, 5_000):
        path = write(tmp_path / "a.txt.gz", gzip.compress((("x" * 99 + "\n") * 10 + "\n").encode() * copies))
        tracemalloc.start()
        assert sum(1 for _ in read_documents(path, Rules(document="paragraph"))) == copies
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 10_000_000


# Sources -------------------------------------------------------------------------------------------------------------


def save_dataset(folder: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    return str(folder)


def test_parts_read_elsewhere_are_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfkit.data.sources.PART_ROWS", 4)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))  # the built-in topics alone
    write(tmp_path / "text" / "a.txt", WIKI_TEXT)
    write(tmp_path / "text" / "b.jsonl", "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(5)))
    saved = save_dataset(tmp_path / "saved", [{"text": f"row {number}"} for number in range(10)])
    cases: list[dict[str, Any]] = [{"train_files": str(tmp_path / "text"), "document": "line"}, {"dataset": saved}, {}]
    for settings in cases:
        (source,) = resolve_sources(DataConfig(**settings))
        parts = pickle.loads(pickle.dumps(source.parts()))
        documents = list(source.documents())
        assert list(chain.from_iterable(part.documents() for part in parts)) == documents
        assert len(parts) == (2 if "document" in settings else 3 if settings else 1)
        assert len({document.where for document in documents}) == len(documents)
        limited = resolve_sources(DataConfig(**settings, max_documents=3))[0]
        assert list(limited.documents()) == documents[:3]


def test_dataset_is_read_by_name_split_and_column(tmp_path: Path) -> None:
    splits = {
        name: datasets.Dataset.from_list([{"body": f"{name} {n}"} for n in range(3)]) for name in ("train", "held")
    }
    folder = str(tmp_path / "saved")
    datasets.DatasetDict(splits).save_to_disk(folder)
    config = DataConfig(dataset=folder, text_column="body", validation_split="held")
    (source,) = resolve_sources(config)
    assert next(source.documents()) == Document("train 0", f"{folder}/train:0")
    assert texts(resolve_evaluation(config, "validation")) == ["held 0", "held 1", "held 2"]
    assert resolve_evaluation(config, "test") is None
    assert problem_of(dataset=folder, split="best") == f"dataset {folder} has no split 'best'; it has train, held"
    assert problem_of(dataset=folder) == (
        f"{folder}/train:0: no column 'text'; the columns are body. Set --data.text_column."
    )
    problems: list[str] = []
    assert list(resolve_sources(DataConfig(dataset=folder))[0].documents(problems.append)) == []
    assert len(problems) == 3


def test_stream_reads_what_the_download_reads(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "train.jsonl", "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(600)))
    (download,), (stream,) = (
        resolve_sources(DataConfig(dataset=str(folder), streaming=streaming)) for streaming in (False, True)
    )
    assert texts(stream) == texts(download) == [f"row {number}" for number in range(600)]
    assert stream.fingerprint() == stream.fingerprint() != download.fingerprint()
    problem = problem_of(dataset=str(folder), split="best")
    assert problem == f"dataset {folder}/best: Unknown split \"best\". Should be one of ['train']."


def test_dataset_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    assert problem_of(dataset=str(tmp_path / "none")).startswith(f"dataset {tmp_path / 'none'}: ")
    folder = tmp_path / "data"
    write(folder / "train.jsonl", '{"text": "a"}\n{"text": \n')
    assert problem_of(dataset=str(folder)).startswith(f"dataset {folder}/train: ")


def test_mixture_keeps_names_weights_and_columns(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", '{"body": "a"}\n{"body": "b"}\n'))
    saved = save_dataset(tmp_path / "saved", [{"text": "c"}])
    first = SourceConfig(path=path, text_column="body", weight=3.0, name="first")
    sources = resolve_sources(DataConfig(sources=[first, SourceConfig(dataset=saved)]))
    assert [(source.name, source.weight, texts(source)) for source in sources] == [
        ("first", 3.0, ["a", "b"]),
        (f"{saved}/train", 1.0, ["c"]),
    ]
    assert problem_of(sources=[first, first]) == "data.sources: two sources are called first; give each a name"


def test_fingerprint_changes_with_content_and_rules_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", WIKI_TEXT)
    copy = write(tmp_path / "b.txt", WIKI_TEXT)

    def fingerprint(**settings: Any) -> str:
        return resolve_sources(DataConfig(**{"train_files": str(path), **settings}))[0].fingerprint()

    first = fingerprint()
    assert fingerprint(train_files=str(copy)) == first
    others = [
        fingerprint(document="line"),
        fingerprint(document_start="x"),
        fingerprint(text_column="y"),
        fingerprint(max_documents=1),
        fingerprint(train_files=[str(path), str(copy)]),
    ]
    write(path, WIKI_TEXT.replace("Two", "Too"))
    others.append(fingerprint())
    assert len({first, *others}) == 7

    saved = save_dataset(tmp_path / "saved", [{"text": "a"}])
    before = resolve_sources(DataConfig(dataset=saved))[0].fingerprint()
    other = save_dataset(tmp_path / "other", [{"text": "b"}])
    assert before != resolve_sources(DataConfig(dataset=other))[0].fingerprint()


def test_rows_of_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,1\nb,0\n")
    config = RowsConfig(train_files=str(path), test_files=[str(path)], max_documents=1)
    for which, expected in {"train": ["a"], "test": ["a", "b"]}.items():
        rows = read_table(config, which)  # type: ignore[arg-type]
        assert rows is not None
        assert [row.values["text"] for row in rows] == expected
    assert read_table(config, "validation") is None
    saved = save_dataset(tmp_path / "saved", [{"text": "a", "label": 1}])
    rows = read_table(RowsConfig(dataset=saved), "train")
    assert rows is not None
    assert [row.values for row in rows] == [{"text": "a", "label": 1}]
    with pytest.raises(BadInput, match=r"^data\.train_files: .*a\.txt has no format that can be read here"):
        read_table(RowsConfig(train_files=str(write(tmp_path / "a.txt", "x"))), "train")


# Hooks ---------------------------------------------------------------------------------------------------------------


def test_hooks_are_found_beside_the_user_and_bad_names_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    path = write(
        tmp_path / "my_rules.py", "LIMIT = 3\ndef short(text):\n    return text if len(text) < LIMIT else None\n"
    )
    write(tmp_path / "my_broken_rules.py", "1 / 0\n")
    (short,) = load_hooks(["my_rules.short"])
    assert (short("ab"), short("abc")) == ("ab", None)
    assert identify_hooks(["my_rules.short"]) == [["my_rules.short", listing.digest(path)]]
    (lower,) = load_hooks(["builtins.str.lower"])
    assert lower("Fine") == "fine" and identify_hooks(["builtins.str.lower"]) == [["builtins.str.lower", ""]]
    for name, message in {
        "short": "data.hooks: 'short' is not a dotted name such as my_rules.drop_short",
        "my_rules.x": "data.hooks: my_rules.x cannot be loaded: AttributeError: module 'my_rules' has no attribute 'x'",
        "no_rules.x": "data.hooks: no_rules.x cannot be loaded: ModuleNotFoundError: No module named 'no_rules'",
        "my_broken_rules.x": "data.hooks: my_broken_rules.x cannot be loaded: ZeroDivisionError: division by zero",
        "my_rules.LIMIT": "data.hooks: my_rules.LIMIT is no function",
    }.items():
        with pytest.raises(BadInput) as caught:
            load_hooks([name])
        assert str(caught.value) == message


# The built-in corpus -------------------------------------------------------------------------------------------------


def test_builtin_corpus_is_two_megabytes_of_different_documents() -> None:
    documents = list(builtin_documents())
    sizes = [len(text.encode()) for text, _ in documents]
    assert 1_500_000 < sum(sizes) < 3_000_000
    assert len(documents) > 500
    assert min(sizes) >= corpus.SHORTEST
    assert len({text for text, _ in documents}) == len({where for _, where in documents}) == len(documents)
    assert any('The "with" statement' in text for text, _ in documents)
    assert not any(where.startswith(("test/", "site-packages/")) for _, where in documents)


def test_builtin_corpus_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "boom.py", f'"""{"Words to keep. " * 30}"""\nraise SystemExit\nclass A:\n    """Short."""\n')
    write(tmp_path / "cut.py", "def (")
    write(tmp_path / "test" / "x.py", f'"""{"Words to skip. " * 30}"""\n')
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    documents = [document for document in builtin_documents() if not document.where.startswith("topic ")]
    assert documents == [Document("Words to keep. " * 29 + "Words to keep.\n\nShort.\n", "boom.py#1")]
