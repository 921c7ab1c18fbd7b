"""The passport says what made a result, and its public form says nothing about the machine's owner."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from hfkit import passport as passport_module
from hfkit.passport import public_passport, write_passport

TOKEN = "hf_" + "PlantedPlantedPlanted123"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home folder with a corpus in it."""
    home = tmp_path / "lovelace"
    (home / "my data").mkdir(parents=True)
    (home / "my data" / "corpus.txt").write_text("some text")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("getpass.getuser", lambda: "lovelace")
    monkeypatch.setattr("socket.gethostname", lambda: "analytical-engine")
    monkeypatch.setenv("HF_TOKEN", "0123456789secret")
    return home


def test_passport_names_versions_hardware_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/pretrain.py", "--seed", "7"])
    returned = write_passport(tmp_path, data={"key": "abc"}, tokenizer={"sha256": "d" * 64}, seed=7)
    written = json.loads((tmp_path / "passport.json").read_text())
    assert written == returned
    assert written["command"] == ["recipes/pretrain.py", "--seed", "7"]
    assert (written["seed"], written["data"], written["tokenizer"]) == (7, {"key": "abc"}, {"sha256": "d" * 64})
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["versions"]) == {"python", "hfkit", *passport_module.PACKAGES}
    assert written["hardware"]["cores"] >= 1 and written["hardware"]["memory"] > 1 << 28


def test_resumed_run_keeps_its_earlier_sessions(tmp_path: Path) -> None:
    write_passport(tmp_path, data={}, tokenizer={}, seed=0)
    write_passport(tmp_path, data={}, tokenizer={}, seed=0, resumed_from=100, num_processes=2)
    sessions = json.loads((tmp_path / "passport.json").read_text())["sessions"]
    assert [(session["resumed_from"], session["num_processes"]) for session in sessions] == [(None, 1), (100, 2)]
    write_passport(tmp_path, data={}, tokenizer={}, seed=0)
    assert len(json.loads((tmp_path / "passport.json").read_text())["sessions"]) == 1


def test_passport_holds_no_planted_secret(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["run.py", f"--hub.token={TOKEN}", "--x", TOKEN, "--note", "0123456789secret", "--api_key", "short"]
    monkeypatch.setattr(sys, "argv", command)
    data = {"url": f"https://lovelace:pass@example.org/{TOKEN}"}
    written = write_passport(tmp_path, data=data, tokenizer={}, seed=0)
    assert written["command"] == ["run.py", "--hub.token=***", "--x", "***", "--note", "***", "--api_key", "***"]
    assert written["data"] == {"url": "https://***@example.org/***"}


def test_public_passport_shows_file_names_and_hashes_instead_of_paths(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = home / "my data" / "corpus.txt"
    sha = hashlib.sha256(b"some text").hexdigest()
    unread = {"path": "/mnt/big.txt", "sha256": "e" * 64}
    arguments = [
        "--data.train_files",
        str(corpus),
        f"--files=[/mnt/big.txt,{home}/gone.txt]",
        "--output_dir=~/runs/1",
        "/mnt/a b/c",
    ]
    monkeypatch.setattr(sys, "argv", [str(home / "recipes" / "pretrain.py"), *arguments])
    data = {"files": [unread], str(home): "lovelace on analytical-engine", "dataset": "roneneldan/TinyStories"}
    passport = write_passport(tmp_path, data=data, tokenizer={"path": f"{home}/tok"}, seed=0)
    public = public_passport(passport)
    assert public["command"] == [
        "pretrain.py",
        "--data.train_files",
        f"corpus.txt (sha256 {sha})",
        f"--files=[big.txt (sha256 {'e' * 64}),gone.txt]",
        "--output_dir=1",
        "c",
    ]
    assert set(public["sessions"][0]) == {"started", "command", "resumed_from", "num_processes"}
    assert public["data"] == {
        "files": [{"path": "big.txt", "sha256": "e" * 64}],
        "…": "… on …",
        "dataset": "roneneldan/TinyStories",
    }
    assert public["tokenizer"] == {"path": "tok"}
    assert public["versions"] == passport["versions"]
    text = json.dumps(public)
    for private in ("/mnt", "/home", str(tmp_path), "lovelace", "analytical-engine", "my data", "secret"):
        assert private not in text


def test_public_passport_does_not_rely_on_the_private_one_being_masked(home: Path) -> None:
    assert public_passport({"command": ["x", TOKEN]}) == {"command": ["x", "***"]}
