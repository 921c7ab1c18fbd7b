"""Models: presets built from scratch through transformers' own classes, or folders and Hub models to go on from.

Nothing here defines an architecture. What is ours: shapes that are known to train well, an initialisation that suits
small widths, dropout where the architecture has none, and the checks that make a wrong model fail early.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hfkit.attention import isolation_mask, sliding_window
from hfkit.remote import resolve_model
from hfkit.settings import BadInput, ModelConfig


def _llama(hidden: int, layers: int, heads: int, inner: int, kv_heads: int | None = None, tied: bool = True) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 2048,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 2048, **dropout}


def _qwen3(hidden: int, layers: int, heads: int, inner: int, kv_heads: int, head_dim: int) -> dict:
    shape = _llama(hidden, layers, heads, inner, kv_heads)
    return {**shape, "model_type": "qwen3", "head_dim": head_dim}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _llama(128, 4, 4, 352),
    "mini": _llama(256, 6, 8, 688),
    "small": _llama(384, 8, 6, 1024),
    "base": _llama(768, 12, 12, 2048),
    "medium": _llama(1024, 24, 16, 2816),
    "large": _llama(2048, 22, 32, 5632, kv_heads=4, tied=False),
    "xl": _llama(2048, 28, 16, 6144, kv_heads=8, tied=False),
    "gpt2-tiny": _gpt2(128, 4, 4),
    "gpt2": _gpt2(768, 12, 12),
    "qwen3-tiny": _qwen3(128, 4, 4, 352, kv_heads=2, head_dim=32),
    "qwen3-base": _qwen3(768, 12, 12, 2048, kv_heads=4, head_dim=64),
    "qwen3-large": _qwen3(1536, 28, 16, 4608, kv_heads=8, head_dim=128),
}

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")  # what a block adds to the stream
# Families that count positions from behind the padding's id: so many of their positions hold no token.
COUNTED_AFTER_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
VOCABULARY_MULTIPLE = 64  # matrix products run fastest when the vocabulary is a multiple of this


def padded_size(vocab_size: int) -> int:
    """Return ``vocab_size`` rounded up to a multiple of 64.

    Example:
        >>> padded_size(65), padded_size(128)
        (128, 128)
    """
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def build_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the transformers configuration of a preset, with the user's overrides and the tokenizer's ids."""
    if config.preset not in PRESETS:
        raise BadInput(f"model.preset {config.preset!r} does not exist; there are {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    fields = {**preset, **config.config_overrides}
    for name, value in fields.items():
        if type(preset.get(name)) is int and value is not None and (type(value) is not int or value < 1):
            raise BadInput(f"model.config_overrides: {name} must be a whole number of at least 1, not {value!r}")
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise BadInput(f"model.config_overrides: transformers has no model_type {model_type!r}")
    known = AutoConfig.for_model(model_type)
    for name in fields:
        if not hasattr(known, name):
            close = get_close_matches(name, [*vars(known), *known.attribute_map], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise BadInput(f"model.config_overrides: a {model_type} configuration has no field {name!r}{hint}")
    fields.setdefault("vocab_size", padded_size(len(tokenizer)))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _buildable():
        if "head_dim" in vars(known) and "head_dim" not in fields:
            fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        built = AutoConfig.for_model(model_type, **fields, **ids)
        # Scaled to the width: sqrt(2/5d) (Nguyen and Salazar, 2019, arXiv:1910.05895); 0.02 suits d ≈ 1000 only.
        if "initializer_range" not in config.config_overrides:
            built.initializer_range = math.sqrt(2 / (5 * built.hidden_size))
    heads = built.num_attention_heads
    if heads % (groups := getattr(built, "num_key_value_heads", None) or heads):
        raise BadInput(
            f"model.config_overrides: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        )
    if built.vocab_size < len(tokenizer):
        raise BadInput(f"model vocab_size {built.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens")
    return built


@contextmanager
def _buildable() -> Iterator[None]:
    """Turn what transformers and torch say of fields that make no model into bad input."""
    try:
        yield
    except (ArithmeticError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        cause = error.__cause__ or error  # the strict dataclass wraps what a configuration checks
        said = f"transformers knows no {cause}" if isinstance(cause, KeyError) else str(cause)
        raise BadInput(f"model.config_overrides: {' '.join(said.split())[:300]}") from None


def build_fresh(auto: Any, shape: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Return a model of a shape with fresh weights, in fp32.

    Args:
        auto: One of transformers' ``AutoModelFor…`` classes.

    Raises:
        BadInput: for a shape of which transformers cannot build a model.
    """
    with _buildable():
        return auto.from_config(copy.deepcopy(shape), attn_implementation=attention, dtype=torch.float32)


def build_causal_lm(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """Build the causal model that ``config`` describes, in fp32, with weights that depend on the seed alone."""
    if config.path is not None:
        model = load_causal_lm(config)
    else:
        torch.manual_seed(seed)
        model = build_fresh(AutoModelForCausalLM, build_config(config, tokenizer), config.attention)
        scale_residual_projections(model)
    check_vocabulary(model.config.vocab_size, tokenizer, config.path)
    model.config.use_cache = False  # with a cache, transformers drops the isolation of packed documents
    model.generation_config = generation_config(model.config.vocab_size, tokenizer)
    if config.dropout:
        add_dropout(model, config.dropout)
    return model


def load_causal_lm(config: ModelConfig) -> PreTrainedModel:
    """Load a causal model in fp32; a weight that the folder lacks is an error, not a fresh random one."""
    folder = resolve_model(str(config.path), config.revision)
    return load_pretrained(
        AutoModelForCausalLM,
        folder,
        f"model.path {config.path}",
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


def load_pretrained(loader: Any, folder: Path, name: str, advice: str = "", **options: Any) -> PreTrainedModel:
    """Load a whole model in fp32 with one of transformers' Auto classes.

    Args:
        name: What a complaint calls it.
        advice: What a complaint about missing weights says to do.
        options: Further arguments of ``from_pretrained``.

    Raises:
        BadInput: if it does not load, or the folder lacks weights, which transformers would draw at random.
    """
    with loading(name):
        model, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise BadInput(f"{name} lacks weights: {', '.join(missing[:3])}{advice}")
    return model


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for a folder that does not load into one line about ``name``."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of new and unused weights: those that matter are refused in a line
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise BadInput(f"{name} does not load: {' '.join(str(error).split())[:300]}") from None
    finally:
        logging.set_verbosity(verbosity)


def check_vocabulary(size: int, tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Raise BadInput where a tokenizer gives ids for which a loaded model's vocabulary of ``size`` has no row."""
    if size < len(tokenizer):
        raise BadInput(
            f"the tokenizer has {len(tokenizer)} tokens and {path} only {size}: use the model's own tokenizer"
        )


def scale_residual_projections(model: PreTrainedModel) -> None:
    """Divide what each block adds to the residual stream by sqrt(2 · blocks), so that its variance does not grow.

    (Radford et al., 2019, GPT-2, section 2.3.)
    """
    factor = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(RESIDUAL_PROJECTIONS) and model.config.model_type != "gpt2":  # gpt2 does this by itself
                parameter.mul_(factor)


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Drop embeddings and what each block adds to the residual stream, in training only.

    Llama-style models have no such dropout of their own; it is added as hooks, so the saved model has none.
    """

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention returns (output, weights)
            return functional.dropout(output[0], rate, module.training), *output[1:]
        return functional.dropout(output, rate, module.training)

    model.get_input_embeddings().register_forward_hook(drop)
    branches = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "mlp")]
    if not branches:
        raise BadInput(f"model.dropout: the blocks of a {model.config.model_type} model are not known here")
    for branch in branches:
        branch.register_forward_hook(drop)


def generation_config(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return settings under which plain ``generate`` ends at EOS and never gives an id that has no token."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(range(len(tokenizer), vocab_size)) or None,
        max_new_tokens=256,
    )


def check_isolation(model: PreTrainedModel, length: int) -> None:
    """Change one packed document and see that its neighbour's logits do not move.

    Which mask an installed transformers really applies depends on its version, the cache and the architecture: this
    costs milliseconds at start-up and stops a run whose documents would read each other.

    Raises:
        BadInput: where they would, and where rows of ``length`` are longer than a sliding window and ``eager``
            attention, which takes one mask for all layers, would let sliding layers see past it.
    """
    window = sliding_window(model.config)
    if window and window < length and model.config._attn_implementation == "eager":
        raise BadInput(
            f"model.attention eager does not keep this model's sliding window of {window} tokens in packed rows of "
            f"{length}; use sdpa, or data.sequence_length {window}"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 12), generator=generator)
    changed = ids.clone()
    changed[0, :6] = (changed[0, :6] + 1) % model.config.vocab_size
    positions = torch.tensor([[*range(6), *range(6)]])
    mask = isolation_mask(positions, model.config._attn_implementation)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            model(
                x.to(device), attention_mask=mask.to(device), position_ids=positions.to(device), use_cache=False
            ).logits
            for x in (ids, changed)
        ]
    model.train(training)
    moved = (logits[0] - logits[1]).abs()
    if moved[0, 6:].max() > 1e-4 or moved[0, :6].max() == 0:
        raise BadInput(
            f"documents packed into one row are not isolated in this {model.config.model_type} model "
            f"(neighbour's logits moved by {moved[0, 6:].max():.1e}); set --model.attention eager"
        )


@dataclass(frozen=True)
class Size:
    """Counts of a model's parameters."""

    parameters: int
    """All, a tied embedding once."""
    matrix: int
    """In matrix products of the forward pass: all but the input embedding; the output head once, tied or not."""


def count_parameters(model: PreTrainedModel) -> Size:
    """Count parameters."""
    total = sum(p.numel() for p in model.parameters())
    embedding: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    positions = sum(p.numel() for n, p in model.named_parameters() if n.endswith("wpe.weight"))
    return Size(total, total - positions - (0 if tied else embedding.weight.numel()))


def flops_per_token(model: PreTrainedModel, length: int) -> int:
    """Return the floating-point operations of one token's forward and backward pass.

    6 · matrix parameters + 12 · layers · heads · head size · length (Chowdhery et al., 2022, PaLM, appendix B).
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * length
    return 6 * count_parameters(model).matrix + attention


def set_length(model_config: PretrainedConfig, length: int) -> None:
    """Note the training length in the configuration, whence ``score.py`` takes it.

    Raises:
        BadInput: where sequences would be longer than the model's positions.
    """
    limit = positions_of(model_config)
    if limit is not None and length > limit:
        raise BadInput(f"data.sequence_length {length} is over the model's limit of {limit} positions")
    model_config.training_sequence_length = length


def positions_of(model_config: PretrainedConfig) -> int | None:
    """Return how many tokens the model's positions hold; None where nothing bounds them."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and model_config.model_type in COUNTED_AFTER_PADDING:
        return limit - model_config.pad_token_id - 1
    return limit


def find_length(model_config: PretrainedConfig) -> int:
    """Return the length that the model was trained on; 1024, or all its positions, where it does not say."""
    return getattr(model_config, "training_sequence_length", None) or min(positions_of(model_config) or 1024, 1024)
