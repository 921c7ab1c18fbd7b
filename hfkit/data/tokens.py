"""Text files → token streams, by several processes; how well the tokenizer serves each of them."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfkit.data.shards import StreamWriter, TokenStream, token_dtype
from hfkit.data.texts import Group, list_groups, read_group, read_texts
from hfkit.data.workers import map_in_order
from hfkit.encoder import Encoder, FastPathDiffers
from hfkit.progress import Progress
from hfkit.tokenizer import encode_prefix, encode_texts

GPT2 = "openai-community/gpt2"
PROOF = 1 << 19  # UTF-8 bytes of held-out text, at least, that are decoded again and compared


class Counts(NamedTuple):
    """What a stream holds."""

    documents: int
    tokens: int
    bytes: int
    """UTF-8, of the text."""


class Encoded(NamedTuple):
    """The tokens of a row group of texts."""

    ids: np.ndarray
    lengths: np.ndarray
    """Tokens of each document."""
    bytes: int
    """UTF-8 bytes of the texts."""


def write_streams(folder: Path, texts: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Write a token stream for each file of texts, under its name; return what each holds.

    Returns:
        Stream → ``documents``, ``tokens``, ``bytes`` (UTF-8, of the text) and ``bytes_per_token`` (EOS and BOS aside).
    """
    counts = write_groups(folder, texts, [group for path in texts for group in list_groups(path)], tokenizer)
    return describe_streams(counts, tokenizer)


def write_groups(
    folder: Path,
    texts: Sequence[Path],
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    workers: int | None = None,
) -> dict[str, Counts]:
    """Write a token stream for each file of texts, of those row groups only that are given."""
    try:
        return _write_groups(folder, texts, groups, Encoder(tokenizer), workers)
    except FastPathDiffers:
        return _write_groups(folder, texts, groups, Encoder(tokenizer, fast=False), workers)


def _write_groups(
    folder: Path, texts: Sequence[Path], groups: Sequence[Group], encoder: Encoder, workers: int | None
) -> dict[str, Counts]:
    writers = {path: StreamWriter(folder, path.stem, len(encoder.tokenizer)) for path in texts}
    sizes = dict.fromkeys(texts, 0)
    with Progress(None, "tokenize", "document") as progress:
        for (path, _), piece in map_in_order(partial(_encode_group, encoder=encoder), groups, workers):
            writers[path].append(piece.ids, piece.lengths)
            sizes[path] += piece.bytes
            progress.update(len(piece.lengths))
    for writer in writers.values():
        writer.close()
    return {path.stem: Counts(writer.documents, writer.tokens, sizes[path]) for path, writer in writers.items()}


def describe_streams(counts: dict[str, Counts], tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Return what each stream holds, as `write_streams` does."""
    added = 1 + len(encode_prefix(tokenizer))  # tokens of each document that stand for none of its text
    return {
        name: {
            "documents": documents,
            "tokens": tokens,
            "bytes": size,
            "bytes_per_token": round(size / max(1, tokens - added * documents), 4),
        }
        for name, (documents, tokens, size) in counts.items()
    }


def _encode_group(group: Group, encoder: Encoder) -> Encoded:
    texts = read_group(group)
    ids, lengths = encoder.encode(texts)
    fits = len(ids) and ids.max() < len(encoder.tokenizer)  # if not, the writer says so
    small = ids.astype(token_dtype(len(encoder.tokenizer))) if fits else ids
    return Encoded(small, lengths, sum(len(text.encode()) for text in texts))


def count_round_trip_failures(
    folder: Path, texts: Sequence[Path], tokenizer: PreTrainedTokenizerBase, proof: int = PROOF
) -> int:
    """Return how many documents do not come back exactly from their stream: the first ones, ``proof`` bytes of them."""
    added = len(Encoder(tokenizer, fast=False).prefix)
    failures = 0
    for path in texts:
        stream = TokenStream(folder, path.stem, len(tokenizer))
        for index, text in enumerate(read_texts(path)):
            if proof <= 0:
                return failures
            proof -= len(text.encode())
            failures += tokenizer.decode(stream.document(index)[added:-1].tolist()) != text
    return failures


def compare_with_gpt2(texts: Sequence[Path], proof: int = PROOF) -> dict[str, float]:
    """Return the bytes per token of GPT-2's tokenizer on the first texts, if it was downloaded before, else nothing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(GPT2, local_files_only=True)
    except (OSError, ValueError):
        return {}
    size = tokens = 0
    for text in chain.from_iterable(map(read_texts, texts)):
        if size >= proof:
            break
        size += len(text.encode())
        tokens += len(encode_texts(tokenizer, [text])[0])
    return {"gpt2_bytes_per_token": round(size / max(1, tokens), 4)}
