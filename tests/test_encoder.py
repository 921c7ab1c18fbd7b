"""Fast encoding: the same ids as the tokenizer's own, and the plain path wherever that is not certain."""

import random
import sysconfig
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hfkit import encoder
from hfkit.encoder import Encoder, FastPathDiffers, build_fast
from hfkit.settings import TokenizerConfig
from hfkit.tokenizer import SPECIAL_TOKENS, encode_documents, train_tokenizer

HARD = [
    "",
    "emoji 😀👩‍👩‍👧 flags 🇩🇪, é vs e\u0301, 天地玄黃 これは猫 한국어 ไทย",
    "  two  spaces\t\ttabs\r\n\r\nlines \n \n\n  end  ",
    "<|endoftext|> <|pad|><|user|>x<|end|> are text",
    "1234567 3.14159 don't I'LL WE'VE \u00a0nbsp\u2028line \x85 next \ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ------------------------ ================",
    "x" * 5000 + "\u0000\u0001\x1b[31m",
]


def sources(count: int) -> list[str]:
    """Return source files of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text("utf-8") for path in paths[:count]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as `prepare` trains it, on code."""
    return train_tokenizer(sources(25), TokenizerConfig(vocab_size=3000))


@pytest.fixture(scope="module")
def fast(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """Its encoder."""
    return Encoder(tokenizer)


def same(encoder: Encoder, texts: list[str]) -> bool:
    """Whether both paths agree on every id."""
    ids, lengths = encoder.encode(texts)
    plain = encode_documents(encoder.tokenizer, texts)
    return ids.tolist() == list(chain(*plain)) and lengths.tolist() == [len(ids) for ids in plain]


def test_ids_are_the_tokenizers(fast: Encoder) -> None:
    assert fast.fast is not None
    assert same(fast, HARD) and same(fast, sources(50)[25:]) and same(fast, [])


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("aAbt '\n\r .-1é天", max_size=80))
def test_ids_are_the_tokenizers_on_any_text(fast: Encoder, text: str) -> None:
    assert same(fast, [text])


def test_both_engines_cut_every_character_alike(fast: Encoder) -> None:
    """The split depends on what is a letter, a number or a blank; each library has its own Unicode tables."""
    step = 7  # primes reach every block of characters
    characters = [chr(code) for code in range(0, 0x30000, step) if not 0xD800 <= code < 0xE000]
    texts = [
        "".join(f"a{character}b 1{character}" for character in characters[i : i + 2000])
        for i in range(0, len(characters), 2000)
    ]
    assert same(fast, texts)


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Train byte-level BPE with another split."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(sources(4), trainer)
    return made


def wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    """Return it as transformers' tokenizer."""
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL_TOKENS[0])


def test_gpt2s_split_is_known() -> None:
    gpt2 = wrapped(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    assert build_fast(gpt2) is not None and same(Encoder(gpt2), HARD + sources(8))


@pytest.mark.parametrize("kind", ["normalizer", "prefix space", "added token", "other split", "characters"])
def test_other_tokenizers_take_the_plain_path(kind: str) -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "normalizer":
        made = wrapped(trained(plain, normalizers.NFKC()))
    elif kind == "prefix space":
        made = wrapped(trained(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    elif kind == "added token":
        made = wrapped(trained(plain))
        made.add_tokens([AddedToken("lines", special=False)])
    elif kind == "other split":
        split = pre_tokenizers.Split(Regex(r"\s"), behavior="merged_with_next")
        made = wrapped(trained(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])))
    else:
        made = train_tokenizer(HARD, TokenizerConfig(kind="char"))
    assert Encoder(made).fast is None and same(Encoder(made), HARD + sources(2))


def test_merges_that_tiktoken_would_do_otherwise_take_the_plain_path() -> None:
    """`abc` is listed as ab + c, but bc comes first, so that the tokenizer never makes it; tiktoken would."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*characters, "bc", "ab", "abc", SPECIAL_TOKENS[0]])}
    model = models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")])
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert made.encode("abc").tokens == ["a", "bc"]
    assert build_fast(wrapped(made)) is None


def test_runs_of_blanks_that_overflow_tiktoken_are_encoded(fast: Encoder) -> None:
    assert same(fast, ["a" + " " * 1_500_000 + "b"])


def test_other_ids_in_an_excerpt_are_noticed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_split_pattern", lambda parts: encoder.GPT2_SPLIT)
    with pytest.raises(FastPathDiffers):
        Encoder(tokenizer).encode([f"{random.Random(0).random()} 1234567"])
