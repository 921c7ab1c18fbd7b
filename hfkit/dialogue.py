"""A conversation with a model that goes on: what was said, what still fits the model's window, the next answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfkit.chat import ChatFormat, Message, check_messages
from hfkit.data.conversations import messages_in
from hfkit.data.readers import JSON_LINES, check_text, read_rows, split_name
from hfkit.files import make_parent, write_atomic
from hfkit.generation import Completion, stream
from hfkit.model import find_length
from hfkit.settings import BadInput, GenerationSettings


@dataclass(frozen=True)
class Reply:
    """An answer, and how much of the conversation the model could not see for it."""

    completion: Completion
    hidden: int
    """Messages, the oldest but the system's, that did not fit the window."""


class Dialogue:
    """Messages so far and how the model answers them.

    The model sees the system message and the newest turns that leave room for an answer; the messages themselves are
    all kept, and saved.
    """

    def __init__(self, model: PreTrainedModel, chat: ChatFormat, settings: GenerationSettings, seed: int) -> None:
        self.model, self.chat, self.settings, self.seed = model, chat, settings, seed
        self.messages: list[Message] = []
        self.window = find_length(model.config)

    def reply(self, text: str, write: Callable[[str], None]) -> Reply:
        """Add the user's message and the model's answer, passed to ``write`` as it is made; Ctrl-C ends the answer.

        An answer without a word is not kept, and neither is what it answered.

        Raises:
            BadInput: if the message is empty, no valid text, or alone too long for the window; it is not kept.
        """
        if not text.strip():
            raise BadInput("the message is empty")
        check_text(text, "the message")
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt, hidden = self._fit(asked)
        room = self.window - len(prompt)
        settings = replace(self.settings, max_new_tokens=min(self.settings.max_new_tokens, room))
        completion = stream(self.model, self.chat.tokenizer, prompt, settings, self.seed + len(asked), write)
        if completion.text.strip():
            self.messages = [*asked, {"role": "assistant", "content": completion.text}]
        return Reply(completion, hidden)

    def _fit(self, asked: list[Message]) -> tuple[list[int], int]:
        """Return the prompt of the newest turns that fit, and how many messages do not."""
        system, rest = _split_system(asked)
        room = self.window - min(self.settings.max_new_tokens, self.window // 2)
        hidden = 0
        while len(prompt := self.chat.prompt([*system, *rest[hidden:]])) > room:
            following = [place for place in range(hidden + 1, len(rest)) if rest[place]["role"] == "user"]
            if not following:
                raise BadInput(f"the message makes a prompt of {len(prompt)} tokens and the model has room for {room}")
            hidden = following[0]
        return prompt, hidden

    def set_system(self, text: str) -> None:
        """Replace the system message; an empty text removes it."""
        check_text(text, "the system message")
        system = [{"role": "system", "content": text}] if text else []
        self.messages = [*system, *_split_system(self.messages)[1]]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = _split_system(self.messages)[0]

    def change_settings(self, words: list[str]) -> None:
        """Change settings given as ``name=value``.

        Raises:
            BadInput: for a name that does not exist or a value without meaning; nothing is changed.
        """
        kinds = {field.name: type(getattr(self.settings, field.name)) for field in fields(self.settings)}
        changes: dict[str, Any] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in kinds or name == "num_samples":
                raise BadInput(f"there is no {name!r}; there are {', '.join(kinds.keys() - {'num_samples'})}")
            try:
                changes[name] = value.split("|") if kinds[name] is list else kinds[name](value)
            except ValueError:
                raise BadInput(f"{name} must be a number, not {value!r}") from None
        self.settings = replace(self.settings, **changes)

    def save(self, path: Path) -> None:
        """Write the messages as one row of JSON, which ``sft.py`` reads too.

        Raises:
            BadInput: if the file cannot be written, or ``load`` would not read one of this name.
        """
        check_file(path, "save")
        try:
            write_atomic(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Replace the messages by those of a file that ``save`` wrote.

        Raises:
            BadInput: if it holds no conversation; nothing is changed.
        """
        if not path.is_file():
            raise BadInput(f"{path} does not exist")
        row = next(iter(read_rows(path)))
        if "messages" not in row.values:
            raise BadInput(f"{row.where}: no column 'messages'")
        messages = messages_in(row, "messages") if row.values["messages"] else []
        if problem := check_messages(messages):
            raise BadInput(f"{row.where}: {problem}")
        self.messages = messages


def check_file(path: Path, name: str) -> None:
    """Make the folder of a file for a conversation, and see that its name says what is in it.

    Args:
        name: What a complaint calls it.

    Raises:
        BadInput: where the folder cannot be made, or the file would not be read back.
    """
    if split_name(path) not in [(ending, "") for ending in JSON_LINES]:
        raise BadInput(f"{name} {path}: a conversation is a row of JSON; let the name end in .jsonl")
    make_parent(path, name)


def _split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return the system message, if there is one, and the others."""
    count = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:count], messages[count:]
