"""Metrics against outside judges: scikit-learn, the sacrebleu command line, and figures worked out by hand."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from sklearn import metrics as sklearn_metrics

from hfkit import metrics
from hfkit.files import format_json, write_json
from hfkit.metrics import score_classification, score_language_model, score_translation, write_lines, write_predictions
from hfkit.settings import BadInput
from hfkit.status import as_text

GERMAN = [
    "Ein Mann mit einem orangefarbenen Hut starrt auf etwas.",
    "Fünf Leute in Winterjacken, mit Helmen, stehen im Schnee – Schneemobile im Hintergrund.",
    "Ein Hund läuft (schnell) über 1.000 grüne Wiesen!",
    "Zwei Frauen\nsitzen am Tisch; sie reden.",
    "",
]
HYPOTHESES = [
    "Ein Mann mit orangefarbenem Hut starrt auf etwas.",
    "Fünf Personen in Winterjacken und Helmen stehen im Schnee.",
    "Ein Hund läuft schnell über 1.000 Wiesen!",
    "Zwei Frauen sitzen an einem Tisch\r\nund reden.",
    "Nichts.",
]


def make_predictions(num_examples: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.choice(num_classes, size=num_examples, p=generator.dirichlet(np.ones(num_classes)))
    logits = generator.normal(size=(num_examples, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-12, rel=0)


def test_language_model_score_by_hand() -> None:
    score = score_language_model(nats=300.0, targets=100, bytes=400)
    assert score == {
        "eval_loss": 3.0,
        "perplexity": math.exp(3),
        "bits_per_byte": 0.75 / math.log(2),
        "eval_tokens": 100,
        "eval_bytes": 400,
    }


def test_language_model_score_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="0 targets and 0 bytes"):
        score_language_model(0.0, 0, 0)


def test_a_perplexity_beyond_all_numbers_is_null_in_json(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", score_language_model(8000.0, 10, 10))
    text = (tmp_path / "result.json").read_text()
    assert '"perplexity": null' in text and '"eval_loss": 800.0' in text


@pytest.mark.parametrize(("num_classes", "seed"), [(2, 0), (3, 1), (7, 2)])
def test_classification_equals_scikit_learn(num_classes: int, seed: int) -> None:
    labels, scores = make_predictions(501, num_classes, seed)
    names = [f"class {number}" for number in range(num_classes)]
    result, predicted = score_classification(labels, scores, names), scores.argmax(1)
    assert result["accuracy"] == near(sklearn_metrics.accuracy_score(labels, predicted))
    assert result["macro_f1"] == near(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    assert result["mcc"] == near(sklearn_metrics.matthews_corrcoef(labels, predicted))
    assert result["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    report = sklearn_metrics.classification_report(labels, predicted, target_names=names, output_dict=True)
    for name in names:
        expected = {"examples": "support", "precision": "precision", "recall": "recall", "f1": "f1-score"}
        for ours, theirs in expected.items():
            assert result["per_class"][name][ours] == near(report[name][theirs])
    assert result["majority_baseline"] == np.bincount(labels).max() / 501
    assert result["examples"] == 501


def test_macro_f1_leaves_out_a_class_that_never_occurs() -> None:
    scores = [[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]]
    result = score_classification([0, 1, 1], scores, ["bad", "good", "never"])
    assert result["macro_f1"] == pytest.approx(2 / 3, abs=1e-15)
    assert result["macro_f1"] == sklearn_metrics.f1_score([0, 1, 1], [0, 1, 0], average="macro")
    assert result["per_class"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 0}
    assert result["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_calibration_error_by_hand() -> None:
    # Bin (0.533, 0.6]: 0.6, right. Bin (0.6, 0.667]: 0.62 and 0.66, one right. Bin (0.933, 1]: 1.0, right.
    scores = [[0.6, 0.4], [0.62, 0.38], [0.66, 0.34], [0.0, 1.0]]
    result = score_classification([0, 0, 1, 1], scores, ["no", "yes"])
    assert result["expected_calibration_error"] == near(((1 - 0.6) + abs(0.62 + 0.66 - 1) + 0) / 4)


def test_bootstrap_interval_equals_resampled_examples() -> None:
    labels, scores = make_predictions(400, 3, seed=5)
    predicted, generator = scores.argmax(1), np.random.default_rng(0)
    drawn = generator.integers(400, size=(1000, 400))
    accuracies = (labels == predicted)[drawn].mean(1)
    f1s = [sklearn_metrics.f1_score(labels[rows], predicted[rows], average="macro") for rows in drawn[:300]]
    result = score_classification(labels, scores, ["a", "b", "c"])
    assert result["accuracy_interval"] == pytest.approx(np.quantile(accuracies, [0.025, 0.975]), abs=0.01)
    assert result["macro_f1_interval"] == pytest.approx(np.quantile(f1s, [0.025, 0.975]), abs=0.015)
    assert result == score_classification(labels, scores, ["a", "b", "c"])


def test_label_without_class_is_refused() -> None:
    with pytest.raises(BadInput, match=r"label -1 is not the number of a class; the classes are \['bad', 'good'\]"):
        score_classification([0, -1], [[0.5, 0.5], [0.5, 0.5]], ["bad", "good"])
    with pytest.raises(BadInput, match="no labelled example"):
        score_classification([], np.zeros((0, 2)), ["bad", "good"])


@pytest.mark.parametrize(
    ("language", "hypotheses", "references", "flags"),
    [
        ("de", HYPOTHESES, GERMAN, ["-tok", "13a"]),
        (
            "zho_Hans",
            ["我喜欢机器学习。", "今天 2024 年天气好"],
            ["我很喜欢机器学习。", "今天天气好"],
            ["-tok", "zh"],
        ),
        ("tha_Thai", ["ฉันชอบแมวมาก", "วันนี้ร้อน"], ["ฉันรักแมวมาก", "วันนี้อากาศร้อน"], ["-tok", "char"]),
    ],
)
def test_translation_equals_the_sacrebleu_command(
    tmp_path: Path, language: str, hypotheses: list[str], references: list[str], flags: list[str]
) -> None:
    write_lines(tmp_path / "ref.txt", references)
    write_lines(tmp_path / "hyp.txt", hypotheses)
    command = [sys.executable, "-m", "sacrebleu", "ref.txt", "-i", "hyp.txt", "-m", "bleu", "chrf", *flags]
    command += ["--chrf-word-order", "2", "-w", "10", "--format", "json"]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    bleu, chrf = json.loads(output)
    result = score_translation(hypotheses, references, language)
    assert round(result["bleu"], 10) == bleu["score"]
    assert round(result["chrf"], 10) == chrf["score"]
    assert result["bleu_signature"] == bleu["signature"]
    assert result["chrf_signature"] == chrf["signature"]
    assert 0 < result["bleu"] < 100
    assert result["examples"] == len(references)


def test_translation_interval_agrees_with_sacrebleus_own() -> None:
    generator = np.random.default_rng(0)
    words = ["der", "die", "das", "Hund", "Katze", "läuft", "schläft", "heute", "morgen", "gern", "nicht"]
    references = [" ".join(generator.choice(words, size=12)) for _ in range(200)]
    hypotheses = [" ".join(word if generator.random() < 0.8 else "und" for word in line.split()) for line in references]
    result = score_translation(hypotheses, references, "de")
    low, high = result["bleu_interval"]
    theirs = sacrebleu.BLEU().corpus_score(hypotheses, [references], n_bootstrap=1000)
    assert low < result["bleu"] < high
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert (high + low) / 2 == pytest.approx(theirs._mean, abs=0.15)
    assert result["chrf_interval"][0] < result["chrf"] < result["chrf_interval"][1]


def test_missing_mecab_falls_back_to_characters_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    result = score_translation(["猫が好きです"], ["犬が好きです"], "ja_XX")
    assert "tok:char" in result["bleu_signature"]
    assert result["bleu_note"].startswith("ja-mecab is not installed, BLEU is over characters")
    assert "bleu_note" not in score_translation(["Hallo Welt"], ["Hallo Welt"], "de")


def test_translation_needs_one_hypothesis_a_reference() -> None:
    with pytest.raises(BadInput, match="cannot score 1 translations against 2 references"):
        score_translation(["a"], ["a", "b"], "de")
    with pytest.raises(BadInput, match="cannot score 0 translations"):
        score_translation([], [], "de")


def test_parallel_scores_do_not_clash() -> None:
    def score(number: int) -> float:
        return score_language_model(float(number), 1, 1)["eval_loss"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(score, range(40))) == list(range(40))


def test_nothing_is_left_in_the_home(tmp_path: Path) -> None:
    code = "from hfkit.metrics import score_language_model as s; s(1.0, 1, 1)"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf")}
    environment |= {"PYTHONPATH": str(Path(metrics.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "hf" / "metrics").exists()


def test_predictions_are_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "schön\n", "scores": [0.25, 0.75]}, {"text": "", "scores": []}]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    lines = (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert "schön" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_many_classes_are_a_line_each_in_a_file_and_one_on_the_console() -> None:
    per_class = {str(number): {"f1": 0.1} for number in range(30)}
    table = {"accuracy": 0.5, "confusion_matrix": [[0, 1] * 15] * 30, "per_class": per_class}
    assert format_json(table).count("\n") < 130 and json.loads(format_json(table)) == table
    shown = {"accuracy": 0.5, "confusion_matrix": "30 rows", "per_class": "30 rows"}
    assert json.loads(as_text(table)) == shown
    tricky = {"text": "[ 1,  2 ]", "empty": [], "mixed": [1, "2"], "nested": [[1], {"a": [-1.5, 2e-7]}]}
    assert json.loads(format_json(tricky)) == tricky
