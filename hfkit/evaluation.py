"""Scores of a language model that can be compared: over the whole text, by every process, whatever the batch size."""

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkit.data.batches import evaluation_windows
from hfkit.data.prepare import Prepared
from hfkit.data.shards import TokenStream
from hfkit.loop import sum_losses
from hfkit.metrics import score_language_model


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
    """Return the scores of the validation text; of the training text where nothing is held out."""
    streams = [data.validation] if data.validation else data.train
    size = data.bytes["validation" if data.validation else "train"]
    return score_text(accelerator, module, streams, size, length, batch_size=8)


def first_words(tokenizer: PreTrainedTokenizerBase, stream: TokenStream, count: int = 3, words: int = 8) -> list[str]:
    """Return a few words from some places of the stream: prompts for samples.

    They are the beginnings of documents where there are enough of those, else passages spread over the text.
    """
    if stream.num_documents >= count:
        places = [int(stream.starts[index * stream.num_documents // count]) for index in range(count)]
    else:
        places = [index * len(stream.tokens) // count for index in range(count)]
    ends = stream.starts[np.searchsorted(stream.starts, places, "right")]  # of the documents that they lie in
    passages = [stream.tokens[place : min(place + 64, end)] for place, end in zip(places, ends, strict=True)]
    texts = [str(tokenizer.decode(passage, skip_special_tokens=True)) for passage in passages]
    prompts = [" ".join(text.split()[:words]) for text in texts]
    return [prompt for prompt in prompts if prompt]
