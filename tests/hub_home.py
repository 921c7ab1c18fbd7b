"""A home folder, a Hub and a process that forks runs, for tests of recipes that publish; import the fixtures."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local_hub import LocalHub
from runs import Ended, Server, Words, tiny_run, write_corpus


@pytest.fixture(scope="module", name="home")
def home_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's home folder, which holds everything that the runs read and write."""
    home = tmp_path_factory.mktemp("disk") / "secret-home"
    home.mkdir()
    write_corpus(home / "corpus.jsonl", documents=120)
    return home


@pytest.fixture(scope="module", name="module_hub")
def hub_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(name="hub")
def healthy_hub(module_hub: LocalHub) -> Iterator[LocalHub]:
    """The Hub, without the faults of another test."""
    module_hub.hits.clear()
    yield module_hub
    module_hub.heal()


@pytest.fixture(scope="module", name="environment")
def signed_in_environment(module_hub: LocalHub, home: Path) -> dict[str, str]:
    """Variables that lead a fresh process to the Hub, signed in."""
    places = {"HOME": str(home), "HF_HOME": str(home / "huggingface"), "HF_DATASETS_OFFLINE": "0"}
    return {**os.environ, **module_hub.environment(), **places}


@pytest.fixture(scope="module", name="server")
def forking_server(environment: dict[str, str]) -> Iterator[Server]:
    """The process that forks runs, its client led to the Hub by variables alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        server = Server()
    yield server
    server.close()


def settings(home: Path, repo_id: str, **changed: Any) -> Words:
    """Return settings of a training of a second that publishes each fourth step."""
    hub = {"hub__repo_id": repo_id, "hub__push_every": 4, "train__save_every": 4, "train__keep_checkpoints": 9}
    return tiny_run(home / "corpus.jsonl", home / "cache", **(hub | changed))


@pytest.fixture(scope="module", name="published")
def published_run(server: Server, home: Path) -> Ended:
    """A run whose every fourth step, as saved, was published with its training state, and the finished model."""
    words = settings(home, "me/model", hub__include_checkpoints=True, hub__push_every=None)
    ended = server.run("pretrain", words, home / "published", before="hub_children.waiting_for_each_push")
    assert (ended.code, ended.status["push"]) == (0, "done"), ended.stderr
    return ended
