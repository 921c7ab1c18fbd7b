"""Greedy and beam search as ``generate`` does them, on a batch that finished sentences leave.

``generate(custom_generate=search)`` prepares inputs, encoder, cache and logits processors, and then calls ``search``
instead of transformers' own loops. Candidates, scores and the end of a sentence's search are theirs, so the outputs are
theirs; what differs is cost. A sentence whose search is over gives back its rows, where theirs go on until the slowest
sentence of the batch is done; and what the decoder reads of the encoder, which is alike for all beams of a sentence, is
not copied at each step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EncoderDecoderCache, GenerationConfig
from transformers.utils import ModelOutput

NEVER = -1e9  # the score of what may not be chosen, as in transformers


class Hypothesis(NamedTuple):
    """A finished continuation: its score by length, and its tokens with those of the prompt."""

    score: float
    ids: Tensor  # (tokens,)


class Candidates(NamedTuple):
    """The best continuations by one token, (sentences, candidates) each, best first."""

    scores: Tensor
    parents: Tensor  # rows that they continue
    tokens: Tensor
    over: Tensor  # which of them end here


def can_search(model: Any) -> bool:
    """Whether a model's settings ask for one best sentence, and for nothing that ties a row to its place.

    Places change when sentences leave, so that neither a processor nor the model may remember rows by their number.
    """
    config = model.generation_config
    placed = (config.encoder_no_repeat_ngram_size, config.max_time, config.stop_strings, config.guidance_scale)
    other = (config.do_sample, config.return_dict_in_generate, config.output_hidden_states, config.output_attentions)
    penalties = (config.repetition_penalty, config.encoder_repetition_penalty)
    more = (config.num_return_sequences, getattr(config, "num_beam_groups", None))
    return (
        not any(placed + other)
        and all(value in (None, 1) for value in penalties + more)
        and config.pad_token_id is not None
        and not any(getattr(config, name, None) for name in ("penalty_alpha", "constraints", "force_words_ids"))
        and not getattr(model, "_is_stateful", False)  # a recurrent state in place of a cache of rows
    )


def search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **inputs: Any,
) -> Tensor:
    """Return (sentences, tokens) the best continuation of each sentence with its prompt, filled up with padding.

    Args:
        input_ids: (sentences · beams, prompt), each sentence once per beam.
        stopping_criteria: Not asked: the length and the end tokens of ``generation_config`` say the same.
        inputs: The model's other inputs and its cache, as ``generate`` prepared them.
    """
    config, beams, prompt = generation_config, generation_config.num_beams, input_ids.shape[1]
    ids, live = input_ids, list(range(len(input_ids) // beams))  # which sentences have rows
    finished: list[list[Hypothesis]] = [[] for _ in live]
    scores = torch.full((len(live), beams), NEVER, device=ids.device)
    scores[:, 0] = 0  # the beams of a sentence are alike at first: one is enough
    logits = _read(model, ids, inputs, first=True)
    while True:
        scored = logits_processor(ids, logits if beams == 1 else logits.log_softmax(-1))
        found = _extend(scored, scores, config, at_end=ids.shape[1] + 1 == config.max_length)
        length = ids.shape[1] + 1 - prompt  # tokens of the candidates
        for row, rank in found.over[:, :beams].nonzero().tolist():
            score = found.scores[row, rank].item() / length**config.length_penalty
            whole = torch.cat([ids[found.parents[row, rank]], found.tokens[row, rank, None]])
            own = finished[live[row]]
            own[:] = sorted([*own, Hypothesis(score, whole)], key=lambda each: -each.score)[:beams]
        scores, chosen = (found.scores + NEVER * found.over).topk(beams)
        best = scores[:, 0].tolist()
        done = [_is_over(finished[live[row]], score, length, prompt, config) for row, score in enumerate(best)]
        going = [row for row, over in enumerate(done) if not over]
        if not going or ids.shape[1] + 1 == config.max_length:
            break
        some_left = len(going) < len(live)
        live, scores, chosen = [live[row] for row in going], scores[going], chosen[going]
        rows = found.parents[going].gather(1, chosen).flatten()
        ids = torch.cat([ids[rows], found.tokens[going].gather(1, chosen).flatten()[:, None]], dim=1)
        if beams > 1 or some_left:
            _keep_rows(inputs, rows, some_left)
        logits = _read(model, ids, inputs)
    return pad_sequence([own[0].ids for own in finished], batch_first=True, padding_value=config.pad_token_id)


def _read(model: Any, ids: Tensor, inputs: dict[str, Any], first: bool = False) -> Tensor:
    """Return (rows, vocabulary) the logits of the next token; ``inputs`` then hold what the model keeps of ``ids``."""
    new = None if first else 1
    prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=new, is_first_iteration=first, **inputs)
    output = model(**prepared, return_dict=True)
    inputs |= model._update_model_kwargs_for_generation(output, inputs, model.config.is_encoder_decoder)
    return output.logits[:, -1].float()


def _extend(scored: Tensor, scores: Tensor, config: GenerationConfig, at_end: bool) -> Candidates:
    """Return twice as many candidates as beams, so that enough go on however many of them end; greedily, the one.

    Args:
        scored: (rows, vocabulary) of the next token.
        scores: (sentences, beams) of what the rows hold so far.
    """
    sentences, beams = scores.shape
    ends = torch.tensor(config.eos_token_id, device=scores.device).flatten()
    totals = scored.view(sentences, beams, -1)
    if beams == 1:  # compares nothing but the next token; of equal ones `argmax` names another one than `topk`
        places = totals.flatten(1).argmax(-1, keepdim=True)
        best = totals.flatten(1).gather(1, places)
    else:
        best, places = (totals + scores[..., None]).flatten(1).topk((1 + len(ends)) * beams)
    first_rows = beams * torch.arange(sentences, device=scores.device)[:, None]
    tokens = places % scored.shape[-1]
    over = torch.isin(tokens, ends) | at_end
    return Candidates(best, first_rows + places // scored.shape[-1], tokens, over)


def _is_over(found: list[Hypothesis], best: float, length: int, prompt: int, config: GenerationConfig) -> bool:
    """Whether a sentence's search is over: as many hypotheses as beams, and none to come that counts.

    Args:
        best: Highest score of what goes on, ``length`` tokens long.
    """
    if len(found) < config.num_beams:
        return False
    if config.early_stopping is True or config.num_beams == 1:
        return True
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.max_length - prompt
    return best / length**config.length_penalty <= found[-1].score


def _keep_rows(inputs: dict[str, Any], rows: Tensor, some_left: bool) -> None:
    """Let ``inputs`` hold these rows, in this order; where no sentence left, only what differs between beams moves."""
    cache = inputs["past_key_values"]
    crossing = isinstance(cache, EncoderDecoderCache)
    (cache.self_attention_cache if crossing else cache).reorder_cache(rows)
    if not some_left:
        return
    if crossing:
        cache.cross_attention_cache.reorder_cache(rows)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            inputs[name] = value[rows]
        elif isinstance(value, ModelOutput):  # the encoder's
            inputs[name] = type(value)(**{part: tensor[rows] for part, tensor in value.items()})
