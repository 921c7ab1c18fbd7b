"""Twenty pairs, and tiny random models of each family of translation models with its own kind of tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForSeq2SeqLM,
    M2M100Config,
    M2M100Tokenizer,
    MarianConfig,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
)

from hfkit.data.pairs import Pair
from hfkit.model import generation_config
from hfkit.settings import TokenizerConfig
from hfkit.tokenizer import add_end, train_tokenizer

SMALL = ("one", "two", "three", "four", "five"), ("eins", "zwei", "drei", "vier", "fünf")
LARGE = ("six", "seven", "eight", "nine"), ("sechs", "sieben", "acht", "neun")
PAIRS = [
    Pair(f"{a} {b} dogs", f"{c} {d} Hunde") for a, c in zip(*SMALL, strict=True) for b, d in zip(*LARGE, strict=True)
]


def marian(width: int) -> dict[str, int]:
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 2 * width}
    return {"d_model": width} | {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sizes.items()}


MARIAN, SIZES = marian(32), marian(16)
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair], TokenizerConfig(vocab_size=320))
    if kind == "seq2seq":
        add_end(tokenizer)
    return tokenizer


WORDS = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz:")]


def train_sentencepiece(folder: Path, specials: list[str]) -> tuple[str, str]:
    """Write a SentencePiece model and its vocabulary; return their paths."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [text for pair in [*PAIRS, Pair("a dog no", "ein hund nein")] for text in pair]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "trained"), vocab_size=40, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "trained.model"))
    names = [*specials, *(pieces.id_to_piece(number) for number in range(3, len(pieces)))]
    (folder / "trained.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    return str(folder / "trained.json"), str(folder / "trained.model")


def save_pretrained(name: str, folder: Path) -> None:
    """Save a tiny random model of a family with its own kind of tokenizer."""
    if name == "m2m100":
        vocabulary, pieces = train_sentencepiece(folder, ["<s>", "<pad>", "</s>", "<unk>"])
        tokenizer: Any = M2M100Tokenizer(vocabulary, pieces)
        size = len(tokenizer) + len(tokenizer.lang_code_to_id) + tokenizer.num_madeup_words
        config: Any = M2M100Config(vocab_size=size, decoder_start_token_id=2, **SIZES)
    elif name == "opus":
        vocabulary, pieces = train_sentencepiece(folder, ["</s>", "<unk>", ">>de<<", ">>fr<<", "<pad>"])
        tokenizer = MarianTokenizer(pieces, pieces, vocabulary, source_lang="en", target_lang="de")
        ids = {"pad_token_id": 4, "eos_token_id": 0, "decoder_start_token_id": 4}
        config = MarianConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **ids, **SIZES)
    elif name in ("mbart", "mbart50"):
        specials = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        tokenizer = (MBartTokenizer if name == "mbart" else MBart50Tokenizer)(vocab=specials + WORDS)
        config = MBartConfig(vocab_size=len(tokenizer), **SIZES)
    elif name == "nllb":
        vocabulary = {
            token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(w for w, _ in WORDS)])
        }
        tokenizer = NllbTokenizer(vocab=vocabulary, merges=[])
        config = M2M100Config(vocab_size=len(tokenizer), decoder_start_token_id=2, **SIZES)
    else:
        tokenizer = make_tokenizer("seq2seq")
        if name == "marian":
            tokenizer.add_special_tokens({"extra_special_tokens": [">>de<<", ">>fr<<"]})
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
        if name == "t5":
            config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **ids)
        else:
            config = MarianConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **ids, **SIZES)
    model = AutoModelForSeq2SeqLM.from_config(config)
    if name in ("t5", "marian"):
        model.generation_config = generation_config(config.vocab_size, tokenizer)
        model.generation_config.decoder_start_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
