"""Conversations as tokens: what a tokenizer's chat template writes, and which of it a model learns to say.

The template is rendered once for each sequence of roles, with a placeholder for each message's content. What it writes
around the placeholders is encoded with its special tokens; every content is encoded by itself, untrimmed and as plain
characters. So a message cannot inject a special token, cannot change how its neighbours are cut into tokens, and the
tokens that carry loss are known exactly: those inside the template's ``{% generation %}`` blocks, which must hold the
assistant's content and the token that ends its turn.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hfkit.settings import BadInput
from hfkit.tokenizer import ASSISTANT, CHAT_TEMPLATE, END_OF_TURN, SYSTEM, USER, encode_texts

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template writes


class Encoded(NamedTuple):
    """A conversation in tokens."""

    ids: np.ndarray
    """(tokens,) int64."""
    learnt: np.ndarray
    """(tokens,) bool: the assistant's words and the tokens that end its turns."""


class Piece(NamedTuple):
    """Part of a rendered template: fixed ids, or the content of a message."""

    ids: list[int]
    message: int | None
    learnt: bool


class ChatFormat:
    """How one tokenizer writes conversations.

    Raises:
        BadInput: if the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise BadInput(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, nor our chat tokens; "
                "give --data.chat_template a Jinja file, or a model pretrained with hfkit"
            )
        self.layouts: dict[tuple[tuple[str, ...], bool], list[Piece]] = {}

    @property
    def marked(self) -> bool:
        """Whether the template marks what the assistant says, as teaching needs and talking does not."""
        return bool(re.search(r"{%-?\s*generation\s*-?%}", self.tokenizer.chat_template))

    def _require_marks(self) -> None:
        if not self.marked:
            raise BadInput(
                "the chat template does not mark what the assistant says; put {% generation %} … {% endgeneration %} "
                "around its content and end-of-turn token and give the file as --data.chat_template"
            )

    @cached_property
    def end_id(self) -> int:
        """The token that ends the assistant's turn.

        Raises:
            BadInput: if the template teaches none, so that a model would never learn to stop.
        """
        self._require_marks()
        pieces = self._layout(("user", "assistant"), False)
        content = next(place for place, piece in enumerate(pieces) if piece.message == 1)
        special = set(self.tokenizer.all_special_ids)
        after = [token for piece in pieces[content + 1 :] if piece.learnt for token in piece.ids if token in special]
        if not after:
            raise BadInput(
                "the chat template has no special token after the assistant's content inside {% generation %}, so the "
                "model would never learn to stop; move the end-of-turn token into the block"
            )
        return after[0]

    def encode(self, conversations: Sequence[list[Message]]) -> list[Encoded]:
        """Return conversations in tokens."""
        self._require_marks()
        contents = iter(encode_texts(self.tokenizer, [m["content"] for messages in conversations for m in messages]))
        encoded = []
        for messages in conversations:
            own = [next(contents) for _ in messages]
            pieces = self._layout(tuple(message["role"] for message in messages), False)
            encoded.append(_join(pieces, own))
        return encoded

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the tokens after which the assistant answers."""
        own = encode_texts(self.tokenizer, [message["content"] for message in messages])
        return _join(self._layout(tuple(message["role"] for message in messages), True), own).ids.tolist()

    def _layout(self, roles: tuple[str, ...], prompt: bool) -> list[Piece]:
        if (roles, prompt) not in self.layouts:
            self.layouts[roles, prompt] = self._render(roles, prompt)
        return self.layouts[roles, prompt]

    def _render(self, roles: tuple[str, ...], prompt: bool) -> list[Piece]:
        """Cut what the template writes for these roles at the contents and the edges of its generation blocks."""
        messages = [{"role": role, "content": f"\ue000{place}\ue001"} for place, role in enumerate(roles)]
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **cast(dict[str, Any], self.tokenizer.special_tokens_map),
            )
        except jinja2.TemplateError as error:
            raise BadInput(f"the chat template refuses the roles {', '.join(roles)}: {error}") from None
        text: str = rendered[0][0]
        spans: list[tuple[int, int]] = rendered[1][0]
        contents = {match.start(): match for match in PLACEHOLDER.finditer(text)}
        if [int(match[1]) for match in contents.values()] != list(range(len(roles))):
            raise BadInput(f"the chat template does not write every message of {', '.join(roles)} once and in order")
        edges = {0, len(text), *(edge for span in spans for edge in span)}
        edges |= {edge for match in contents.values() for edge in match.span()}
        pieces = []
        for start, end in zip(sorted(edges), sorted(edges)[1:], strict=False):
            learnt = any(first <= start and end <= last for first, last in spans)
            content = contents.get(start)
            ids = [] if content else self.tokenizer.encode(text[start:end], add_special_tokens=False)
            pieces.append(Piece(ids, int(content[1]) if content else None, learnt))
        return pieces


def _join(pieces: list[Piece], contents: list[list[int]]) -> Encoded:
    parts = [piece.ids if piece.message is None else contents[piece.message] for piece in pieces]
    learnt = [np.full(len(part), piece.learnt) for part, piece in zip(parts, pieces, strict=True)]
    return Encoded(np.array([token for part in parts for token in part], dtype=np.int64), np.concatenate(learnt))


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
    """Store a chat template in the tokenizer: the one given, else its own, else ours where it has our chat tokens."""
    known = tokenizer.get_vocab()
    if template is not None:
        tokenizer.chat_template = template
    elif tokenizer.chat_template is None and all(token in known for token in (SYSTEM, USER, ASSISTANT, END_OF_TURN)):
        tokenizer.chat_template = CHAT_TEMPLATE


def check_messages(messages: list[Message]) -> str | None:
    """Return what is wrong with a conversation, or None.

    Example:
        >>> check_messages([{"role": "assistant", "content": "Hello!"}])
        'the conversation starts with the assistant; the first message must be of the system or the user'
    """
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            return f"messages[{number}]: unknown role {message['role']!r}; the roles are {', '.join(ROLES)}"
        if not message["content"].strip():
            return f"messages[{number}]: the {message['role']}'s content is empty"
        if message["role"] == "system" and number:
            return f"messages[{number}]: the system's message comes first or not at all"
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] == ["assistant"]:
        return "the conversation starts with the assistant; the first message must be of the system or the user"
    return None


def cut_to_fit(encoded: Encoded, tokens: int) -> Encoded | None:
    """Return the conversation up to the last assistant's turn that ends within ``tokens``, or None if none does.

    Example:
        >>> turns = Encoded(np.arange(6), np.array([0, 1, 1, 0, 1, 0], dtype=bool))
        >>> cut_to_fit(turns, 9).ids.tolist(), cut_to_fit(turns, 4).ids.tolist(), cut_to_fit(turns, 2)
        ([0, 1, 2, 3, 4], [0, 1, 2], None)
    """
    ends = np.flatnonzero(encoded.learnt & ~np.append(encoded.learnt[1:], False)) + 1
    ends = ends[ends <= tokens]
    return Encoded(encoded.ids[: ends[-1]], encoded.learnt[: ends[-1]]) if len(ends) else None
