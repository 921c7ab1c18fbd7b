"""Text classification: heads on causal models and encoders, class weights, and the loss.

The loss is a weighted sum and its count is the sum of the weights: divided by that of the whole step, the gradient is
the same for every split into processes and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfkit.adapters import attach_adapter
from hfkit.losses import LossModule
from hfkit.model import add_dropout, build_config, build_fresh, loading, scale_residual_projections, set_length
from hfkit.remote import resolve_model
from hfkit.settings import AdapterConfig, BadInput, ClassifierConfig
from hfkit.tokenizer import open_tokenizer


def load_classifier_tokenizer(
    path: str, revision: str | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token that is not its end-of-text token: the head reads the last token before it.

    Raises:
        BadInput: where there is none and ``pad_token`` does not name one.
    """
    tokenizer = open_tokenizer(path, revision)
    if pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BadInput(
            f"the tokenizer of {path} has no pad token of its own, so the last token of a short row could not "
            "be told; name one, such as --model.pad_token '<|pad|>'"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def build_classifier(
    config: ClassifierConfig,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    seed: int = 0,
    adapter: AdapterConfig | None = None,
) -> PreTrainedModel:
    """Build a model with a head for the classes, in fp32; what is new in it depends on the seed alone.

    Args:
        adapter: Where it asks for LoRA, the body is frozen and its matrices get the low-rank updates.
    """
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
        model = build_fresh(AutoModelForSequenceClassification, shape, config.attention)
        scale_residual_projections(model)
    if model.config.vocab_size < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    if config.dropout:
        add_dropout(model, config.dropout)
    if adapter and adapter.rank:
        _adapt_body(model, adapter)
    return model


def _load_with_head(config: ClassifierConfig, labels: dict[str, Any]) -> PreTrainedModel:
    """Load a folder or Hub model; only the head may be new."""
    folder = resolve_model(str(config.path), config.revision)
    source = {"trust_remote_code": config.trust_remote_code}
    with loading(f"model.path {config.path}"):
        shape = AutoConfig.from_pretrained(folder, **source)
        shape.update(labels)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=shape,
            dtype=torch.float32,
            attn_implementation=config.attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source,
        )
    model, report = loaded
    head = {id(parameter) for parameter in head_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in head}
    new = [*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])]
    if lacking := sorted(name for name in names.intersection(new) if ".pooler." not in name):
        raise BadInput(f"model.path {config.path} lacks weights: {', '.join(lacking[:3])}")
    return model


def note_reading(shape: PretrainedConfig, length: int, long_texts: str) -> None:
    """Note in a model's configuration what becomes of texts over ``length`` tokens: `classify_texts` does the same."""
    set_length(shape, length)
    shape.long_texts = long_texts


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters outside the body, which the task adds."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in body]


def _adapt_body(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Freeze the body and put LoRA beside its matrices; the head stays trainable."""
    head, body = head_parameters(model), {id(module) for module in model.base_model.modules()}
    matrices = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and id(m) in body]
    attach_adapter(model, replace(adapter, target_modules=adapter.target_modules or matrices))
    for parameter in head:
        parameter.requires_grad_(True)


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
