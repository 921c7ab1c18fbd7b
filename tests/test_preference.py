"""DPO: its gradient by hand, its limits, and that it learns a generated preference."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hfkit.chat import ChatFormat, Encoded
from hfkit.data.batches import Split
from hfkit.data.builtin_chat import builtin_preferences
from hfkit.data.preferences import encode_pairs, read_pairs
from hfkit.data.readers import Row
from hfkit.preference import PreferenceLoss, PreferencePairs, answer_log_probs, score_preferences
from hfkit.settings import BadInput, ChatDataConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent


def small(vocab_size: int = 64, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )


def some_pairs(count: int = 5) -> PreferencePairs:
    draw = np.random.default_rng(0)

    def side() -> Encoded:
        size = int(draw.integers(4, 9))
        return Encoded(draw.integers(6, 64, size), np.arange(size) >= 2)

    return PreferencePairs([(side(), side()) for _ in range(count)])


def test_log_probs_of_an_answer_are_the_sum_over_its_tokens() -> None:
    model, pairs = small(), some_pairs()
    batch = pairs.collate(np.arange(5))
    found = answer_log_probs(model, batch["input_ids"], batch["targets"])
    for row, encoded in enumerate(each for pair in pairs.pairs for each in pair):
        ids = torch.from_numpy(encoded.ids)
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
        expected = sum(log_probs[place, ids[place + 1]] for place in range(1, len(ids) - 1))
        assert torch.allclose(found[row], expected, atol=1e-5)


def test_gradient_equals_the_papers() -> None:
    # −β Σ σ(−β·margin) · (∇ log π(chosen) − ∇ log π(rejected)): equation 7's gradient
    model, pairs, beta = small(), some_pairs(3), 0.7
    pairs.reference = np.random.default_rng(1).normal(-10, 3, (3, 2)).astype(np.float32)
    batch = pairs.collate(np.arange(3))
    module = PreferenceLoss(model, beta)
    loss, count = module(**batch)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = [torch.zeros_like(gradient) for gradient in found]
    total = 0.0
    for pair in range(3):
        rows = slice(2 * pair, 2 * pair + 2)
        log_probs = answer_log_probs(model, batch["input_ids"][rows], batch["targets"][rows])
        margin = float((log_probs[0] - log_probs[1]).detach()) - float(
            pairs.reference[pair, 0] - pairs.reference[pair, 1]
        )
        factor = -beta / (1 + math.exp(beta * margin))
        total += math.log(1 + math.exp(-beta * margin))
        gradients = torch.autograd.grad(log_probs[0] - log_probs[1], list(model.parameters()))
        expected = [sum_ + factor * gradient for sum_, gradient in zip(expected, gradients, strict=True)]
    assert count == 3 and abs(float(loss.detach()) - total) < 1e-4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_beta_zero_has_no_gradient_and_the_reference_has_no_margin() -> None:
    model, pairs = small(), some_pairs()
    pairs.compute_reference(Accelerator(cpu=True), model)
    scores = score_preferences(Accelerator(cpu=True), PreferenceLoss(model, 0.1), pairs)
    assert abs(scores["eval_loss"] - math.log(2)) < 1e-6 and abs(scores["margin"]) < 1e-5 and scores["eval_pairs"] == 5
    loss, _ = PreferenceLoss(model, 0.0)(**pairs.collate(np.arange(5)))
    loss.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


def test_under_autocast_the_reference_and_the_score_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    model, pairs = small(), some_pairs()
    pairs.compute_reference(accelerator, model)
    exact = some_pairs()
    exact.compute_reference(Accelerator(cpu=True), model)
    assert np.abs(pairs.reference - exact.reference).max() > 1e-4  # bf16 it was
    scores = score_preferences(accelerator, PreferenceLoss(model, 0.1), pairs)
    assert (scores["accuracy"], scores["margin"]) == (0.5, 0.0)


def test_pairs_are_known_by_their_tokens_and_by_what_is_learnt_of_them() -> None:
    pairs, same, other = some_pairs(), some_pairs(), some_pairs()
    other.pairs[0][0].learnt[-1] = False
    assert pairs.digest() == same.digest() != other.digest()


def test_short_last_step_counts_its_pairs_alone() -> None:
    pairs = some_pairs(5)
    step = pairs.reader(Split(4, 4), seed=0, last=6)(1)
    loss, count = PreferenceLoss(small(), 0.1)(**step.micro_batches[0])
    assert step.targets == count == 2 and torch.isfinite(loss)


@pytest.mark.parametrize("seed", range(3))
def test_a_generated_preference_is_learnt(seed: int) -> None:
    rows = [Row(values, f"built-in:{number}") for number, values in enumerate(builtin_preferences(), 1)]
    texts = list(read_pairs(rows, ChatDataConfig()))
    tokenizer = train_tokenizer([text for pair in texts for text in pair[1:3]], TokenizerConfig(vocab_size=400))
    encoded = encode_pairs(ChatFormat(tokenizer), texts, 200)
    train, held_out = PreferencePairs(encoded[:200]), PreferencePairs(encoded[200:260])
    model, accelerator = small(len(tokenizer), seed), Accelerator(cpu=True)
    for part in (train, held_out):
        part.compute_reference(accelerator, model)
    module = PreferenceLoss(model, 0.1)
    assert score_preferences(accelerator, module, held_out)["accuracy"] == 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    read = train.reader(Split(8, 8), seed)
    for step in range(15):
        loss, count = module(**read(step).micro_batches[0])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score_preferences(accelerator, module, held_out)["accuracy"] >= 0.7


def read(values: dict) -> tuple:
    return next(read_pairs([Row(values, "a.jsonl:3")], ChatDataConfig()))


def test_pairs_of_texts_and_of_conversations_are_the_same() -> None:
    user = {"role": "user", "content": "Hi"}
    sides = {side: [user, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    plain = read({"prompt": "Hi", "chosen": "chosen", "rejected": "rejected"})
    assert plain == read(sides) == read({"prompt": [user], **{k: v[1:] for k, v in sides.items()}})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "a.jsonl:3: chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b"}, "a.jsonl:3: no column 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "a.jsonl:3: no column 'prompt'"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, r"a.jsonl:3: chosen: messages\[1\]: the assistant's content"),
    ],
)
def test_rows_without_a_pair_are_named(values: dict, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        read(values)


def test_the_recipe_raises_the_accuracy_and_says_so(tmp_path: Path) -> None:
    words = (
        "--train.max_steps 12 --train.eval_every 0 --optim.learning_rate 3e-3 --data.sequence_length 128 "
        "--tokenizer.vocab_size 400 --adapter.rank 4 --generation.max_new_tokens 4 "
        '--model.config_overrides {"hidden_size":32,"num_hidden_layers":1,"intermediate_size":64}'
    ).split()
    command = [sys.executable, "recipes/dpo.py", *words, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    result = json.loads((tmp_path / "result.json").read_text())
    assert first["accuracy"] == 0.5 and result["accuracy"] >= 0.7 and result["eval_loss"] < first["eval_loss"]
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
