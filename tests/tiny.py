"""Models of a few thousand parameters, one of each family that is pretrained here."""

import functools
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfkit.model import build_causal_lm
from hfkit.settings import ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer

LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("tiny", LLAMA),
    "qwen3": ("qwen3-tiny", {**LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
    "gpt2": ("gpt2-tiny", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
}


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 270 tokens, for which models have 320 ids."""
    return train_tokenizer(["a small text"], TokenizerConfig(vocab_size=270))


def tiny_model(family: str = "llama", *, seed: int = 0, overrides: Any = None, **settings: Any) -> PreTrainedModel:
    """Return a fresh model; ``overrides`` are further fields of its configuration, ``settings`` of ``ModelConfig``."""
    preset, shape = SHAPES[family]
    config = ModelConfig(preset=preset, config_overrides={**shape, **(overrides or {})}, **settings)
    return build_causal_lm(config, tiny_tokenizer(), seed)
