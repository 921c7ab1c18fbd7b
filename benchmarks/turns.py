"""Does a chat model keep the form of a conversation over several turns of its own answers?

    python benchmarks/turns.py runs/sft/model held_out.jsonl      # or without a file: the built-in conversations

Each held-out conversation's first three user messages are put to the model, whose own answers stand between them. An
answer keeps the form if it ends by itself, says something, and holds no marker of a role.
"""

import json
import sys
from pathlib import Path

from hfkit.chat import ChatFormat, Message
from hfkit.data.builtin_chat import builtin_conversations
from hfkit.data.conversations import load_texts, read_conversations
from hfkit.generation import Completion
from hfkit.model import load_causal_lm
from hfkit.replies import answer
from hfkit.settings import ChatDataConfig, GenerationSettings, ModelConfig
from hfkit.tokenizer import SPECIAL_TOKENS, load_tokenizer

TURNS, MOST = 3, 64
SETTINGS = GenerationSettings(max_new_tokens=100, temperature=0)


def keeps_form(reply: Completion) -> bool:
    """Whether an answer ended by itself, says something and writes no marker of a role or end."""
    return reply.finish == "end" and bool(reply.text.strip()) and not any(mark in reply.text for mark in SPECIAL_TOKENS)


def main(folder: str, data: str | None = None) -> None:
    """Hold the conversations, all of them at once, turn by turn."""
    texts = load_texts(ChatDataConfig(validation_files=data), read_conversations, builtin_conversations)
    asked = [[m["content"] for m in talk.messages if m["role"] == "user"][:TURNS] for talk in texts.validation]
    asked = [questions for questions in asked if len(questions) == TURNS][:MOST]
    chat, model = ChatFormat(load_tokenizer(folder)), load_causal_lm(ModelConfig(path=folder))
    talks: list[list[Message]] = [[] for _ in asked]
    kept = []
    for turn in range(TURNS):
        for talk, questions in zip(talks, asked, strict=True):
            talk.append({"role": "user", "content": questions[turn]})
        replies = answer(model, chat, talks, SETTINGS, seed=0)
        for talk, reply in zip(talks, replies, strict=True):
            talk.append({"role": "assistant", "content": reply.text})
        kept.append(sum(map(keeps_form, replies)) / len(replies))
    print(json.dumps({"conversations": len(asked), "form_kept": [round(share, 4) for share in kept]}))
    for message in talks[0]:
        print(f"{message['role']}: {message['content']}", file=sys.stderr)


if __name__ == "__main__":
    main(*[str(Path(word)) for word in sys.argv[1:]])
