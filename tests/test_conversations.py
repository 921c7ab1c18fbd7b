"""Conversations from rows of several schemas, held out by content, and packed without changing what is learnt."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hfkit.chat import ChatFormat, Encoded
from hfkit.data.batches import Split
from hfkit.data.builtin_chat import builtin_conversations
from hfkit.data.conversations import (
    PackedChat,
    chat_tokenizer,
    load_conversations,
    load_texts,
    pack,
    read_conversations,
)
from hfkit.data.readers import Row
from hfkit.losses import CausalLMLoss
from hfkit.settings import BadInput, ChatDataConfig, ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer

SHARED = Path(os.environ.get("HFKIT_TEST_DATA") or Path(__file__).parent.parent.parent / "shared/data")


def read(values: dict, **changes: str) -> list[dict]:
    return next(read_conversations([Row(values, "a.jsonl:7")], ChatDataConfig(**changes))).messages  # type: ignore[arg-type]


def test_schemas_are_recognised() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello"}]
    assert read({"id": 1, "messages": talk}) == talk
    assert read({"chat": talk}, messages_column="chat") == talk
    assert read({"prompt": "Hi", "completion": " Hello"}) == talk
    assert read({"q": "Hi", "a": " Hello"}, prompt_column="q", completion_column="a") == talk
    assert read({"instruction": "Hi", "input": "", "output": " Hello"}) == talk
    assert read({"instruction": "Hi", "input": "there", "output": "x"})[0]["content"] == "Hi\n\nthere"
    assert read({"messages": [*talk, {"role": "user", "content": "Bye"}]}) == talk  # no answer: nothing to learn


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": "x"}, "a.jsonl:7: no conversation in the columns text"),
        ({"messages": "x"}, "a.jsonl:7: messages: must be a list"),
        ({"messages": [{"role": "user"}]}, r"a.jsonl:7: messages\[0\]: no column 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, r"a.jsonl:7: messages\[0\]: content: is null"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "a.jsonl:7: the conversation starts with"),
        ({"messages": [{"role": "user", "content": "a"}]}, "a.jsonl:7: the assistant says nothing"),
        ({"prompt": "a", "completion": " "}, r"a.jsonl:7: messages\[1\]: the assistant's content is empty"),
    ],
)
def test_rows_without_a_conversation_are_named(values: dict, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        read(values)
    told: list[str] = []
    rows = [Row(values, "a.jsonl:7")]
    assert list(read_conversations(rows, ChatDataConfig(), told.append)) == [] and len(told) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 5))
def test_packing_holds_every_conversation_once_in_as_many_rows_every_epoch(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    epochs = [pack(sizes, 20, seed, epoch) for epoch in (0, 1)]
    for rows in epochs:
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert max(int(sizes[row].sum()) for row in rows) <= 20
    assert len(epochs[0]) == len(epochs[1])
    assert all(np.array_equal(a, b) for a, b in zip(epochs[0], pack(sizes, 20, seed, 0), strict=True))


def test_packing_is_best_fit() -> None:
    # 7 and 6 open rows of 10; 4 fits the second alone (best), 3 the first: two full rows, where next-fit needs three.
    rows = pack(np.array([7, 6, 4, 3]), 10, seed=0, epoch=0)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 3], [1, 2]]


def encoded(count: int, seed: int = 0) -> list[Encoded]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(draw.integers(3, 20))
        learnt = draw.random(size) < 0.5
        learnt[-1] = True
        made.append(Encoded(draw.integers(6, 64, size), learnt))
    return made


def test_packed_loss_is_the_sum_of_the_conversations_losses() -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    module = CausalLMLoss(LlamaForCausalLM(shape)).eval()
    conversations = encoded(17)
    packed = PackedChat(conversations, 40)
    assert packed.num_rows < 17
    with torch.no_grad():
        together = [module(**batch) for batch in packed.every_row(3)]
        alone = [
            module(
                input_ids=torch.tensor(ids[None, :-1]),
                targets=torch.tensor(np.where(learnt[1:], ids[1:], -100)[None]),
            )
            for ids, learnt in conversations
        ]
    assert sum(int(n) for _, n in together) == sum(int(n) for _, n in alone) == packed.targets.sum()
    total = sum(float(loss) for loss, _ in alone)
    assert abs(sum(float(loss) for loss, _ in together) - total) < 1e-5 * total


def test_steps_read_the_same_rows_for_any_split() -> None:
    packed = PackedChat(encoded(30), 40)
    whole = packed.reader(Split(4, 4))
    for step in (0, 1, packed.num_rows):  # the last lies in a later epoch
        expected = whole(step)
        halves = [packed.reader(Split(4, 1, rank, 2))(step) for rank in (0, 1)]
        assert all((half.targets, half.tokens) == (expected.targets, expected.tokens) for half in halves)
        rows = [batch["input_ids"] for pair in zip(*(h.micro_batches for h in halves), strict=True) for batch in pair]
        assert torch.equal(torch.cat(rows), expected.micro_batches[0]["input_ids"])
        counted = sum(int((batch["targets"] != -100).sum()) for batch in expected.micro_batches)
        assert counted == expected.targets


def test_a_short_last_step_counts_what_it_holds() -> None:
    packed = PackedChat(encoded(30), 40)
    step = packed.reader(Split(4, 2), last=5)(1)
    assert len(step.micro_batches) == 1 and step.targets == int((step.micro_batches[0]["targets"] != -100).sum())


def chat_format() -> ChatFormat:
    texts = [m["content"] for row in builtin_conversations()[:200] for m in row["messages"]]
    return ChatFormat(train_tokenizer(texts, TokenizerConfig(vocab_size=600)))


def test_builtin_conversations_are_held_out_by_content_and_long_ones_cut_after_a_turn() -> None:
    texts = load_texts(ChatDataConfig(), read_conversations, builtin_conversations)
    assert 0.05 < len(texts.validation) / (len(texts.train) + len(texts.validation)) < 0.15
    assert not {repr(c.messages) for c in texts.train} & {repr(c.messages) for c in texts.validation}
    chat = chat_format()
    data = load_conversations(ChatDataConfig(sequence_length=40), chat, texts)
    assert data.facts["cut_at_a_turn"] > 0
    assert all(len(each.ids) <= 41 and each.ids[-1] == chat.end_id for each in data.train)
    assert data.key != load_conversations(ChatDataConfig(sequence_length=41), chat, texts).key
    with pytest.raises(BadInput, match="raise it"):
        load_conversations(ChatDataConfig(sequence_length=3), chat, texts)


def test_what_is_named_is_what_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text('{"prompt": "Hi", "completion": "Hello"}\n')
    only = ChatDataConfig(validation_files=str(tmp_path / "v.jsonl"))
    with pytest.raises(BadInput, match=r"nothing to train on: give --data.train_files"):
        load_texts(only, read_conversations, builtin_conversations)
    with pytest.raises(BadInput, match=r"data.test_files and test_split: .* leave them out"):
        ChatDataConfig(train_files="t.jsonl", test_files="t.jsonl")
    few = load_texts(ChatDataConfig(max_documents=20), read_conversations, builtin_conversations)
    assert len(few.train) + len(few.validation) == 20


def test_a_template_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"caf\xe9")
    config = ChatDataConfig(chat_template=tmp_path / "t.jinja")
    with pytest.raises(BadInput, match=r"data.chat_template .*t.jinja: byte 4 is not UTF-8"):
        chat_tokenizer(config, ModelConfig(), TokenizerConfig(vocab_size=300), ["a"])


def test_the_tokenizer_named_comes_before_the_models_and_that_before_a_new_one(tmp_path: Path) -> None:
    for name, size in (("named", 300), ("models", 320)):
        train_tokenizer(["a b c d " * 40], TokenizerConfig(vocab_size=size)).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("named", "models")}

    def chosen(own: str | None, model: str | None) -> str:
        tokenizer = chat_tokenizer(
            ChatDataConfig(), ModelConfig(path=model), TokenizerConfig(path=own, vocab_size=290), ["a b"]
        )
        return tokenizer.name_or_path

    assert chosen(paths["named"], paths["models"]) == paths["named"]
    assert chosen(None, paths["models"]) == paths["models"]
    assert chosen(None, None) == ""


def test_unreadable_rows_stop_or_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)] + [{"prompt": "x", "completion": ""}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=r"a.jsonl:31: messages\[1\]: the assistant's content is empty"):
        load_texts(ChatDataConfig(train_files=str(path)), read_conversations, builtin_conversations)
    texts = load_texts(
        ChatDataConfig(train_files=str(path), on_error="skip"), read_conversations, builtin_conversations
    )
    assert (len(texts.train) + len(texts.validation), texts.unreadable) == (30, 1)


@pytest.mark.skipif(not (SHARED / "sgd-chat").is_dir(), reason="the optional shared data is not here")
@pytest.mark.parametrize(("name", "count"), [("sgd-chat", 1728), ("instruct-1k", 935)])
def test_real_sets_read_whole_and_fill_their_rows(name: str, count: int) -> None:
    config = ChatDataConfig(
        train_files=str(SHARED / name / "train.jsonl.gz"), validation_files=str(SHARED / name / "validation.jsonl.gz")
    )
    texts = load_texts(config, read_conversations, builtin_conversations)
    with gzip.open(SHARED / name / "train.jsonl.gz") as file:
        assert len(texts.train) == count == sum(1 for _ in file)
    contents = [message["content"] for conversation in texts.train for message in conversation.messages]
    chat = ChatFormat(train_tokenizer(contents, TokenizerConfig(vocab_size=2000)))
    packed = PackedChat(load_conversations(config, chat, texts).train, config.sequence_length)
    assert packed.useful_share >= 0.95
