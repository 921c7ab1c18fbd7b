"""The sentiment recipe as a user runs it: what it leaves, on two processes too, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hfkit.prediction import classify_texts
from hfkit.settings import BadInput, TokenizerConfig
from hfkit.tokenizer import train_tokenizer
from runs import ROOT, Ended, Server, Words, command_line, shared_server
from test_bad_input import assert_nothing_written, assert_refused

WORDS = {"bad": ("sad", "poor"), "fair": ("plain", "usual"), "good": ("fine", "great")}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
Rows = list[tuple[str | None, str | int | None]]


def write_rows(path: Path, rows: Rows, label_column: str = "label") -> str:
    """Write texts and labels as JSON Lines; return the path."""
    path.write_text("".join(json.dumps({"text": text, label_column: label}) + "\n" for text, label in rows))
    return str(path)


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A run of a second on three classes, with adaptation, long texts, and 37 labelled rows of 42."""
    folder = tmp_path_factory.mktemp("rows")
    rows: Rows = [
        (f"a {w} thing number {n} {'and so on ' * (n % 3)}", k) for k, ws in WORDS.items() for w in ws for n in range(6)
    ]
    rows += [("it is a great deal", "good"), *((f"who knows {number}", None) for number in range(5))]
    parts = {"train": rows, "validation": rows[:36:3], "test": rows[1:36:5]}
    files = {f"data.{name}_files": write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()}
    return files | {
        "data.cache_dir": folder / "cache",
        "data.sequence_length": 16,
        "data.long_texts": "head_tail",
        "tokenizer.vocab_size": 280,
        "model.config_overrides": {**SHAPE, "num_key_value_heads": 2},
        "model.head_learning_rate": 5e-3,
        "model.class_weights": "balanced",
        "model.label_smoothing": 0.1,
        "train.max_steps": 6,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.eval_every": 2,
        "train.save_every": 4,
        "train.log_every": 1,
        "adapt": 2,
    }


@pytest.fixture(scope="module")
def finished(server: Server, settings: Words, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that ended."""
    ended = server.run("sentiment", settings, tmp_path_factory.mktemp("finished") / "run")
    assert ended.code == 0, ended.stderr
    return ended


def result_of(ended: Ended) -> dict:
    """Return result.json."""
    return json.loads((ended.output_dir / "result.json").read_text())


def predictions_of(ended: Ended) -> list[dict]:
    """Return the rows of predictions.jsonl."""
    return [json.loads(line) for line in (ended.output_dir / "predictions.jsonl").read_text().splitlines()]


def test_the_best_step_becomes_the_result(finished: Ended) -> None:
    scores = {line["step"]: line["macro_f1"] for line in finished.metrics if "macro_f1" in line}
    result = result_of(finished)
    assert list(scores) == [2, 4, 6]
    assert result["best_macro_f1"] == max(scores.values()) == scores[result["best_step"]]
    assert result["adapted"]["steps"] == 2 and result["adapted"]["texts"] == 42
    assert result["adapted"]["eval_loss_after"] < result["adapted"]["eval_loss_before"]
    assert result["truncated_share"]["train"] > 0.2 and "over 16 tokens: " in finished.stderr


def test_plain_transformers_elsewhere_gives_the_scores_of_the_run(finished: Ended, tmp_path: Path) -> None:
    rows = predictions_of(finished)
    short = [row for row in rows if "and so on" not in row["text"]]  # a pipeline knows nothing of head and tail
    program = (
        "import json, sys; from transformers import pipeline\n"
        "classify = pipeline('text-classification', sys.argv[1], top_k=None, device='cpu')\n"
        "assert 'hfkit' not in sys.modules; print(json.dumps(classify(json.load(sys.stdin))))"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    texts = json.dumps([row["text"] for row in short])
    words = [sys.executable, "-c", program, str(finished.output_dir / "model")]
    done = subprocess.run(words, input=texts, capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == len(short) >= 2
    for row, answer in zip(short, answers, strict=True):
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(row["scores"], abs=1e-6)


def test_figures_are_those_of_the_predictions(finished: Ended) -> None:
    rows, result = predictions_of(finished), result_of(finished)
    truth, said = [row["label"] for row in rows], [row["prediction"] for row in rows]
    assert result["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"), abs=1e-12)
    assert result["mcc"] == pytest.approx(matthews_corrcoef(truth, said), abs=1e-12)
    assert result["examples"] == len(rows) == 7 and result["evaluated_on"] == "test"
    assert result["label_names"] == list(WORDS)
    assert [row["text"] for row in rows] == [f"a {w} thing number {n} {'and so on ' * (n % 3)}" for w, n in (
        ("sad", 1), ("poor", 0), ("poor", 5), ("plain", 4), ("usual", 3), ("fine", 2), ("great", 1))]  # fmt: skip


def test_texts_are_classified_from_the_saved_folder(finished: Ended) -> None:
    rows = predictions_of(finished)
    for row, answer in zip(rows, classify_texts(finished.output_dir / "model", [r["text"] for r in rows]), strict=True):
        assert answer["prediction"] == row["prediction"]
        assert answer["scores"] == pytest.approx(row["scores"], abs=1e-6)
    with pytest.raises(BadInput, match="the text is empty"):
        classify_texts(finished.output_dir / "model", [" "])
    with pytest.raises(BadInput, match="no such folder"):
        classify_texts(finished.output_dir / "elsewhere", ["text"])


def test_a_warm_up_longer_than_the_adaptation_is_the_runs(server: Server, settings: Words, tmp_path: Path) -> None:
    ended = server.run("sentiment", settings | {"optim.warmup_steps": 5}, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert result_of(ended)["adapted"]["steps"] == 2


def test_a_model_without_a_trained_head_classifies_nothing(server: Server, tmp_path: Path) -> None:
    save_causal(tmp_path)
    ended = server.run("sentiment", {"classify": "a thing", "model.path": str(tmp_path)}, tmp_path / "run")
    assert_refused(ended, f"classify: {tmp_path} lacks weights: score.weight", "no trained classifier")


def test_classify_prints_a_line_for_each_text(server: Server, finished: Ended, tmp_path: Path) -> None:
    given = {"classify": "a fine thing", "model.path": str(finished.output_dir / "model")}
    ended = server.run("sentiment", given, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    row = json.loads(ended.stdout)
    assert row["text"] == "a fine thing" and row["prediction"] in WORDS
    assert sum(row["scores"].values()) == pytest.approx(1)
    assert not (tmp_path / "run").exists()


def test_the_same_command_again_repeats_the_result(server: Server, settings: Words, finished: Ended) -> None:
    before = result_of(finished)
    (finished.output_dir / "result.json").unlink()
    again = server.run("sentiment", settings, finished.output_dir)
    assert again.code == 0, again.stderr
    after = result_of(again)
    assert after.pop("finished") and before.pop("finished")
    assert after == before
    assert again.metrics == finished.metrics


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(settings: Words, finished: Ended, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    given = settings | {"output_dir": tmp_path / "run", "data.cache_dir": tmp_path / "cache"}
    words = [
        *launcher,
        "--config_file",
        "accelerate_configs/cpu_2proc.yaml",
        "recipes/sentiment.py",
        *command_line(given),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    two = Ended(0, done.stdout, done.stderr, tmp_path / "run")
    assert len(two.metrics) == len(finished.metrics) == 6 + 3
    for mine, theirs in zip(two.metrics, finished.metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    for mine, theirs in zip(predictions_of(two), predictions_of(finished), strict=True):
        assert mine["text"] == theirs["text"]
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)


def save_causal(folder: Path) -> None:
    """Save a GPT-2 whose tokenizer has no pad token of its own."""
    tokenizer = train_tokenizer(["some text"], TokenizerConfig(vocab_size=262))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, **ids)
    GPT2LMHeadModel(shape).save_pretrained(folder)


def save_encoder(folder: Path) -> None:
    """Save a BERT."""
    tokenizer = train_tokenizer(["some text"], TokenizerConfig(vocab_size=262))
    tokenizer.save_pretrained(folder)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)


GOOD: Rows = [("so fine", "good"), ("so sad", "bad"), ("a fine day", "good"), ("a sad day", "bad")]


@pytest.mark.parametrize(
    ("change", "words", "prepare"),
    [
        pytest.param({"data.label_column": "stars"}, ("train.jsonl:1: no column 'stars'", "text, label"), None,
                     id="no label column"),
        pytest.param({"data.train_files": "{}/one.jsonl"}, ("two classes or more", "all 2 are 'good'"),
                     lambda folder: write_rows(folder / "one.jsonl", GOOD[::2]), id="one class"),
        pytest.param({"data.validation_files": "{}/new.jsonl"}, ("new.jsonl:2: label 'odd' does not occur", "good"),
                     lambda folder: write_rows(folder / "new.jsonl", [GOOD[0], ("so odd", "odd")]), id="new label"),
        pytest.param({"data.train_files": "{}/gap.jsonl"}, ("gap.jsonl:5: text: the text is empty",),
                     lambda folder: write_rows(folder / "gap.jsonl", [*GOOD, (" ", "good")]), id="empty text"),
        pytest.param({"data.train_files": "{}/null.jsonl"}, ("null.jsonl:5",),
                     lambda folder: write_rows(folder / "null.jsonl", [*GOOD, (None, "good")]), id="no text"),
        pytest.param({"model.path": "{}"}, ("no pad token of its own", "--model.pad_token"), save_causal,
                     id="no pad token"),
        pytest.param({"model.path": "{}", "adapt": 2}, ("no pad token of its own", "--model.pad_token"), save_causal,
                     id="no pad token, adapted"),
        pytest.param({"model.path": "{}", "adapt": 2}, ("adapt", "is an encoder (bert)"), save_encoder,
                     id="adapted encoder"),
        pytest.param({"model.path": "{}", "data.sequence_length": 600}, ("600", "limit of 512 positions"),
                     save_encoder, id="longer than the positions"),
        pytest.param({"model.class_weights": {"good": 2}}, ("must name every class", "bad"), None,
                     id="a class without weight"),
        pytest.param({"model.label_smoothing": 1.0}, ("model.label_smoothing must lie in [0, 1)",), None,
                     id="label smoothing"),
        pytest.param({"optim.z_loss": 1e-4}, ("optim.z_loss", "vocabulary", "leave it out"), None, id="z-loss"),
        pytest.param({"train.sample_every": 5}, ("train.sample_every", "leave it out"), None, id="samples"),
        pytest.param({"classify": " "}, ("classify: text 1 is empty",), None, id="nothing to classify"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    server: Server, tmp_path: Path, change: Words, words: tuple[str, ...], prepare: Callable[[Path], object] | None
) -> None:
    given = {f"data.{name}_files": write_rows(tmp_path / f"{name}.jsonl", GOOD) for name in ("train", "validation")}
    if prepare is not None:
        prepare(tmp_path)
    given |= {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in change.items()}
    ended = server.run("sentiment", given | {"tokenizer.vocab_size": 280}, tmp_path / "run")
    assert_refused(ended, *words)
    assert_nothing_written(tmp_path / "run")
