"""Conversations: reading them in the schemas people use, holding some out, and packing whole ones into rows.

Packing is best-fit decreasing (Ding et al., 2024, arXiv:2404.10830): a conversation goes, longest first, into the row
with the least room that still holds it. No conversation is cut, none reads another, and the number of rows depends on
the lengths alone, so every epoch has as many; which of equally long conversations share a row is dealt anew each epoch.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hfkit.chat import ChatFormat, Encoded, Message, check_messages, cut_to_fit, set_template
from hfkit.data.batches import Batch, Reader, Split, Step
from hfkit.data.holdout import content_share, find_border
from hfkit.data.order import EMPTY, share_of_rank
from hfkit.data.readers import OnBad, Row, decode, report, text_of
from hfkit.data.shards import IGNORE_INDEX
from hfkit.data.sources import read_table
from hfkit.files import digest_of
from hfkit.settings import BadInput, ChatDataConfig, ModelConfig, TokenizerConfig
from hfkit.tokenizer import load_tokenizer, train_tokenizer

Item = TypeVar("Item", bound=tuple)


class Conversation(NamedTuple):
    """What was said, and where it is written."""

    messages: list[Message]
    where: str


def read_conversations(rows: Iterable[Row], config: ChatDataConfig, on_bad: OnBad = None) -> Iterator[Conversation]:
    """Yield the conversation of each row, up to its last answer.

    Args:
        on_bad: Is told of each row without a usable conversation, which is left out.

    Raises:
        BadInput: at the first such row, if `on_bad` is not given; names its place.

    Example:
        >>> rows = [Row({"instruction": "Add.", "input": "1, 2", "output": "3"}, "a.jsonl:1")]
        >>> next(read_conversations(rows, ChatDataConfig())).messages[0]
        {'role': 'user', 'content': 'Add.\\n\\n1, 2'}
    """
    for row in rows:
        try:
            messages = _messages_of(row, config)
            if problem := check_messages(messages):
                raise BadInput(f"{row.where}: {problem}")
            while messages and messages[-1]["role"] != "assistant":  # nothing can be learnt from what has no answer
                messages.pop()
            if not messages:
                raise BadInput(f"{row.where}: the assistant says nothing in this conversation")
        except BadInput as problem:
            report(str(problem), on_bad)
        else:
            yield Conversation(messages, row.where)


def _messages_of(row: Row, config: ChatDataConfig) -> list[Message]:
    """Return the messages of a row in the first schema that it fits."""
    columns = row.values.keys()
    if config.messages_column in columns:
        return messages_in(row, config.messages_column)
    if config.prompt_column in columns and config.completion_column in columns:
        user = text_of(row, config.prompt_column, "data.prompt_column")
        return _exchange(user, text_of(row, config.completion_column, "data.completion_column"))
    if {"instruction", "output"} <= columns:
        parts = [text_of(row, "instruction"), text_of(row, "input") if row.values.get("input") else ""]
        return _exchange("\n\n".join(filter(None, parts)), text_of(row, "output"))
    raise BadInput(
        f"{row.where}: no conversation in the columns {', '.join(columns)}; there must be {config.messages_column}, "
        f"or {config.prompt_column} and {config.completion_column}, or instruction and output. "
        "Set --data.messages_column, or --data.prompt_column and --data.completion_column."
    )


def _exchange(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def messages_in(row: Row, column: str) -> list[Message]:
    """Return the list of messages in a row's column, seen to be one."""
    value = row.values[column]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadInput(f'{row.where}: {column}: must be a list of {{"role": …, "content": …}}, not {value!r:.60}')
    messages = []
    for number, message in enumerate(value):
        own = Row(message, f"{row.where}: {column}[{number}]")
        messages.append({name: text_of(own, name, "data.messages_column") for name in ("role", "content")})
    return messages


@dataclass(frozen=True)
class ChatData:
    """Conversations ready for training, and what was done to them."""

    train: list[Encoded]
    validation: list[Encoded]
    held_out: list[Conversation]
    """The validation conversations as text, for samples."""
    key: str
    """Changes whenever a token of it does."""
    facts: dict[str, Any]
    """Counts for the audit: read, kept, cut, removed."""


class Texts(NamedTuple, Generic[Item]):
    """What the settings name, as text."""

    train: list[Item]
    validation: list[Item]
    unreadable: int
    """Rows left out under `data.on_error` skip."""


def load_texts(
    config: ChatDataConfig,
    read: Callable[[Iterable[Row], ChatDataConfig, OnBad], Iterator[Item]],
    builtin: Callable[[], list[dict[str, Any]]],
) -> Texts[Item]:
    """Return training and held-out items of the rows that the settings name.

    Args:
        read: Turns rows into items, the last field of which says where they are written.
        builtin: Gives the rows to use where the settings name none.
    """
    unreadable: list[str] = []
    on_bad = unreadable.append if config.on_error == "skip" else None

    def items(which: Literal["train", "validation"]) -> list[Item] | None:
        rows = read_table(config, which, on_bad)
        return None if rows is None else list(read(rows, config, on_bad))

    train, validation = items("train"), items("validation")
    if train is None and not config.is_builtin:
        raise BadInput("there is nothing to train on: give --data.train_files or --data.dataset")
    if train is None:
        values = islice(builtin(), config.max_documents)
        rows = (Row(row, f"built-in:{number}") for number, row in enumerate(values, 1))
        train = list(read(rows, config, on_bad))
    if validation is None and config.validation_share > 0:
        shares = [content_share(repr(item[:-1])) for item in train]
        border = find_border(shares, config.validation_share)
        validation = [item for item, share in zip(train, shares, strict=True) if share <= border]
        train = [item for item, share in zip(train, shares, strict=True) if share > border]
    if not train:
        raise BadInput("no conversation is left to train on; check data.train_files and data.validation_share")
    return Texts(train, validation or [], len(unreadable))


def chat_tokenizer(
    config: ChatDataConfig, model: ModelConfig, own: TokenizerConfig, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer named, else the model's, else one trained on ``texts``, with its chat template.

    The template is `data.chat_template`, else the tokenizer's own, else ours where the tokenizer has our chat tokens.
    """
    named = own if own.path else model
    tokenizer = load_tokenizer(named.path, named.revision) if named.path else train_tokenizer(texts, own)
    set_template(tokenizer, None if config.chat_template is None else _read_template(config.chat_template))
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        return decode(path.read_bytes())
    except BadInput as problem:
        raise BadInput(f"data.chat_template {path}: {problem}") from None


def load_conversations(config: ChatDataConfig, chat: ChatFormat, texts: Texts[Conversation]) -> ChatData:
    """Return the conversations in tokens; those that are too long for a row are cut after a turn.

    Raises:
        BadInput: if no training conversation fits.
    """
    train, validation, unreadable = texts
    counts: Counter[str] = Counter(unreadable=unreadable)
    encoded = {}
    for name, conversations in (("train", train), ("validation", validation)):
        whole = chat.encode([conversation.messages for conversation in conversations])
        cut = [cut_to_fit(each, config.sequence_length + 1) for each in whole]
        kept = [each for each in cut if each is not None]
        counts["too_long"] += len(cut) - len(kept)
        counts["cut"] += sum(a is not None and len(a.ids) < len(b.ids) for a, b in zip(cut, whole, strict=True))
        encoded[name] = kept
    if not encoded["train"]:
        raise BadInput(
            f"no conversation has an answer within data.sequence_length {config.sequence_length} tokens; raise it"
        )
    key = digest_of(
        [[each.ids.tolist(), each.learnt.nonzero()[0].tolist()] for part in encoded.values() for each in part]
    )
    facts = {
        "documents": {"read": len(train) + len(validation) + unreadable, "kept": sum(map(len, encoded.values()))},
        "removed": {name: counts[name] for name in ("unreadable", "too_long")},
        "cut_at_a_turn": counts["cut"],
        "splits": {
            name: {"conversations": len(part), "tokens": sum(len(each.ids) for each in part)}
            for name, part in encoded.items()
        },
    }
    return ChatData(encoded["train"], encoded["validation"], validation, key, facts)


def pack(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return an epoch's rows as arrays of conversation numbers; a pure function of its arguments.

    Args:
        lengths: (conversations,) tokens each takes in a row, at most ``capacity``.

    Example:
        >>> rows = pack(np.array([3, 5, 2, 6]), capacity=8, seed=0, epoch=0)
        >>> sorted(sorted(row.tolist()) for row in rows)
        [[0, 1], [2, 3]]
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens → rows with so many
    rooms: list[int] = []  # its keys, ascending
    for number in order:
        length = int(lengths[number])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(number)
        if room - length not in with_room:
            with_room[room - length] = []
            insort(rooms, room - length)
        with_room[room - length].append(row)
    return [np.array(rows[row]) for row in generator.permutation(len(rows))]


class PackedChat:
    """Conversations packed into rows of ``length`` inputs; one of n tokens takes n − 1: its last has no target."""

    def __init__(self, conversations: Sequence[Encoded], length: int, seed: int = 0) -> None:
        self.conversations, self.length = conversations, length
        self.sizes = np.array([len(each.ids) - 1 for each in conversations], dtype=np.int64)
        self.targets = np.array([each.learnt[1:].sum() for each in conversations], dtype=np.int64)
        self.rows = lru_cache(2)(lambda epoch: pack(self.sizes, length, seed, epoch))

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.rows(0))

    @property
    def useful_share(self) -> float:
        """Share of the rows' slots that hold a token of a conversation."""
        return float(self.sizes.sum() / (self.num_rows * self.length))

    def reader(self, split: Split, last: int | None = None) -> Reader:
        """Return step → this process's packed rows; ``last`` is the total of rows, where that is no whole step."""

        def read(step: int) -> Step:
            places = split.positions(step, last)
            rows = [self.rows(place // self.num_rows)[place % self.num_rows] for place in places.tolist()]
            shares = split.share(len(rows))
            batches = [self.collate([rows[n] for n in slots if n != EMPTY], len(slots)) for slots in shares]
            chosen = np.concatenate(rows)
            names = f"conversations {', '.join(map(str, chosen[:8]))}{' …' if len(chosen) > 8 else ''}"
            return Step(batches, int(self.targets[chosen].sum()), int(self.sizes[chosen].sum()), names)

        return read

    def every_row(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this process's share of all conversations once; every process yields as many batches."""
        rows = self.rows(0)
        for slots in share_of_rank(np.arange(len(rows)), rank, world_size, batch_size):
            yield self.collate([rows[n] for n in slots if n != EMPTY], len(slots))

    def collate(self, rows: Sequence[np.ndarray], count: int) -> Batch:
        """Return the batch of some rows, filled up to ``count`` of them; positions restart at each conversation."""
        shape = (count, self.length)
        ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions = np.tile(np.arange(self.length), (count, 1))
        for row, numbers in enumerate(rows):
            start = 0
            for number in numbers:
                tokens, learnt = self.conversations[number]
                end = start + len(tokens) - 1
                ids[row, start:end] = tokens[:-1]
                targets[row, start:end] = np.where(learnt[1:], tokens[1:], IGNORE_INDEX)
                positions[row, start:end] = np.arange(end - start)
                start = end
            positions[row, start:] = np.arange(self.length - start)  # the empty slots are one more document
        arrays = {"input_ids": ids, "targets": targets, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
