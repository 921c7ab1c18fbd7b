"""Tokenizers: any text comes back, none injects a special token, and the saved folder is what everyone else loads."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfkit.settings import BadInput, TokenizerConfig
from hfkit.tokenizer import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    UNKNOWN,
    encode_documents,
    encode_texts,
    load_tokenizer,
    report_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

CORPUS = [
    "The cat sat on the mat, and the cat was fat.\n\nThe end of the tale.",
    "Números, naïve café, 東京 123 456.",
] * 3
HARD = [
    "",
    " ",
    "\n",
    "a\n\n\nb\r\n\tc  d   e \n ",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 and CJK 東京都 漢字、かな",
    "combining e\u0301 n\u0303 \u0f40\u0fb5 and zero\u200bwidth \u202eright-to-left\u202c",
    "12345678901 3.14159 x=-1e-9",
    "don't DON'T we'll I'VE",
    "\x00\x01\x7f\ufffd\ufeff",
    f"text {END_OF_TEXT}<|end|> <|assistant|>yes<|pad|>{''.join(SPECIAL_TOKENS)}",
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerBase:
    return train_tokenizer(CORPUS, TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def char() -> PreTrainedTokenizerBase:
    return train_tokenizer(CORPUS, TokenizerConfig(kind="char"))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[token] for token in SPECIAL_TOKENS}


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_text_comes_back_exactly_and_injects_nothing(text: str, bpe: PreTrainedTokenizerBase) -> None:
    ids = encode_documents(bpe, [text])[0]
    assert ids[-1] == bpe.eos_token_id
    assert bpe.decode(ids[:-1]) == text
    assert not special_ids(bpe) & set(ids[:-1])


@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_exactly(bpe: PreTrainedTokenizerBase, text: str) -> None:
    assert bpe.decode(encode_documents(bpe, [text])[0][:-1]) == text


def test_special_tokens_have_the_first_ids_and_pad_is_not_eos(bpe: PreTrainedTokenizerBase) -> None:
    assert bpe.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3, 4, 5]
    assert (bpe.eos_token_id, bpe.bos_token_id, bpe.pad_token_id) == (0, 0, 1)


def test_training_is_deterministic_and_depends_on_the_corpus(bpe: PreTrainedTokenizerBase) -> None:
    again = train_tokenizer(iter(CORPUS), TokenizerConfig(vocab_size=300))
    assert tokenizer_hash(again) == tokenizer_hash(bpe) and len(bpe) == 300
    assert tokenizer_hash(train_tokenizer(["quite another text"] * 9, TokenizerConfig(vocab_size=300))) != (
        tokenizer_hash(bpe)
    )


def test_a_corpus_too_small_for_the_vocabulary_gives_a_smaller_one() -> None:
    tokenizer = train_tokenizer(["abab"], TokenizerConfig(vocab_size=4096))
    assert 256 + 6 < len(tokenizer) < 270
    assert tokenizer.decode(encode_documents(tokenizer, ["ünseen 漢"])[0][:-1]) == "ünseen 漢"
    assert len(train_tokenizer([], TokenizerConfig(vocab_size=4096))) == 256 + 6


def test_characters_are_one_token_each_newlines_included(char: PreTrainedTokenizerBase) -> None:
    text = "The cat.\n\n  The tale\n"
    ids = encode_documents(char, [text])[0]
    assert len(ids) == len(text) + 1 and char.decode(ids[:-1]) == text
    assert len(char) == len(SPECIAL_TOKENS) + 1 + len(set("".join(CORPUS)))


def test_unknown_characters_are_one_unknown_token_each_and_names_of_special_tokens_none(
    char: PreTrainedTokenizerBase,
) -> None:
    unknown = char.convert_tokens_to_ids(UNKNOWN)
    assert encode_texts(char, ["aЖ東☃b"])[0][1:4] == [unknown, char.convert_tokens_to_ids("東"), unknown]
    ids = encode_texts(char, [END_OF_TEXT])[0]
    assert len(ids) == len(END_OF_TEXT) and not special_ids(char) & set(ids)
    assert report_tokenizer(char, ["the cat", "ЖЖ"])["round_trip_failures"] == 1


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_saved_folder_loads_with_autotokenizer_and_gives_the_same_ids(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS, *HARD[:-1]]:  # the last spells out special tokens, which plain transformers lets through
        assert [*plain(text)["input_ids"], plain.eos_token_id] == encode_documents(tokenizer, [text])[0]
    assert plain(HARD[-1], split_special_tokens=True)["input_ids"] == encode_texts(tokenizer, [HARD[-1]])[0]
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    assert (plain.eos_token, plain.pad_token, plain.bos_token) == (END_OF_TEXT, "<|pad|>", END_OF_TEXT)


def test_the_assistant_mask_covers_content_and_end_exactly(bpe: PreTrainedTokenizerBase) -> None:
    contents = ["Be kind.", " Where is the cat?\n", "  On the mat. \n", "And now?", "Gone."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    made: Any = bpe.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    expected_ids, expected_mask = [], []
    for role, content in zip(roles, contents, strict=True):
        body = [*encode_texts(bpe, [content])[0], bpe.convert_tokens_to_ids("<|end|>")]
        expected_ids += [bpe.convert_tokens_to_ids(f"<|{role}|>"), *body]
        expected_mask += [0, *[int(role == "assistant")] * len(body)]
    assert made["input_ids"] == expected_ids
    assert made["assistant_masks"] == expected_mask
    prompt: Any = bpe.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=True)
    assert prompt["input_ids"] == expected_ids[: len(prompt["input_ids"])]
    assert prompt["input_ids"][-1] == bpe.convert_tokens_to_ids("<|assistant|>")
    with pytest.raises(Exception, match="unknown role tool"):
        bpe.apply_chat_template([{"role": "tool", "content": ""}])


def reload(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Any:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_hash_changes_with_what_decides_the_ids_and_with_nothing_else(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    known = tokenizer_hash(bpe)
    same = reload(bpe, tmp_path / "same")
    assert tokenizer_hash(same) == known
    same(["a", "longer text"], padding=True, truncation=True, max_length=4)  # leaves traces in the fast tokenizer
    assert tokenizer_hash(same) == known
    encode_documents(same, ["text"])
    assert tokenizer_hash(same) == known

    merges = reload(bpe, tmp_path / "merges")
    path = tmp_path / "merges" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "merges")) != known
    eos = reload(bpe, tmp_path / "eos")
    eos.eos_token = "<|end|>"
    assert tokenizer_hash(eos) != known
    assert tokenizer_hash(with_bos(merges)) != known


def with_bos(tokenizer: Any) -> Any:
    """Make a tokenizer put BOS in front, as Llama's does."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def test_a_tokenizer_that_puts_bos_in_front_gives_one_target_more(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain, begun = encode_documents(bpe, CORPUS), encode_documents(with_bos(reload(bpe, tmp_path)), CORPUS)
    assert begun == [[0, *ids] for ids in plain]
    # Every token but a document's first is a target: n with EOS alone, n + 1 with BOS, for n tokens of text.
    texts = encode_texts(bpe, CORPUS)
    assert [len(ids) - 1 for ids in plain] == [len(ids) for ids in texts]
    assert [len(ids) - 1 for ids in begun] == [len(ids) + 1 for ids in texts]


def test_truncation_and_padding_saved_with_a_tokenizer_cut_no_document(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    loaded = reload(bpe, tmp_path)
    for encode in (encode_texts, encode_documents):
        loaded._tokenizer.enable_truncation(5)
        loaded._tokenizer.enable_padding(length=100)
        assert encode(loaded, CORPUS[:2]) == encode(bpe, CORPUS[:2])


def test_a_missing_pad_token_becomes_eos_and_no_eos_is_refused(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: value for name, value in content.items() if name != "pad_token"}))
    assert load_tokenizer(tmp_path).pad_token_id == bpe.eos_token_id
    settings.write_text(json.dumps({name: value for name, value in content.items() if name != "eos_token"}))
    with pytest.raises(
        BadInput, match=f"the tokenizer of {tmp_path} has no eos token, so documents could not be ended"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", '{"model": 1}'], ids=["no file", "empty", "torn", "other"])
def test_what_is_no_tokenizer_is_refused_in_one_line(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match="holds no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_below_every_byte_is_refused() -> None:
    with pytest.raises(BadInput, match=r"tokenizer.vocab_size 261 is too small.*at least 262"):
        TokenizerConfig(vocab_size=261)
    TokenizerConfig(vocab_size=262)
