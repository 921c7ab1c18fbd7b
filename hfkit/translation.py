"""Translation models: built from scratch or loaded, with their tokenizers, and the loss of their targets.

From scratch an encoder–decoder is Marian's: T5's N(0, 1) embeddings, tied to the output, hardly learn in the first
epochs of a small run (5.2 nats per token where Marian has 3.8). A causal model continues a prompt instead.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MarianConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfkit.codec import TARGET_FOLDER, Codec
from hfkit.data.pairs import Pair
from hfkit.languages import find_prefix, set_languages
from hfkit.losses import TokenLoss
from hfkit.model import (
    build_causal_lm,
    build_fresh,
    check_vocabulary,
    generation_config,
    load_pretrained,
    loading,
    padded_size,
    set_length,
)
from hfkit.remote import resolve_folder, resolve_model
from hfkit.settings import BadInput, DecodingConfig, PairDataConfig, TokenizerConfig, TranslationModelConfig
from hfkit.tokenizer import add_end, load_tokenizer, train_tokenizer

LOADERS = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}


def _marian(width: int, layers: int, heads: int) -> dict[str, int]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }
    return {"d_model": width, "max_position_embeddings": 2048, **sides}


SEQ2SEQ_PRESETS = {
    "tiny": _marian(128, 2, 4),
    "mini": _marian(256, 3, 4),
    "small": _marian(384, 4, 6),
    "base": _marian(512, 6, 8),
}


def choose_tokenizers(
    config: TranslationModelConfig, tokenizer: TokenizerConfig, pairs: Sequence[Pair]
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """Return the tokenizer of both languages and None, or one for each language.

    It is the one named, else the model's own, else, for a model built from scratch, trained on the pairs. A model that
    has a vocabulary for each language keeps its target's.
    """
    named = tokenizer if tokenizer.path else config
    if config.vocabularies == "separate":
        if named.path is not None:
            raise BadInput(f"model.vocabularies separate trains two tokenizers; {named.path} is one: leave either out")
        source, target = (train_tokenizer(texts, tokenizer) for texts in zip(*pairs, strict=True))
        add_end(source)
        add_end(target)
        return source, target
    if named.path is not None:
        chosen = load_tokenizer(named.path, named.revision)
    else:
        chosen = train_tokenizer((text for pair in pairs for text in pair), tokenizer)
    if config.kind == "seq2seq" and config.path is None:
        add_end(chosen)
    if config.kind == "seq2seq" and config.path is not None:
        folder = resolve_folder(config.path, config.revision, weights=False) / TARGET_FOLDER
        return chosen, load_tokenizer(folder) if folder.is_dir() else None
    return chosen, None


def build_codec(
    config: TranslationModelConfig,
    data: PairDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Codec:
    """Return the codec of a model, with the language codes set in its tokenizer and its generation settings.

    Raises:
        BadInput: for a language that a multilingual model does not know, with those that it knows.
    """
    length = data.sequence_length
    source, target = str(data.source_code), str(data.target_code)
    facts: dict[str, Any] = {"kind": config.kind, "source_code": source, "target_code": target, "length": length}
    model.config.translation = facts
    if config.kind == "causal":
        facts |= {"prefix": "", "prompt": config.prompt, "languages": None, "separate": False}
        codec = Codec(tokenizer, "causal", "", config.prompt, length)
        template = len(codec.encode_sources([""])[0][0]) if config.prompt != "{source}" else 0
        set_length(model.config, template + 2 * length)
        return codec
    prefix = config.prefix if config.prefix is not None else find_prefix(tokenizer, model, source, target)
    set_length(model.config, length)
    start, languages = set_languages(tokenizer, model, source, target)
    separate = target_tokenizer is not None
    facts |= {"prefix": prefix, "prompt": "", "languages": languages, "separate": separate}
    return Codec(tokenizer, "seq2seq", prefix, "", length, start, target_tokenizer)


def build_translation_model(
    config: TranslationModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Build the model that ``config`` describes, in fp32, with weights that depend on the seed alone."""
    if config.kind == "causal":
        return build_causal_lm(config, tokenizer, seed)
    if config.path is not None:
        model = _load_seq2seq(config)
        check_vocabulary(model.config.vocab_size, tokenizer, config.path)
        return model
    torch.manual_seed(seed)
    model = build_fresh(AutoModelForSeq2SeqLM, _marian_config(config, tokenizer, target_tokenizer), config.attention)
    model.generation_config = generation_config(model.config.decoder_vocab_size, target_tokenizer or tokenizer)
    model.generation_config.decoder_start_token_id = tokenizer.pad_token_id
    return model


def _marian_config(
    config: TranslationModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> MarianConfig:
    if config.preset not in SEQ2SEQ_PRESETS:
        raise BadInput(f"model.preset {config.preset!r} does not exist for seq2seq; use {', '.join(SEQ2SEQ_PRESETS)}")
    fields: dict[str, Any] = {**SEQ2SEQ_PRESETS[config.preset], **config.config_overrides}
    known = MarianConfig()
    for name in fields:
        if not hasattr(known, name):
            close = get_close_matches(name, vars(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise BadInput(f"model.config_overrides: a marian configuration has no field {name!r}{hint}")
    # Scaled to the width: sqrt(2/5d) (Nguyen and Salazar, 2019, arXiv:1910.05895); embeddings are scaled by sqrt(d).
    fields = {"init_std": math.sqrt(2 / (5 * fields["d_model"])), "scale_embedding": True, **fields}
    if target_tokenizer is not None:
        fields |= {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": padded_size(len(target_tokenizer))}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        built = MarianConfig(
            **{"vocab_size": padded_size(len(tokenizer)), "dropout": config.dropout, **fields},
            **ids,
            decoder_start_token_id=tokenizer.pad_token_id,
            forced_eos_token_id=None,
        )
    except (ValueError, TypeError) as error:
        raise BadInput(f"model.config_overrides: {' '.join(str(error).split())}") from None
    if built.vocab_size < len(tokenizer):
        raise BadInput(f"model vocab_size {built.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens")
    return built


def _load_seq2seq(config: TranslationModelConfig) -> PreTrainedModel:
    """Load an encoder–decoder in fp32; a weight that the folder lacks is an error."""
    folder, name = resolve_model(str(config.path), config.revision), f"model.path {config.path}"
    with loading(name):
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    dropout = "dropout_rate" if hasattr(shape, "dropout_rate") else "dropout"  # T5's word, everybody else's
    options: dict[str, Any] = {dropout: config.dropout} if config.dropout else {}
    return load_pretrained(
        AutoModelForSeq2SeqLM,
        folder,
        name,
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
        **options,
    )


def set_decoding(
    model: PreTrainedModel, codec: Codec, decoding: DecodingConfig, saved: bool = False
) -> dict[str, int | float]:
    """Write the search into the model's generation settings, so that plain ``generate`` translates as we do.

    Args:
        saved: What ``decoding`` leaves open stays as the model was saved with it.

    Returns:
        num_beams, length_penalty and max_new_tokens, as they are now.
    """
    own: Any = model.generation_config
    default = DecodingConfig(num_beams=5, length_penalty=1.0, max_new_tokens=codec.length)
    known: dict[str, Any] = {}
    for name in ("num_beams", "length_penalty", "max_new_tokens"):
        values = [getattr(each, name) for each in ([decoding, own, default] if saved else [decoding, default])]
        known[name] = next(value for value in values if value is not None)
    own.num_beams, own.do_sample, own.early_stopping = known["num_beams"], False, known["num_beams"] > 1
    own.length_penalty = known["length_penalty"] if known["num_beams"] > 1 else 1.0
    own.max_new_tokens, own.max_length = known["max_new_tokens"], None
    own.pad_token_id = codec.writer.pad_token_id
    own.eos_token_id = codec.writer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    return known


class TranslationLoss(TokenLoss):
    """Smoothed cross-entropy of the targets' tokens; in evaluation it is not smoothed."""

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (summed loss in nats, number of targets).

        Args:
            input_ids: (rows, S) sources; for a causal model prompts with their targets, padded on the right.
            targets: (rows, T), shifted already; ``IGNORE_INDEX`` where no loss is taken.
            attention_mask: (rows, S); a causal model needs none, since padding is on the right.
            decoder_input_ids: (rows, T) the target one step before.
        """
        inputs = {"input_ids": input_ids}
        if attention_mask is not None and decoder_input_ids is not None:
            inputs |= {"attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        return self.score(inputs, targets)
