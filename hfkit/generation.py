"""Generation: prompts in, continuations out, with plain ``generate`` underneath.

A batch is padded on the left and gives, under greedy decoding, the tokens that each prompt gives alone. A stream hands
out text as soon as no later token can change it; put together it is the text that the batch gives.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hfkit.data.readers import check_text
from hfkit.model import positions_of
from hfkit.settings import BadInput, GenerationSettings
from hfkit.tokenizer import encode_documents

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of a character decode to before the last of them is there


@dataclass(frozen=True)
class Completion:
    """What a model said after a prompt."""

    text: str
    """Without the prompt, special tokens and the stop string."""
    tokens: int
    """Tokens generated, the one that ended the text included."""
    finish: str
    """Why it ended: end (the model's own end token), stop (a stop string), length, or interrupted."""


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: GenerationSettings,
    seed: int,
) -> list[str]:
    """Return each prompt's continuation, without the prompt.

    Args:
        settings: How to sample; of several samples the first is returned.
        seed: Decides what is sampled; the global random numbers are left as they were.

    Raises:
        BadInput: for an empty prompt, from which a model has nothing to go on.
    """
    completions = complete(model, tokenizer, encode_prompts(tokenizer, prompts), settings, seed)
    return [completion.text for completion in completions[:: settings.num_samples]]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each prompt as a document begins, so without EOS.

    Raises:
        BadInput: for an empty prompt, and for one that is not UTF-8.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise BadInput(f"prompt {number} is empty; give the model a few words to go on from")
        check_text(prompt, f"prompt {number}")
    return [ids[:-1] for ids in encode_documents(tokenizer, prompts)]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seed: int,
) -> list[Completion]:
    """Return ``settings.num_samples`` completions of each prompt, one prompt after another.

    Args:
        prompts: Ids; those to which the model's positions leave as many tokens are generated from as one batch.

    Raises:
        BadInput: if they leave none to one of them.
    """
    room = np.array([min(settings.max_new_tokens, room_after(model, len(prompt))) for prompt in prompts])
    found: list[list[Completion]] = [[] for _ in prompts]
    for tokens in np.unique(room).tolist():
        places = np.flatnonzero(room == tokens).tolist()
        part = [prompts[place] for place in places]
        completions = _complete_batch(model, tokenizer, part, replace(settings, max_new_tokens=tokens), seed)
        for number, completion in enumerate(completions):
            found[places[number // settings.num_samples]].append(completion)
    return [completion for each in found for completion in each]


def _complete_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seed: int,
) -> list[Completion]:
    longest = max(map(len, prompts))
    ids = torch.empty(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row] = prompt[0]  # nobody reads the left end, but a repetition penalty counts what stands there
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = _generate(model, tokenizer, ids, mask, settings, seed)
    return [_describe(model, tokenizer, row.tolist(), settings) for row in output[:, longest:]]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    settings: GenerationSettings,
    seed: int,
    write: Callable[[str], None],
) -> Completion:
    """Pass the continuation to ``write`` piece by piece, and return it whole; Ctrl-C ends it where it is."""
    streamer = TextStreamer(tokenizer, settings.stop, write)
    ids = torch.tensor([prompt])
    try:
        _generate(model, tokenizer, ids, torch.ones_like(ids), settings, seed, streamer)
        completion = _describe(model, tokenizer, streamer.ids, settings)
    except KeyboardInterrupt:
        text = decode(tokenizer, streamer.ids)
        completion = Completion(_cut_at_stop(text, settings.stop), len(streamer.ids), "interrupted")
    streamer.finish(completion.text)
    return completion


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    settings: GenerationSettings,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Return (prompts · samples, prompt + new) ids; the model's mode and the global random numbers stay."""
    config = decoding(model, settings)
    config.pad_token_id = _filler(tokenizer)
    prompt = ids.shape[1]
    config.max_new_tokens = min(settings.max_new_tokens, room_after(model, prompt))
    stop = StoppingCriteriaList([StopInText(tokenizer, settings.stop, prompt)] if settings.stop else [])
    devices = [] if model.device.type == "cpu" else [model.device]
    with _evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        generate: Any = model.generate  # transformers declares it callable on some models only
        return generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            stopping_criteria=stop,
            streamer=streamer,
        )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def decoding(model: PreTrainedModel, settings: GenerationSettings) -> GenerationConfig:
    """Return the model's own end tokens and suppressed ids, with our way of sampling."""
    own = model.generation_config
    sampling = settings.temperature > 0
    return GenerationConfig(
        use_cache=True,  # off in the configuration of a model in training
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        suppress_tokens=own.suppress_tokens,
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampling,
        temperature=settings.temperature if sampling else None,
        top_k=settings.top_k if sampling else None,  # 0 is no limit; null would be transformers' own 50
        top_p=settings.top_p if sampling else None,
        min_p=settings.min_p or None if sampling else None,
        repetition_penalty=settings.repetition_penalty,
        num_return_sequences=settings.num_samples,
    )


def room_after(model: PreTrainedModel, length: int, name: str = "a prompt") -> int:
    """Return how many tokens the model's positions leave after a prompt of ``length``, which complaints call ``name``.

    Raises:
        BadInput: if none is left.
    """
    limit = positions_of(model.config)
    if limit is None:
        return 1 << 30
    if length >= limit:
        raise BadInput(f"{name} of {length} tokens leaves no room in the model's {limit} positions; shorten it")
    return limit - length


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the ids at which the model's text ends."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of ids, without special tokens."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _describe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: list[int], settings: GenerationSettings
) -> Completion:
    """Return the completion that these new ids spell; what follows an end token is filling."""
    ends = end_tokens(model)
    length = next((place + 1 for place, token in enumerate(new) if token in ends), None)
    text = decode(tokenizer, new[:length])
    cut = _cut_at_stop(text, settings.stop)
    if cut != text:
        filler = _filler(tokenizer)
        while new and new[-1] == filler:  # a row that stopped before the others of its batch is filled up
            new = new[:-1]
        return Completion(cut, len(new[:length]), "stop")
    return Completion(text, len(new[:length]), "length" if length is None else "end")


def _cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string in it.

    Example:
        >>> _cut_at_stop("one. Two. Three", [" T", "."])
        'one'
    """
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text


class StopInText(StoppingCriteria):
    """Ends a row once its continuation holds a stop string; transformers' own finds one that the prompt begins, too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.stop, self.prompt = tokenizer, stop, prompt
        self.longest = max(len(word.encode()) for word in stop) + 4  # tokens; one is a byte at least

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return which rows end, (rows,)."""
        newest = input_ids[:, max(self.prompt, input_ids.shape[1] - self.longest) :]
        texts = [decode(self.tokenizer, row) for row in newest.tolist()]
        ended = [any(word in text for word in self.stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class TextStreamer(BaseStreamer):
    """Turns ids that come one by one into text, handed out once no later id can change it.

    Bytes of an unfinished character wait, and so does what may be the beginning of a stop string. Only the last few ids
    are decoded again for each new one, so a long text costs no more per token than a short one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stop, self.write = tokenizer, stop, write
        self.ids: list[int] = []
        self.settled = self.context = 0  # ids before `settled` are text already; decoding begins at `context`
        self.text = ""
        self.written = 0
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Take the next ids; the first call brings the prompt."""
        if not self.begun:
            self.begun = True
            return
        self.ids += value.flatten().tolist()
        before = decode(self.tokenizer, self.ids[self.context : self.settled])
        after = decode(self.tokenizer, self.ids[self.context :])
        if after.endswith(INCOMPLETE):
            return
        self.text += after[len(before) :]
        self.context, self.settled = self.settled, len(self.ids)
        self._hand_out(len(_cut_at_stop(self.text, self.stop)) - self._possible_stop())

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that may be the beginning of a stop string."""
        for length in range(max(map(len, self.stop), default=1) - 1, 0, -1):
            if any(word.startswith(self.text[-length:]) for word in self.stop):
                return length
        return 0

    def _hand_out(self, end: int) -> None:
        if end > self.written:
            self.write(self.text[self.written : end])
            self.written = end

    def finish(self, text: str) -> None:
        """Hand out what waited, now that the whole text is known."""
        self.text = text
        self._hand_out(len(text))

    def end(self) -> None:
        """See ``finish``, which knows the text."""


def tokens_per_second(completions: Sequence[Completion], begin: float) -> str:
    """Return the speed since ``begin`` (``time.perf_counter()``) in words."""
    tokens, seconds = sum(completion.tokens for completion in completions), time.perf_counter() - begin
    return f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s"
