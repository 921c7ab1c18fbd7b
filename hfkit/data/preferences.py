"""Pairs of a better and a worse answer to one conversation: reading them, and their tokens."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hfkit.chat import ChatFormat, Encoded, Message, check_messages
from hfkit.data.conversations import messages_in
from hfkit.data.readers import OnBad, Row, report, text_of
from hfkit.settings import BadInput, ChatDataConfig


class PreferencePair(NamedTuple):
    """A conversation up to a question, with two answers."""

    asked: list[Message]
    chosen: str
    rejected: str
    where: str


def read_pairs(rows: Iterable[Row], config: ChatDataConfig, on_bad: OnBad = None) -> Iterator[PreferencePair]:
    """Yield the pair of each row: ``prompt`` (text or messages), ``chosen`` and ``rejected``.

    The answers are texts, or whole conversations that begin with the same messages and need no prompt.

    Args:
        on_bad: Is told of each row without a usable pair, which is left out.

    Raises:
        BadInput: at the first such row, if `on_bad` is not given; names its place.

    Example:
        >>> rows = [Row({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "a.jsonl:1")]
        >>> next(read_pairs(rows, ChatDataConfig())).chosen
        '4'
    """
    for row in rows:
        try:
            chosen, rejected = (_conversation(row, side, config) for side in ("chosen", "rejected"))
            if chosen[:-1] != rejected[:-1]:
                raise BadInput(f"{row.where}: chosen and rejected must differ in the last message alone")
            if chosen[-1]["content"] == rejected[-1]["content"]:
                raise BadInput(f"{row.where}: chosen and rejected are the same")
        except BadInput as problem:
            report(str(problem), on_bad)
        else:
            yield PreferencePair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], row.where)


def _conversation(row: Row, side: str, config: ChatDataConfig) -> list[Message]:
    """Return the conversation that ends with one of the two answers."""
    if isinstance(row.values.get(side), list):
        messages = messages_in(row, side)
    else:
        messages = [{"role": "assistant", "content": text_of(row, side, "data.train_files")}]
    prompt = row.values.get(config.prompt_column)
    if isinstance(prompt, list):
        messages = [*messages_in(row, config.prompt_column), *messages]
    elif prompt is not None or messages[0]["role"] == "assistant":
        messages = [{"role": "user", "content": text_of(row, config.prompt_column, "data.prompt_column")}, *messages]
    if problem := check_messages(messages):
        raise BadInput(f"{row.where}: {side}: {problem}")
    if messages[-1]["role"] != "assistant":
        raise BadInput(f"{row.where}: {side}: must end with the assistant's answer")
    return messages


def encode_pairs(chat: ChatFormat, pairs: Iterable[PreferencePair], tokens: int) -> list[tuple[Encoded, Encoded]]:
    """Return the pairs in tokens, the last answers alone learnt; those over ``tokens`` are left out."""
    encoded = []
    for pair in pairs:
        answers = [[*pair.asked, {"role": "assistant", "content": said}] for said in (pair.chosen, pair.rejected)]
        known = len(chat.prompt(pair.asked))
        sides = [Encoded(each.ids, each.learnt & (np.arange(len(each.ids)) >= known)) for each in chat.encode(answers)]
        if max(len(each.ids) for each in sides) <= tokens:
            encoded.append((sides[0], sides[1]))
    return encoded
