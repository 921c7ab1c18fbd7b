"""How well a model answers: its loss on held-out answers, and whether its own answers come to an end."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from hfkit.chat import ChatFormat, Message
from hfkit.data.batches import Batch
from hfkit.data.conversations import Conversation, PackedChat
from hfkit.data.shards import IGNORE_INDEX
from hfkit.generation import Completion, complete
from hfkit.loop import sum_losses
from hfkit.settings import GenerationSettings


def score_replies(
    accelerator: Accelerator, module: nn.Module, packed: PackedChat, end_id: int, batch_size: int = 4
) -> dict[str, float]:
    """Return the loss per token over the assistant's words and end tokens, and over the end tokens alone.

    Args:
        module: The loss module, as prepared.
        end_id: The token that ends the assistant's turn.
        batch_size: Rows per forward pass; changes speed alone.
    """

    def batches(of_ends: bool) -> Iterator[Batch]:
        for batch in packed.every_row(batch_size, accelerator.process_index, accelerator.num_processes):
            chosen = (batch["targets"] == end_id) == of_ends
            yield {**batch, "targets": torch.where(chosen, batch["targets"], IGNORE_INDEX)}

    words, num_words = sum_losses(accelerator, module, batches(of_ends=False))
    ends, num_ends = sum_losses(accelerator, module, batches(of_ends=True))
    return {
        "eval_loss": (words + ends) / (num_words + num_ends),
        "end_token_loss": ends / num_ends,
        "eval_tokens": round(num_words + num_ends),
    }


def questions(conversations: Sequence[Conversation], count: int) -> list[list[Message]]:
    """Return some conversations up to one of the assistant's turns: the first turn of the first, and so on.

    Example:
        >>> talk = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
        >>> [len(messages) for messages in questions([Conversation(talk, "a.jsonl:1")] * 3, 3)]
        [1, 3, 1]
    """
    asked = []
    for number, conversation in enumerate(conversations[:count]):
        turns = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        asked.append(conversation.messages[: turns[number % len(turns)]])
    return asked


def answer(
    model: PreTrainedModel,
    chat: ChatFormat,
    asked: Sequence[list[Message]],
    settings: GenerationSettings,
    seed: int,
    batch_size: int = 16,
) -> list[Completion]:
    """Return the model's answer to each conversation."""
    prompts = [chat.prompt(messages) for messages in asked]
    answers = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        answers += complete(model, chat.tokenizer, part, settings, seed + start)[:: settings.num_samples]
    return answers


def end_turns_at(model: PreTrainedModel, end_id: int) -> None:
    """Make ``generate``, here and wherever the saved model is loaded, end where the assistant's turn does."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = [end_id, *(token for token in ends if token not in (None, end_id))]


def answer_by_default(model: PreTrainedModel, settings: GenerationSettings) -> None:
    """Make ``generate`` draw as ``settings`` say where it is not told otherwise; a server then heeds a temperature."""
    if settings.temperature > 0:
        own = model.generation_config
        own.do_sample, own.temperature = True, settings.temperature
        own.top_k, own.top_p, own.min_p = settings.top_k, settings.top_p, settings.min_p or None
        own.repetition_penalty = settings.repetition_penalty


def ended_share(answers: Sequence[Completion]) -> float:
    """Return the share of answers that came to an end by themselves."""
    return sum(completion.finish in ("end", "stop") for completion in answers) / len(answers)
