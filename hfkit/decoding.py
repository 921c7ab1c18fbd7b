"""Searching for translations: greedy or beam, in batches of similar length, over any number of processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hfkit.codec import TARGET_FOLDER, Codec
from hfkit.model import load_pretrained, loading
from hfkit.search import can_search, search
from hfkit.settings import BadInput
from hfkit.tokenizer import open_tokenizer
from hfkit.translation import LOADERS


class Translation(NamedTuple):
    """A translation, and whether it came to an end by itself."""

    text: str
    ended: bool


@torch.no_grad()
def translate(
    accelerator: Accelerator, model: PreTrainedModel, codec: Codec, texts: Sequence[str], batch_size: int
) -> list[Translation]:
    """Return the translation of each text, in their order, the same on every process.

    Args:
        model: Unwrapped; its generation settings say how to search.
        batch_size: Texts translated at once: speed alone.
    """
    prompts, _ = codec.encode_sources(texts)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    found: list[tuple[int, Translation]] = []
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        found += zip(batch, _search(model, codec, [prompts[place] for place in batch]), strict=True)
    model.config.use_cache = cached
    model.train(training)
    everywhere = dict(gather_object(found))
    return [everywhere[place] for place in range(len(texts))]


def _search(model: PreTrainedModel, codec: Codec, prompts: list[list[int]]) -> list[Translation]:
    pad = codec.tokenizer.pad_token_id
    longest = max(map(len, prompts))
    left = codec.kind == "causal"  # what is generated must follow the prompt
    filling = [[pad] * (longest - len(ids)) for ids in prompts]
    rows = [fill + ids if left else ids + fill for fill, ids in zip(filling, prompts, strict=True)]
    real = [[0] * len(fill) + [1] * len(ids) for fill, ids in zip(filling, prompts, strict=True)]
    mask = torch.tensor(real if left else [row[::-1] for row in real])
    generate: Any = model.generate
    inputs = {"input_ids": torch.tensor(rows, device=model.device), "attention_mask": mask.to(model.device)}
    own = {"custom_generate": search} if can_search(model) else {}
    output = generate(**inputs, use_cache=True, **own)
    # A language token that is forced to come first is not part of the text; M2M-100's would be printed with it.
    begin = longest if left else 1 + (model.generation_config.forced_bos_token_id is not None)
    generated: Tensor = output[:, begin:]  # (rows, tokens)
    texts = codec.writer.batch_decode(generated, skip_special_tokens=True)
    ends = model.generation_config.eos_token_id
    ended = torch.isin(generated, torch.tensor(ends, device=generated.device)).any(1).tolist()
    return [Translation(text.strip(), end) for text, end in zip(texts, ended, strict=True)]


def open_translator(folder: Path) -> tuple[PreTrainedModel, Codec]:
    """Load a model that the translation recipe saved, and its codec.

    Raises:
        BadInput: for a folder without such a model.
    """
    with loading(str(folder)):
        facts = getattr(AutoConfig.from_pretrained(folder), "translation", None)
    if facts is None:
        raise BadInput(f"{folder} was not saved by the translation recipe: its config.json has no 'translation'")
    model = load_pretrained(LOADERS[facts["kind"]], folder, str(folder))
    tokenizer = open_tokenizer(folder)
    if facts["languages"]:
        tokenizer.src_lang, tokenizer.tgt_lang = facts["languages"]
    target = open_tokenizer(folder / TARGET_FOLDER) if facts.get("separate") else None
    start = getattr(model.config, "decoder_start_token_id", None)
    return model, Codec(tokenizer, facts["kind"], facts["prefix"], facts["prompt"], facts["length"], start, target)
