"""Tokenizers: trained here on the corpus or loaded, always as plain transformers folders.

Byte-level BPE holds all 256 bytes, so it has no unknown token and gives any text back exactly. The chat tokens are
reserved from the start, so that a model pretrained here learns to chat without growing its embedding. Text that
contains the name of a special token is encoded as ordinary text: data cannot inject one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hfkit.files import digest_of
from hfkit.remote import resolve_folder
from hfkit.settings import BadInput, TokenizerConfig

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END_OF_TURN = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END_OF_TURN]
UNKNOWN = "<|unk|>"  # only a character tokenizer can meet something it does not know

# Words, runs of at most three digits, punctuation, whitespace: GPT-4's split (openai/tiktoken, cl100k_base).
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# The assistant's words and the token that ends its turn are what a chat model learns ({% generation %}).
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ '<|system|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else %}{{ raise_exception('unknown role ' + message['role']) }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer that ``config`` describes; a corpus too small for ``vocab_size`` gives a smaller one."""
    trained = _train_bpe(texts, config.vocab_size) if config.kind == "bpe" else _build_char(texts)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN if config.kind == "char" else None,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # without it bytes the corpus lacks would vanish silently
        show_progress=False,
    )
    tokenizer.train_from_iterator(_grouped(texts, 256), trainer)
    return tokenizer


def _build_char(texts: Iterable[str]) -> Tokenizer:
    characters = sorted(set().union(*(set(text) for text in texts)))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN])
    return tokenizer


def _grouped(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of texts: ``train_from_iterator`` crosses into Rust once a list and not once a string."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    yield group


def open_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub as it is.

    Raises:
        BadInput: if there is none.
    """
    folder = resolve_folder(path, revision, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(f"{path} holds no tokenizer that loads ({_first_line(error)})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not len(tokenizer):
        raise BadInput(f"{path} holds no tokenizer; give --tokenizer.path a folder with tokenizer.json")
    return tokenizer


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub, and see that it can end a document and pad.

    Raises:
        BadInput: if there is none, or it has no EOS token. A missing pad token is taken from the reserved ones.
    """
    tokenizer = open_tokenizer(path, revision)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {path} has no eos token, so documents could not be ended")
    if tokenizer.pad_token_id is None:
        # Any id will do for filling, since filled positions are never a target; EOS is one that always exists.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200] or type(error).__name__


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each document: BOS where the tokenizer puts one in front, its text, EOS.

    Special tokens spelled out in the text are encoded as the characters that they are.
    """
    start, end = encode_prefix(tokenizer), [tokenizer.eos_token_id]
    return [start + ids + end for ids in encode_texts(tokenizer, texts)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text and nothing else; special tokens spelled out in it are its characters."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    backend.no_truncation()  # saved with some tokenizers, and left by a call that asked for it
    backend.no_padding()
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [encoding.ids for encoding in encoded]


def encode_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ``[bos]`` where the tokenizer begins every text with it, else nothing."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def add_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a plain call of a tokenizer trained here end every text with EOS, as encoder–decoders expect."""
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    if not special_around(tokenizer)[1]:
        eos = (tokenizer.eos_token, tokenizer.eos_token_id)
        backend.post_processor = processors.TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])


def special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after every text."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise BadInput("the tokenizer gives a text other tokens when it adds its special ones; it cannot be used here")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that decides which ids a text gets."""
    prefix = encode_prefix(tokenizer)  # first: a plain call takes back the padding and truncation of earlier ones
    backend = getattr(tokenizer, "_tokenizer", None)
    content = backend.to_str() if isinstance(backend, Tokenizer) else sorted(tokenizer.get_vocab().items())
    return digest_of([content, tokenizer.eos_token_id, prefix])


def report_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, float | int]:
    """Return vocabulary size, bytes per token on ``texts``, and how many of them do not come back exactly."""
    encoded = [ids[:-1] for ids in encode_documents(tokenizer, texts)]
    decoded = tokenizer.batch_decode(encoded, skip_special_tokens=True)
    tokens = sum(len(ids) for ids in encoded)
    return {
        "vocab_size": len(tokenizer),
        "bytes_per_token": round(sum(len(text.encode()) for text in texts) / max(1, tokens), 4),
        "round_trip_failures": sum(text != back for text, back in zip(texts, decoded, strict=True)),
    }
