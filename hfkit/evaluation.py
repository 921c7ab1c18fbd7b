"""Scores of a language model that can be compared: over the whole text, by every process, whatever the batch size."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkit.data.batches import evaluation_windows
from hfkit.data.prepare import Prepared
from hfkit.data.shards import TokenStream
from hfkit.data.texts import list_groups, read_table, text_sizes
from hfkit.loop import sum_losses
from hfkit.metrics import score_language_model
from hfkit.tokenizer import encode_documents

SCORED = 1 << 20  # tokens of the training text, about, that are scored where nothing is held out
LONGEST_PROMPT = 64  # tokens


def score_text(
    accelerator: Accelerator,
    module: nn.Module,
    streams: Sequence[TokenStream],
    num_bytes: int,
    length: int,
    batch_size: int,
) -> dict[str, float]:
    """Return eval_loss, perplexity, bits_per_byte and the counts behind them.

    Args:
        module: The loss module, as prepared.
        streams: Tokenized documents; each is cut on its own into windows of ``length`` targets from its start.
        num_bytes: UTF-8 bytes of the documents' text.
        batch_size: Windows per forward pass; changes speed alone.
    """
    windows = evaluation_windows(streams, length, batch_size, accelerator.process_index, accelerator.num_processes)
    nats, targets = sum_losses(accelerator, module, windows)
    return score_language_model(nats, round(targets), num_bytes)


def score_held_out(accelerator: Accelerator, module: nn.Module, data: Prepared, length: int) -> dict[str, float]:
    """Return the scores of the validation text; of the training text's beginning where nothing is held out."""
    if data.validation:
        return score_text(accelerator, module, [data.validation], data.bytes["validation"], length, batch_size=8)
    streams = [begin_of(stream, SCORED // len(data.train)) for stream in data.train]
    size = sum(count_bytes(data, stream) for stream in streams)
    return score_text(accelerator, module, streams, size, length, batch_size=8)


def begin_of(stream: TokenStream, tokens: int) -> TokenStream:
    """Return the first documents of a stream, as many as hold ``tokens`` together, the last one whole."""
    return replace(stream, limit=min(int(np.searchsorted(stream.starts, tokens)), stream.num_documents))


def count_bytes(data: Prepared, stream: TokenStream) -> int:
    """Return the UTF-8 bytes of the documents of a stream of training text."""
    groups = list_groups(data.text / f"{stream.name}.parquet")
    sizes = chain.from_iterable(text_sizes(read_table(group)) for group in groups)
    return sum(islice(sizes, stream.num_documents))


def first_words(
    tokenizer: PreTrainedTokenizerBase,
    stream: TokenStream,
    count: int = 3,
    words: int = 8,
    positions: int | None = None,
) -> list[str]:
    """Return a few words from some places of the stream: prompts for samples, or none where there are no words.

    They are the beginnings of documents where there are enough of those, else passages spread over the text.

    Args:
        positions: Tokens that the model takes at most, of which a prompt leaves some to its continuation.
    """
    room = 2 * LONGEST_PROMPT if positions is None else positions
    if stream.num_documents >= count:
        places = [int(stream.starts[index * stream.num_documents // count]) for index in range(count)]
    else:
        places = [index * len(stream.tokens) // count for index in range(count)]
    ends = stream.starts[np.searchsorted(stream.starts, places, "right")]  # of the documents that they lie in
    longest = min(LONGEST_PROMPT, room // 2)
    passages = [stream.tokens[place : min(place + longest, end)] for place, end in zip(places, ends, strict=True)]
    texts = [str(tokenizer.decode(passage, skip_special_tokens=True)) for passage in passages]
    prompts = [prompt for text in texts if (prompt := " ".join(text.split()[:words]))]
    encoded = encode_documents(tokenizer, prompts)  # not always the tokens that they came from; the last one is the EOS
    return [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) <= room]
