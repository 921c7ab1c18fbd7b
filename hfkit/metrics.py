"""Scores of language models, classifiers and translations, each computed once over all predictions.

Three plain functions, with `evaluate.Metric` classes of our own behind them: `evaluate.load` would fetch code from the
network. Intervals are 95 % bootstrap intervals over examples, seeded, so that a repeated evaluation repeats them.
"""

import json
import math
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics.base import Metric as CorpusMetric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import confusion_matrix, matthews_corrcoef, precision_recall_fscore_support

from hfkit.files import write_atomic
from hfkit.settings import BadInput

CALIBRATION_BINS = 15
RESAMPLES = 1000
RESAMPLES_AT_ONCE = 100
SEED = 12345

# Two- and three-letter codes. 13a splits words at spaces and punctuation, so it sees one word a line in these.
BLEU_TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod", "dz", "dzo"), "char"),
}


class LanguageModelScore(evaluate.Metric):
    """Loss per target token, perplexity and bits per byte, from sums over any pieces of the evaluated text."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("nats of target tokens", nats="float64", targets="int64", bytes="int64")

    def _compute(self, nats: list[float], targets: list[int], bytes: list[int]) -> dict[str, Any]:
        total_nats, num_targets, num_bytes = math.fsum(nats), sum(targets), sum(bytes)
        if not num_targets or not num_bytes:
            raise BadInput(f"nothing to score: the evaluation text has {num_targets} targets and {num_bytes} bytes")
        loss = total_nats / num_targets
        return {
            "eval_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) overflows
            "bits_per_byte": total_nats / math.log(2) / num_bytes,
            "eval_tokens": num_targets,
            "eval_bytes": num_bytes,
        }


class ClassificationScore(evaluate.Metric):
    """Accuracy, F1, MCC, calibration and confusion of class probabilities against class numbers."""

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float64"))
        return _describe("class probabilities and class numbers", predictions=scores, references="int64")

    def _compute(
        self, predictions: list[list[float]], references: list[int], label_names: Sequence[str]
    ) -> dict[str, Any]:
        probabilities, labels = np.array(predictions), np.array(references)  # (examples, classes), (examples,)
        predicted = probabilities.argmax(1)
        classes = np.arange(len(label_names))
        confusion = confusion_matrix(labels, predicted, labels=classes)  # (label, prediction)
        per_class = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
        cells = confusion.nonzero()  # at most one an example, however many classes there are
        counts = confusion[cells]
        accuracy, macro_f1 = _accuracy_and_f1(counts, cells, len(classes))
        resampled_accuracy, resampled_f1 = _accuracy_and_f1(_resample_counts(counts), cells, len(classes))
        return {
            "accuracy": float(accuracy),
            "accuracy_interval": _interval(resampled_accuracy),
            "macro_f1": float(macro_f1),
            "macro_f1_interval": _interval(resampled_f1),
            "mcc": float(matthews_corrcoef(labels, predicted)),
            "majority_baseline": float(confusion.sum(1).max() / len(labels)),
            "expected_calibration_error": _calibration_error(probabilities.max(1), predicted == labels),
            "per_class": {
                name: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
                for name, p, r, f, n in zip(label_names, *per_class, strict=True)
            },
            "confusion_matrix": confusion.tolist(),
            "examples": len(labels),
        }


class TranslationScore(evaluate.Metric):
    """Corpus BLEU and chrF2++ with their signatures, one reference a line."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("translations and references", predictions="string", references="string")

    def _compute(self, predictions: list[str], references: list[str], target_language: str) -> dict[str, Any]:
        tokenizer, note = choose_tokenizer(target_language)
        bleu, chrf = BLEU(tokenize=tokenizer), CHRF(word_order=2)
        result = {
            "bleu": bleu.corpus_score(predictions, [references]).score,
            "bleu_interval": _interval(_resample_corpus(bleu, predictions, references)),
            "chrf": chrf.corpus_score(predictions, [references]).score,
            "chrf_interval": _interval(_resample_corpus(chrf, predictions, references)),
            "bleu_signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
            "examples": len(references),
        }
        return result | ({"bleu_note": note} if note else {})


def score_language_model(nats: float, targets: int, bytes: int) -> dict[str, Any]:
    """Return eval_loss (nats per target), perplexity, bits_per_byte, eval_tokens and eval_bytes.

    Args:
        nats: Summed negative log-likelihood of all targets.
        targets: Number of target tokens.
        bytes: UTF-8 bytes of the evaluated text, before tokenization.

    Example:
        >>> score = score_language_model(nats=8 * math.log(2), targets=4, bytes=16)
        >>> round(score["perplexity"], 9), score["bits_per_byte"]
        (4.0, 0.5)
    """
    return _score(LanguageModelScore, nats=[nats], targets=[targets], bytes=[bytes])


def score_classification(
    labels: Sequence[int] | np.ndarray, scores: Sequence[Sequence[float]] | np.ndarray, label_names: Sequence[str]
) -> dict[str, Any]:
    """Return accuracy, macro_f1 and mcc with intervals, baseline, calibration error, per-class figures and confusion.

    Macro-F1 is the mean over the classes that occur among labels or predictions, as in scikit-learn.

    Args:
        labels: Class numbers, one an example.
        scores: Class probabilities, (examples, classes).
        label_names: Name of each class, in the order of `scores`.

    Raises:
        BadInput: if there is no example, or a label is not the number of a class.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if not len(labels):
        raise BadInput("nothing to score: there is no labelled example")
    if scores.shape != (len(labels), len(label_names)):
        raise ValueError(f"scores are {scores.shape}, not ({len(labels)} examples, {len(label_names)} classes)")
    if outside := set(labels.tolist()) - set(range(len(label_names))):
        raise BadInput(f"label {min(outside)} is not the number of a class; the classes are {list(label_names)}")
    return _score(ClassificationScore, predictions=scores, references=labels, label_names=list(label_names))


def score_translation(hypotheses: Sequence[str], references: Sequence[str], target_language: str) -> dict[str, Any]:
    """Return corpus BLEU and chrF2++ with signatures and intervals, as the sacrebleu command has them.

    Args:
        hypotheses: Translations, detokenized, in the order of `references`.
        references: Raw reference translations; a line break inside one counts as a space, as `write_lines` writes it.
        target_language: Code such as de, zh_CN or jpn_Jpan; decides how BLEU cuts words.

    Raises:
        BadInput: if there is nothing to score, or not one hypothesis a reference.
    """
    if not references or len(hypotheses) != len(references):
        raise BadInput(f"cannot score {len(hypotheses)} translations against {len(references)} references")
    lines = {"predictions": [*map(one_line, hypotheses)], "references": [*map(one_line, references)]}
    return _score(TranslationScore, **lines, target_language=target_language)


def choose_tokenizer(target_language: str) -> tuple[str, str]:
    """Return sacrebleu's tokenizer for a language, and what to say where the right one is not installed.

    Example:
        >>> choose_tokenizer("de_DE"), choose_tokenizer("zho_Hans")
        (('13a', ''), ('zh', ''))
    """
    name = BLEU_TOKENIZERS.get(target_language.lower().replace("-", "_").split("_")[0], "13a")
    try:
        BLEU(tokenize=name)
    except (ImportError, RuntimeError):  # sacrebleu turns the missing package into a RuntimeError
        extra = name[:2]
        return "char", f"{name} is not installed, BLEU is over characters; pip install 'sacrebleu[{extra}]' for {name}"
    return name, ""


def one_line(text: str) -> str:
    """Return ``text`` with its line breaks, of any kind, replaced by spaces."""
    return " ".join(text.splitlines())


def write_lines(path: Path, texts: Iterable[str]) -> None:
    """Write one text a line, atomically: what the sacrebleu command scores like `score_translation`."""
    write_atomic(path, "".join(f"{one_line(text)}\n" for text in texts))


def write_predictions(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _score(metric: type[evaluate.Metric], **inputs: Any) -> dict[str, Any]:
    """Compute a metric in memory; evaluate's folders and locks live, and end, in a folder of this call's own."""
    with tempfile.TemporaryDirectory() as folder:
        return metric(keep_in_memory=True, cache_dir=folder, experiment_id=uuid.uuid4().hex).compute(**inputs)


def _describe(description: str, **columns: Any) -> evaluate.MetricInfo:
    features = {name: datasets.Value(kind) if isinstance(kind, str) else kind for name, kind in columns.items()}
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description="", features=datasets.Features(features)
    )


def _accuracy_and_f1(counts: np.ndarray, cells: tuple[np.ndarray, ...], num_classes: int) -> tuple[Any, Any]:
    """Return accuracy and mean F1 of the classes that occur, (…), from the occupied cells of confusion matrices.

    Args:
        counts: Examples in each cell, (…, cells).
        cells: Label and prediction of each cell, each (cells,).
    """
    labelled, predicted = (axis[:, None] == np.arange(num_classes) for axis in cells)  # (cells, classes)
    correct = counts @ (labelled & predicted).astype(np.float64)  # (…, classes)
    occurrences = counts @ (labelled.astype(np.float64) + predicted)  # 2 tp + fp + fn
    f1 = 2 * correct / np.maximum(occurrences, 1)
    return correct.sum(-1) / counts.sum(-1), f1.sum(-1) / (occurrences > 0).sum(-1)


def _resample_counts(counts: np.ndarray) -> np.ndarray:
    """Return the cell counts of resampled data sets, (resamples, cells).

    Examples drawn with replacement fall into cells with the cells' shares as probabilities, so one multinomial draw is
    one resampled data set.
    """
    num_examples = counts.sum()
    return np.random.default_rng(SEED).multinomial(num_examples, counts / num_examples, size=RESAMPLES)


def _resample_corpus(metric: CorpusMetric, hypotheses: list[str], references: list[str]) -> np.ndarray:
    """Return the corpus scores of resampled data sets, (resamples,).

    sacrebleu's own resampling holds every resample's statistics at once: 1 GB at 10,000 lines.
    """
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.float64)
    generator, num_lines = np.random.default_rng(SEED), len(references)
    scores = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = generator.multinomial(num_lines, np.full(num_lines, 1 / num_lines), size=RESAMPLES_AT_ONCE)
        scores += [metric._compute_score_from_stats(sums.tolist()).score for sums in drawn @ statistics]
    return np.array(scores)


def _interval(values: np.ndarray) -> list[float]:
    """Return where the middle 95 % of the values begin and end."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the mean distance between confidence and accuracy over equal-width bins (Guo et al. 2017, eq. 3)."""
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
