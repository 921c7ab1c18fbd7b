"""Scores against plain transformers, document by document, and the same for every batch size and process count."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from hfkit import evaluation
from hfkit.data.prepare import prepare_data
from hfkit.data.shards import TokenStream
from hfkit.evaluation import first_words, score_held_out, score_text
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm
from hfkit.settings import DataConfig, ModelConfig, TokenizerConfig
from hfkit.tokenizer import encode_documents, train_tokenizer
from processes import run_in_processes
from runs import write_corpus
from streams import number_documents, write_stream

SHAPE = [30, 1, 2, 17, 9, 40, 16, 5]
TARGETS = sum(SHAPE) - len(SHAPE)
NUM_BYTES = 321
TEXTS = ["One two three four five six seven eight nine ten.", "Red green blue.", "East west.", "Up down left right."]


def build_model() -> PreTrainedModel:
    """A tiny model whose logits are far from uniform, so that a wrong context shows."""
    overrides = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=262))
    model = build_causal_lm(ModelConfig(preset="tiny", config_overrides=overrides), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def score(stream: TokenStream, length: int, batch_size: int) -> tuple[dict[str, float], int]:
    """Return the scores and the number of processes that made them."""
    accelerator = Accelerator(cpu=True)
    module = accelerator.prepare(CausalLMLoss(build_model()))
    return score_text(accelerator, module, [stream], NUM_BYTES, length, batch_size), accelerator.num_processes


def plain_nats(documents: list[list[int]], length: int) -> float:
    """Summed nats by transformers' own loss, one window of one document at a time."""
    model, nats = build_model().eval(), 0.0
    for document in documents:
        for begin in range(0, len(document) - 1, length):
            window = torch.tensor([document[begin : begin + length + 1]])
            with torch.no_grad():
                nats += model(input_ids=window, labels=window).loss.double().item() * (window.shape[1] - 1)
    return nats


@pytest.mark.parametrize("length", [8, 64])
def test_scores_equal_plain_transformers_for_every_batch_size_and_process_count(length: int, tmp_path: Path) -> None:
    documents = number_documents(SHAPE)
    stream = write_stream(tmp_path, documents, vocab_size=262)
    nats = plain_nats(documents, length)
    for batch_size in (1, 3, 8):
        scores, _ = score(stream, length, batch_size)
        assert scores["eval_tokens"] == TARGETS and scores["eval_bytes"] == NUM_BYTES
        assert scores["eval_loss"] == pytest.approx(nats / TARGETS, rel=1e-6)
        assert scores["perplexity"] == pytest.approx(math.exp(nats / TARGETS), rel=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / NUM_BYTES, rel=1e-6)
    (first, count), (second, _) = run_in_processes(2, lambda: score(stream, length, 3))
    assert count == 2 and first == second
    assert first == pytest.approx(scores, rel=1e-5)


def test_a_window_sees_nothing_before_its_start(tmp_path: Path) -> None:
    documents = number_documents(SHAPE)
    stream = write_stream(tmp_path, documents, vocab_size=262)
    assert abs(score(stream, 8, 4)[0]["eval_loss"] - plain_nats(documents, 64) / TARGETS) > 1e-3


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(tmp_path: Path) -> None:
    accelerator, module = Accelerator(cpu=True), CausalLMLoss(build_model())
    with torch.no_grad():
        module.model.get_output_embeddings().weight.zero_()
    scores = score_text(accelerator, module, [write_stream(tmp_path, [[1, 2, 3, 0]], 262)], 5, 8, 1)
    vocabulary = module.model.config.vocab_size
    assert scores["eval_tokens"] == 3
    assert scores["eval_loss"] == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(3 * math.log2(vocabulary) / 5, rel=1e-6)


def test_prompts_are_the_beginnings_of_documents_or_passages_of_the_only_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))
    stream = write_stream(tmp_path, encode_documents(tokenizer, TEXTS), len(tokenizer))
    assert first_words(tokenizer, stream, count=2, words=3) == ["One two three", "East west."]
    one = write_stream(tmp_path, encode_documents(tokenizer, [TEXTS[0]]), len(tokenizer), "one")
    prompts = first_words(tokenizer, one, count=2, words=3)
    assert prompts[0] == "One two three" and len(prompts) == 2 and prompts[1] in TEXTS[0]


def test_prompts_leave_room_in_few_positions_and_blank_text_gives_none(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=262))
    stream = write_stream(tmp_path, encode_documents(tokenizer, TEXTS), len(tokenizer))
    prompts = first_words(tokenizer, stream, positions=16)
    assert prompts and all(len(prompt) <= 8 for prompt in prompts)
    assert first_words(tokenizer, stream, positions=1) == []
    blank = write_stream(tmp_path, encode_documents(tokenizer, [" \n", "\n\n", " "]), len(tokenizer), "blank")
    assert first_words(tokenizer, blank) == []


def test_of_training_text_the_beginning_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    settings = DataConfig(train_files=corpus, validation_share=0, cache_dir=tmp_path / "cache")
    data = prepare_data(settings, TokenizerConfig(vocab_size=262))
    stream = data.train[0]
    monkeypatch.setattr(evaluation, "SCORED", int(stream.starts[9]) + 1)
    scores = score_held_out(Accelerator(cpu=True), CausalLMLoss(build_model()), data, length=32)
    texts = [str(data.tokenizer.decode(stream.document(number)[:-1])) for number in range(10)]
    assert scores["eval_tokens"] == stream.starts[10] - 10
    assert scores["eval_bytes"] == len("".join(texts).encode())
