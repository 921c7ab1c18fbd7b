"""Data sets of the Hub by name: downloaded or streamed, pinned to a commit, offline, and bad networks in one line."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfApi

from hfkit.data import catalog
from hfkit.data.catalog import describe_named
from hfkit.data.sources import resolve_evaluation, resolve_sources
from hfkit.settings import BadInput, DataConfig, RowsConfig, SourceConfig
from hub_runs import quick  # noqa: F401
from local_hub import LocalHub, hub_of_this_process  # noqa: F401

CORPUS = "me/corpus"


def forget() -> None:
    """Be a new process: nothing that was loaded is remembered."""
    catalog.load_named.cache_clear()
    catalog._find.cache_clear()


@pytest.fixture(autouse=True)
def client(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lead `datasets` of this process to the local Hub, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    forget()
    yield
    forget()


@pytest.fixture
def commits(hub: LocalHub) -> list[str]:
    """A private data set with two commits, the first of which is tagged v1."""
    api = HfApi()
    api.create_repo(CORPUS, repo_type="dataset", private=True)
    made = []
    for word in ("old", "new"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{word} {number}" for number in range(3)]}), file)
        for split in ("train", "test"):
            path = f"{split}-0.parquet"
            api.upload_file(path_or_fileobj=file, path_in_repo=path, repo_id=CORPUS, repo_type="dataset")
        made.append(hub.repo(CORPUS, "datasets").branches["main"])
        if word == "old":
            api.create_tag(CORPUS, tag="v1", repo_type="dataset")
    return made


def texts(**settings: Any) -> list[str]:
    (source,) = resolve_sources(DataConfig(**{"dataset": CORPUS, **settings}))
    return [document.text for document in source.documents()]


def problem_of(**settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        texts(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_by_name_and_revision(commits: list[str], streaming: bool) -> None:
    old, new = [[f"{word} {number}" for number in range(3)] for word in ("old", "new")]
    for revision, expected in ((None, new), ("v1", old), (commits[0], old), (commits[1], new)):
        assert texts(streaming=streaming, revision=revision) == expected
    test = resolve_evaluation(DataConfig(dataset=CORPUS, revision="v1", test_split="test", streaming=streaming), "test")
    assert test is not None and [document.text for document in test.documents()] == old
    fingerprints = [
        resolve_sources(DataConfig(dataset=CORPUS, revision=revision, streaming=streaming))[0].fingerprint()
        for revision in (None, commits[1], "v1")
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]  # the content counts, not what it was called


def test_commits_are_known_for_the_passport(commits: list[str]) -> None:
    mixture = DataConfig(sources=[SourceConfig(dataset=CORPUS), SourceConfig(dataset=CORPUS, revision="v1", name="b")])
    known = {"id": CORPUS, "configuration": None, "split": "train"}
    assert describe_named(mixture)["datasets"] == [{**known, "revision": commit} for commit in reversed(commits)]
    assert describe_named(RowsConfig(train_files="a.csv")) == {}


def test_passing_faults_are_outlasted(hub: LocalHub, commits: list[str]) -> None:
    for kind, fault in (("info", 503), ("resolve", "cut_reply"), ("tree", 500)):
        forget()
        hub.fail(kind, fault)
        assert texts(revision="v1", streaming=True)[0] == "old 0"


def test_offline_takes_what_was_loaded_before_and_only_that(
    hub: LocalHub, commits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts() == ["new 0", "new 1", "new 2"]
    before = resolve_sources(DataConfig(dataset=CORPUS))[0].fingerprint()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    forget()
    assert texts() == texts(revision=commits[1]) == ["new 0", "new 1", "new 2"]
    assert resolve_sources(DataConfig(dataset=CORPUS))[0].fingerprint() == before
    for revision in ("v1", commits[0]):
        assert f"what was loaded before is commit {commits[1]}" in problem_of(revision=revision)
    assert "me/other" in problem_of(dataset="me/other")
    assert hub.requests == []


def test_what_does_not_exist_is_one_line(hub: LocalHub, commits: list[str], tmp_path: Path) -> None:
    hub.fail("resolve", 503, times=None)
    assert "check your connection" in problem_of()
    hub.heal()
    assert "me/nothing" in problem_of(dataset="me/nothing")
    assert "v9" in problem_of(revision="v9")
    assert (
        problem_of(split="best")
        == f"dataset {CORPUS}/best: Unknown split \"best\". Should be one of ['train', 'test']."
    )
    assert "means nothing" in problem_of(dataset=str(tmp_path), revision="v1")
    for settings in ({"revision": "v1"}, {"revision": "v1", "train_files": "a.txt"}):
        with pytest.raises(BadInput, match=r"data\.revision v1 does nothing without dataset"):
            DataConfig(**settings)
    with pytest.raises(BadInput, match="revision v1 does nothing without dataset"):
        SourceConfig(path="a.txt", revision="v1")
