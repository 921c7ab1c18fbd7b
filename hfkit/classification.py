"""Text classification: heads on causal models and encoders, their loss, and probabilities for every text.

A long text becomes one row or several windows; a row weighs its class's weight over its text's windows, so that every
text counts once. The loss is a weighted sum and the count is the sum of the weights: divided by that of the whole step,
the gradient is the same for every split into processes and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from hfkit.adapters import attach_adapter
from hfkit.data.batches import Batch, Reader, Split, Step
from hfkit.data.order import EMPTY, share_of_rank, shuffle
from hfkit.loop import to_device
from hfkit.losses import LossModule
from hfkit.metrics import score_classification
from hfkit.model import add_dropout, build_config, find_length, scale_residual_projections
from hfkit.settings import AdapterConfig, BadInput, ClassifierConfig
from hfkit.tokenizer import open_tokenizer, special_around


@dataclass(frozen=True)
class Encoded:
    """Tokenized texts, each one row or several windows."""

    rows: list[list[int]]
    owner: np.ndarray
    """(rows,) the text that each row belongs to."""
    truncated: float
    """Share of the texts that are longer than a row."""


def load_classifier_tokenizer(config: ClassifierConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``model.path``, with a pad token that is not its end-of-text token.

    Raises:
        BadInput: where there is none and ``model.pad_token`` does not name one: the head reads the last token that is
            not padding.
    """
    tokenizer = open_tokenizer(str(config.path), config.revision)
    if config.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": config.pad_token})
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BadInput(
            f"the tokenizer of {config.path} has no pad token of its own, so the last token of a short row could not "
            "be told; name one, such as --model.pad_token '<|pad|>'"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def build_classifier(
    config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], seed: int = 0
) -> PreTrainedModel:
    """Build a model with a head for the classes, in fp32; what is new in it depends on the seed alone."""
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
        "pad_token_id": tokenizer.pad_token_id,
        "problem_type": "single_label_classification",
    }
    torch.manual_seed(seed)
    if config.path is not None:
        model = _load_with_head(config, labels)
    else:
        shape = build_config(config, tokenizer)
        shape.update(labels)
        model = AutoModelForSequenceClassification.from_config(
            shape, attn_implementation=config.attention, dtype=torch.float32
        )
        scale_residual_projections(model)
    if model.config.vocab_size < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    if config.dropout:
        add_dropout(model, config.dropout)
    if config.lora_rank:
        _add_lora(model, config.lora_rank)
    return model


def _load_with_head(config: ClassifierConfig, labels: dict[str, Any]) -> PreTrainedModel:
    """Load a folder or Hub model; only the head may be new."""
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        shape = AutoConfig.from_pretrained(str(config.path), **source)
        shape.update(labels)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            str(config.path),
            config=shape,
            dtype=torch.float32,
            attn_implementation=config.attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"model.path {config.path}: {' '.join(str(error).split())[:300]}") from None
    model, report = loaded
    head = {id(parameter) for parameter in head_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in head}
    new = [*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])]
    if lacking := sorted(name for name in names.intersection(new) if ".pooler." not in name):
        raise BadInput(f"model.path {config.path} lacks weights: {', '.join(lacking[:3])}")
    return model


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters outside the body, which the task adds."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in body]


def _add_lora(model: PreTrainedModel, rank: int) -> None:
    """Freeze the body and add low-rank updates to its matrices; the head stays trainable."""
    head, body = head_parameters(model), {id(module) for module in model.base_model.modules()}
    matrices = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and id(m) in body]
    attach_adapter(model, AdapterConfig(rank=rank, target_modules=matrices))
    for parameter in head:
        parameter.requires_grad_(True)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, how: str) -> Encoded:
    """Tokenize texts as plain ``tokenizer(text)`` does, and cut the long ones.

    Args:
        length: Tokens of a row at most, special tokens included.
        how: What becomes of longer texts: head, head_tail or windows.
    """
    before, after = special_around(tokenizer)
    room = length - len(before) - len(after)
    rows, owner, long = [], [], 0
    for number, ids in enumerate(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]):
        long += len(ids) > room
        pieces = cut_ids(ids, room, how)
        rows += [before + piece + after for piece in pieces]
        owner += [number] * len(pieces)
    return Encoded(rows, np.array(owner, dtype=np.int64), long / max(1, len(texts)))


def cut_ids(ids: list[int], room: int, how: str) -> list[list[int]]:
    """Return the pieces of a text's tokens that the model sees.

    Head and tail are a quarter and three quarters (Sun et al., 2019, arXiv:1905.05583, section 5.3.1: 128 and 382).

    Example:
        >>> [cut_ids([1, 2, 3, 4, 5, 6], 4, how) for how in ("head", "head_tail", "windows")]
        [[[1, 2, 3, 4]], [[1, 4, 5, 6]], [[1, 2, 3, 4], [5, 6]]]
    """
    if len(ids) <= room:
        return [ids]
    if how == "windows":
        return [ids[start : start + room] for start in range(0, len(ids), room)]
    head = room if how == "head" else room // 4
    return [ids[:head] + ids[len(ids) - (room - head) :]] if head < room else [ids[:room]]


def compute_class_weights(config: ClassifierConfig, labels: Sequence[int], label_names: Sequence[str]) -> np.ndarray:
    """Return the weight of each class, (classes,).

    Raises:
        BadInput: where given weights do not name the classes.
    """
    chosen = config.class_weights
    if isinstance(chosen, dict):
        if set(chosen) != set(label_names):
            raise BadInput(f"model.class_weights must name every class of {list(label_names)}; it names {list(chosen)}")
        return np.array([chosen[name] for name in label_names], dtype=np.float64)
    if chosen == "none":
        return np.ones(len(label_names))
    counts = np.bincount(labels, minlength=len(label_names))
    return len(labels) / len(label_names) / np.maximum(counts, 1)


class ClassificationLoss(LossModule):
    """Weighted, smoothed cross-entropy of one class a row."""

    def __init__(
        self, model: PreTrainedModel, label_smoothing: float = 0.0, head_learning_rate: float | None = None
    ) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing
        if head_learning_rate is not None:
            self.own_rates = [(head_parameters(model), head_learning_rate)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (weighted sum of the rows' losses in nats, sum of the weights).

        Args:
            input_ids: (rows, T), padded on the right.
            attention_mask: (rows, T), 1 where there is a token.
            targets: (rows,) class numbers.
            weights: (rows,) 0 for a row that only fills the batch.
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()  # (rows, classes)
        losses = nn.functional.cross_entropy(
            logits, targets, reduction="none", label_smoothing=self.label_smoothing if self.training else 0.0
        )
        return (losses * weights).sum(), weights.double().sum()


def classification_rows(
    encoded: Encoded,
    labels_of_texts: Sequence[int],
    class_weights: np.ndarray,
    split: Split,
    seed: int,
    *,
    last: int | None,
    pad: int,
) -> Reader:
    """Return step → this process's rows; those of a step are sorted by length, so that little is padding."""
    labels = np.array(labels_of_texts)[encoded.owner]  # (rows,)
    windows = np.bincount(encoded.owner)
    weights = class_weights[labels] / windows[encoded.owner]  # (rows,)
    lengths = np.array([len(row) for row in encoded.rows])

    def read(step: int) -> Step:
        begin = step * split.global_batch_size
        end = begin + split.global_batch_size if last is None else min(begin + split.global_batch_size, last)
        chosen = shuffle(np.arange(begin, end), len(encoded.rows), seed)
        chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
        shares = share_of_rank(np.arange(len(chosen)), split.rank, split.world_size, split.micro_batch_size)
        batches = []
        for slots in shares:
            rows = np.where(slots == EMPTY, chosen[-1], chosen[slots])
            batches.append(
                collate(encoded, rows, pad)
                | {
                    "targets": torch.from_numpy(labels[rows]),
                    "weights": torch.from_numpy(np.where(slots == EMPTY, 0.0, weights[rows])).float(),
                }
            )
        names = ", ".join(map(str, encoded.owner[chosen[:8]]))
        return Step(batches, float(weights[chosen].sum()), int(lengths[chosen].sum()), f"texts {names} …")

    return read


def collate(encoded: Encoded, rows: np.ndarray, pad: int) -> Batch:
    """Return input_ids and attention_mask of rows, padded on the right to the longest."""
    lengths = np.array([len(encoded.rows[row]) for row in rows])
    real = np.arange(max(1, lengths.max()))[None] < lengths[:, None]  # (rows, T)
    ids = np.full(real.shape, pad, dtype=np.int64)
    ids[real] = np.concatenate([encoded.rows[row] for row in rows])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real.astype(np.int64))}


@torch.no_grad()
def predict(accelerator: Accelerator, model: nn.Module, encoded: Encoded, *, batch_size: int, pad: int) -> np.ndarray:
    """Return class probabilities, (texts, classes) in float64, the same on every process; windows are averaged.

    Args:
        model: The transformers model, unwrapped (or sharded: every process runs as many passes).
        batch_size: Rows per pass: speed alone.
    """
    training = model.training
    model.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    order = np.argsort([-len(row) for row in encoded.rows], kind="stable")
    mine = np.concatenate([order, np.full(-len(order) % world, EMPTY)])[rank::world]
    size = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
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


def classify_texts(folder: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Classify texts with a model that the sentiment recipe saved: text, prediction, scores of each.

    Raises:
        BadInput: for a folder without such a model, and for an empty text.
    """
    if any(not text.strip() for text in texts) or not texts:
        raise BadInput("classify: the text is empty")
    tokenizer = open_tokenizer(folder)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder} holds no classifier that loads ({' '.join(str(error).split())[:200]})") from None
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    encoded = encode_texts(tokenizer, texts, find_length(model.config), getattr(model.config, "long_texts", "head"))
    scores = predict(accelerator, model.to(accelerator.device), encoded, batch_size=32, pad=model.config.pad_token_id)
    return name_predictions(texts, None, scores, [model.config.id2label[n] for n in range(model.config.num_labels)])
