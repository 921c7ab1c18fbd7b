"""Classify texts: labelled rows → a head on a causal model or an encoder → loop → accuracy and F1 → a folder to use.

python recipes/sentiment.py                                           the built-in reviews, minutes on a CPU
python recipes/sentiment.py --model.path runs/pretrain/model --data.train_files 'reviews/*.jsonl' --train.epochs 3
python recipes/sentiment.py --classify "The plot was hardly clever."  with the model of the run before; - reads lines
"""

from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config_or_builtin
from hfkit.settings import (
    AdapterConfig,
    BadInput,
    ClassifierConfig,
    LabelDataConfig,
    ModelConfig,
    RunConfig,
    check_bounds,
)

BUILTIN = Path(__file__).parent / "configs" / "sentiment" / "builtin.yaml"
EPOCHS = 5.0  # where neither epochs nor max_steps are given


@dataclass
class SentimentConfig(RunConfig):
    """Train and score a text classifier with any number of classes."""

    data: LabelDataConfig = field(default_factory=LabelDataConfig)
    """Which labelled texts, and what becomes of long ones."""
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Body, head, class weights."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA on the body instead of training every weight of it; merged into model/."""
    adapt: int = 0
    """Optimizer steps of language modelling on the training texts, before the head is added (causal models)."""
    classify: str | None = None
    """Train nothing: classify this text (or - : each line of standard input) with model.path, or this run's model."""
    output_dir: Path = Path("runs/sentiment")
    """Checkpoints, figures, predictions, report and the final model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.sample_every:
            raise BadInput("train.sample_every: sentiment prints no samples while it trains; leave it out")
        check_bounds("", self, adapt="[0, inf)")
        if self.optim.z_loss:
            raise BadInput(
                "optim.z_loss is for losses over the vocabulary, and a classifier's is not one; leave it out"
            )
        if self.train.max_steps is None and self.train.epochs is None:
            self.train.epochs = EPOCHS

    @property
    def one_shot(self) -> bool:
        """Whether a model is used and none trained."""
        return self.classify is not None


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config_or_builtin(SentimentConfig, BUILTIN)

import json
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from hfkit.adaptation import adapt_model
from hfkit.classification import (
    ClassificationLoss,
    build_classifier,
    compute_class_weights,
    load_classifier_tokenizer,
    note_reading,
)
from hfkit.data.batches import plan_steps
from hfkit.data.label_batches import Encoded, classification_rows, encode_rows
from hfkit.data.labels import Labelled, load_labelled
from hfkit.data.readers import given_texts
from hfkit.facts import Facts
from hfkit.files import digest_of
from hfkit.launch import launch
from hfkit.metrics import write_predictions
from hfkit.prediction import classify_texts, name_predictions, predict, score_labels
from hfkit.run import Run
from hfkit.tokenizer import tokenizer_hash, train_tokenizer


def main(config: SentimentConfig) -> None:
    """Run the whole story, on every process that was launched."""
    if config.one_shot:
        return classify(config)
    data = load_labelled(config.data)
    weights = compute_class_weights(config.model, data.labels["train"], data.label_names)
    body, adapted = choose_body(config, data.training_texts)
    tokenizer = choose_tokenizer(config, body, data.training_texts)
    run = Run(config, describe(config, data, tokenizer), select="macro_f1")

    length, long_texts = config.data.sequence_length, config.data.long_texts
    model = build_classifier(body, tokenizer, data.label_names, config.seed, config.adapter)
    note_reading(model.config, length, long_texts)
    encoded = {split: encode_rows(tokenizer, texts, length, long_texts) for split, texts in data.texts.items()}
    run.say(notes_on(data, encoded, length))

    plan = plan_steps(config.train, len(encoded["train"].rows), length, run.rank, run.world_size)
    module = ClassificationLoss(model, config.model.label_smoothing, config.model.head_learning_rate)
    run.set_up(module, config.optim, plan, tokenizer)
    pad = int(tokenizer.pad_token_id)
    read = classification_rows(encoded["train"], data.labels["train"], weights, plan, config.seed, pad)

    def score(split: str, predictions: Path | None = None) -> dict[str, Any]:
        scores = predict(run.accelerator, run.model, encoded[split], batch_size=64)  # (texts, classes)
        if predictions and run.is_main:
            rows = name_predictions(data.texts[split], data.labels[split], scores, data.label_names)
            write_predictions(predictions, rows)
        return score_labels(scores, data.labels[split], data.label_names)

    def validate(_: nn.Module) -> dict[str, float]:
        figures = score("validation")
        return {name: figures[name] for name in ("eval_loss", "accuracy", "macro_f1")}

    def test(_: nn.Module) -> dict[str, Any]:
        split = "test" if data.test else "validation"
        return {"evaluated_on": split, **score(split, run.output_dir / "predictions.jsonl")}

    run.train(read, validate)
    run.choose_result(validate)
    truncated = {split: texts.truncated for split, texts in encoded.items()}
    extra = {"label_names": data.label_names, "truncated_share": truncated, "adapted": adapted}
    run.finish(test, extra=extra, loader=AutoModelForSequenceClassification)


def choose_body(config: SentimentConfig, texts: list[str]) -> tuple[ClassifierConfig, dict[str, Any] | None]:
    """Return the model to put the head on, adapted to the texts where asked, and what to report of that."""
    if not config.adapt:
        return config.model, None
    if config.model.path:  # one without pad token is refused before anything is trained
        choose_tokenizer(config, config.model, texts)
    folder, report = adapt_model(config, texts)
    return replace(config.model, path=folder, revision=None), report


def choose_tokenizer(config: SentimentConfig, body: ModelConfig, texts: list[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer named, else the body's own, else, for a body from scratch, one trained on the texts."""
    named = config.tokenizer if config.tokenizer.path else body
    if named.path:
        return load_classifier_tokenizer(named.path, named.revision, config.model.pad_token)
    return train_tokenizer(texts, config.tokenizer)


def notes_on(data: Labelled, encoded: dict[str, Encoded], length: int) -> str:
    """Return what is notable of the data, a line each: for the person at the console."""
    long = [f"over {length} tokens: {rows.truncated:.1%} of the {split} texts" for split, rows in encoded.items()]
    return "\n".join(f"Note: {note}." for note in data.notes + long)


def describe(config: SentimentConfig, data: Labelled, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Return what this run is: compared at resume, and written into its passport."""
    splits = {split: {"examples": len(rows), "sha256": digest_of(rows)} for split, rows in data.splits.items()}
    facts = {"splits": splits, "label_names": data.label_names, "unlabelled": len(data.unlabelled)}
    key = digest_of([facts, digest_of(data.unlabelled)])[:16]
    own = {name: value for name, value in asdict(config.model).items() if name not in asdict(ModelConfig())}
    identity = {"adapt": config.adapt, "data.long_texts": config.data.long_texts}
    identity |= {f"model.{name}": value for name, value in own.items()}
    hashed = tokenizer_hash(tokenizer)
    return Facts(key, hashed, identity, {"key": key, **facts}, {"sha256": hashed, "vocab_size": len(tokenizer)})


def classify(config: SentimentConfig) -> None:
    """Print one JSON line for each text: text, prediction, scores."""
    model = config.model.path or config.output_dir / "model"
    for row in classify_texts(model, given_texts(str(config.classify), "classify"), config.model.revision):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    launch(main, config)
