"""Class probabilities for every text, whatever the batch size and the number of processes, and their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hfkit.data.label_batches import Encoded, collate, encode_rows
from hfkit.data.order import EMPTY
from hfkit.loop import to_device
from hfkit.metrics import score_classification
from hfkit.model import find_length, load_pretrained
from hfkit.remote import resolve_model
from hfkit.settings import BadInput
from hfkit.tokenizer import open_tokenizer


@torch.no_grad()
def predict(accelerator: Accelerator, model: PreTrainedModel, encoded: Encoded, batch_size: int) -> np.ndarray:
    """Return class probabilities, (texts, classes) in float64, the same on every process; windows are averaged.

    Args:
        model: Unwrapped (or sharded: every process runs as many passes).
        batch_size: Rows per pass: speed alone.
    """
    training = model.training
    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    order = np.argsort([-len(row) for row in encoded.rows], kind="stable")
    mine = np.concatenate([order, np.full(-len(order) % world, EMPTY)])[rank::world]
    size, pad = int(model.config.num_labels or 0), model.config.pad_token_id
    scores = torch.zeros(len(encoded.rows), size, dtype=torch.float64, device=accelerator.device)
    for begin in range(0, len(mine), batch_size):
        part = mine[begin : begin + batch_size]
        batch = to_device(collate(encoded, np.where(part == EMPTY, order[0], part), pad), accelerator.device)
        with accelerator.autocast():
            logits = model(**batch).logits.double()
        filled = torch.from_numpy(part != EMPTY)
        scores[torch.from_numpy(part)[filled]] = logits.softmax(-1)[filled.to(logits.device)]
    model.train(training)
    by_row = accelerator.reduce(scores, "sum").cpu().numpy()
    by_text = np.zeros((encoded.owner.max() + 1, size))
    np.add.at(by_text, encoded.owner, by_row)
    return by_text / np.bincount(encoded.owner)[:, None]


def score_labels(scores: np.ndarray, labels: Sequence[int], label_names: Sequence[str]) -> dict[str, Any]:
    """Return eval_loss (nats per text) and every figure of `score_classification`."""
    right = scores[np.arange(len(labels)), labels]
    loss = -np.log(np.maximum(right, np.finfo(np.float64).tiny)).mean()
    return {"eval_loss": float(loss), **score_classification(labels, scores, label_names)}


def name_predictions(
    texts: Sequence[str], labels: Sequence[int] | None, scores: np.ndarray, label_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of predictions.jsonl: text, label where it is known, prediction, scores by name."""
    known = [{}] * len(texts) if labels is None else [{"label": label_names[label]} for label in labels]
    return [
        {
            "text": text,
            **label,
            "prediction": label_names[int(row.argmax())],
            "scores": dict(zip(label_names, row.tolist(), strict=True)),
        }
        for text, label, row in zip(texts, known, scores, strict=True)
    ]


def classify_texts(path: str | Path, texts: Sequence[str], revision: str | None = None) -> list[dict[str, Any]]:
    """Classify texts with a model that the sentiment recipe saved: text, prediction, scores of each.

    Args:
        path: Its folder or Hub id.

    Raises:
        BadInput: for an empty text, and where there is no such model, or one without a trained head.
    """
    if any(not text.strip() for text in texts) or not texts:
        raise BadInput("classify: the text is empty")
    folder = resolve_model(path, revision)
    tokenizer = open_tokenizer(folder)
    advice = ", so it is no trained classifier; give a model that the sentiment recipe saved"
    model: Any = load_pretrained(AutoModelForSequenceClassification, folder, f"classify: {folder}", advice)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    encoded = encode_rows(tokenizer, texts, find_length(model.config), getattr(model.config, "long_texts", "head"))
    scores = predict(accelerator, model.to(accelerator.device), encoded, batch_size=32)
    return name_predictions(texts, None, scores, [model.config.id2label[n] for n in range(model.config.num_labels)])
