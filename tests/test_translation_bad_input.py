"""What can be given wrongly to the translation recipe: one line on stderr, status 2, nothing half-written."""

import json
from pathlib import Path

import pytest

from runs import Server, Words, shared_server
from test_bad_input import Case, assert_nothing_written, assert_refused
from translators import MARIAN, PAIRS, save_pretrained


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A run that would work."""
    folder = tmp_path_factory.mktemp("good")
    rows = "".join(json.dumps({"translation": {"en": s, "de": t}}) + "\n" for s, t in PAIRS)
    (folder / "train.jsonl").write_text(rows)
    return {
        "data.train_files": str(folder / "train.jsonl"),
        "data.sequence_length": 24,
        "tokenizer.vocab_size": 300,
        "model.config_overrides": MARIAN,
        "train.max_steps": 1,
    }


def write_nllb(folder: Path) -> None:
    """Save a tiny model that knows NLLB's languages."""
    save_pretrained("nllb", folder)


def write_pair(folder: Path, english: str, german: str) -> None:
    """Write a file of one pair."""
    (folder / "pairs.jsonl").write_text(json.dumps({"translation": {"en": english, "de": german}}) + "\n")


CASES = [
    Case(
        "missing column",
        {"data.target_key": "fr"},
        ("train.jsonl:1: translation: no column 'fr'", "en, de", "--data.target_key"),
    ),
    Case(
        "empty line to score",
        {"data.test_files": "{}/pairs.jsonl"},
        ("test pair 1: one side is empty",),
        lambda folder: write_pair(folder, "a", " "),
    ),
    Case(
        "nothing but empty lines",
        {"data.train_files": "{}/pairs.jsonl", "data.validation_files": "{}/pairs.jsonl"},
        ("validation pair 1: one side is empty",),
        lambda folder: write_pair(folder, "", "b"),
    ),
    Case(
        "all in the test set",
        {"data.train_files": "{}/pairs.jsonl", "data.test_files": "{}/pairs.jsonl"},
        ("no training pair is left", "contaminated 1"),
        lambda folder: write_pair(folder, "a", "b"),
    ),
    Case("nothing to score", {"data.validation_share": 0.0}, ("nothing to score", "--data.validation_files")),
    Case(
        "targets longer than the model allows",
        {"model.config_overrides": {**MARIAN, "max_position_embeddings": 16}},
        ("data.sequence_length 24", "limit of 16 positions"),
    ),
    Case(
        "unknown language",
        {"model.path": "{}", "model.config_overrides": {}, "data.source_code": "eng_Latn", "data.target_code": "deu"},
        ("data.target_code", "'deu'", "did you mean 'deu_Latn'?", "it knows ace_Arab, ", "zul_Latn"),
        write_nllb,
    ),
    Case("unknown preset", {"model.preset": "huge"}, ("model.preset 'huge'", "tiny, mini, small, base")),
    Case(
        "vocabularies of a causal model",
        {"model.kind": "causal", "model.vocabularies": "separate"},
        ("model.vocabularies separate", "seq2seq"),
    ),
    Case(
        "two vocabularies of one tokenizer",
        {"tokenizer.path": "{}", "model.vocabularies": "separate"},
        ("model.vocabularies separate trains two", "{}"),
    ),
    Case("prompt without text", {"model.prompt": "translate:"}, ("model.prompt", "{{source}}")),
    Case("samples", {"train.sample_every": 5}, ("train.sample_every", "leave it out")),
    Case("stages", {"train.batch_stages": [[2, 2]]}, ("train.batch_stages", "similar lengths")),
    Case(
        "mean of more checkpoints than are kept",
        {"model.average_checkpoints": 5},  # its earlier name
        ("train.average_checkpoints 5", "train.keep_checkpoints is 2"),
    ),
    Case("empty text", {"translate": " "}, ("translate: text 1 is empty",)),
    Case("no model to translate with", {"translate": "one"}, ("run/model: no such folder", "Hub id")),
    Case("a folder without a model", {"translate": "one", "model.path": "{}"}, ("{}", "holds no")),
    Case(
        "a model of another recipe",
        {"translate": "one", "model.path": "{}"},
        ("{}", "not saved by the translation recipe"),
        write_nllb,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_is_one_line_and_status_2(server: Server, settings: Words, tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    case.files(folder)

    def fill(value: object) -> object:
        if not isinstance(value, str):
            return value
        return value.replace("{{", "\0").replace("{}", str(folder)).replace("\0", "{").replace("}}", "}")

    change = {key: fill(value) for key, value in case.change.items()}
    ended = server.run("translation", settings | change, tmp_path / "run")
    assert_refused(ended, *(str(fill(word)) for word in case.words))
    assert_nothing_written(tmp_path / "run")
    assert "translate" not in change or not (tmp_path / "run").exists()  # not even a status: it may be a training's


def test_the_settings_themselves_work(server: Server, settings: Words, tmp_path: Path) -> None:
    ended = server.run("translation", settings, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["evaluated_on"] == "validation"
