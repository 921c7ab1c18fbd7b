"""Losses: the chunked one against plain cross-entropy and against transformers, in value and in every gradient."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, MarianConfig, MarianMTModel, PreTrainedModel

import hfkit.losses
from hfkit.data.shards import IGNORE_INDEX
from hfkit.losses import CausalLMLoss, chunked_cross_entropy, has_plain_head, score_rows
from tiny import tiny_model, tiny_tokenizer

ROWS, WIDTH, VOCABULARY = 37, 12, 50


@pytest.fixture(params=[1, 50, 260, 1 << 22], ids=lambda size: f"chunk{size}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Logits held at once: a row, a row, five rows (the last chunk is short), all rows."""
    monkeypatch.setattr(hfkit.losses, "CHUNK", request.param)
    monkeypatch.setattr(hfkit.losses, "LEAST_ROWS", 1)
    yield request.param


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (ROWS,))
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    return functional.cross_entropy(
        hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )


def plain_with_z_loss(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """PaLM's objective as autograd sees it."""
    counted = targets != IGNORE_INDEX
    loss = functional.cross_entropy(logits[counted], targets[counted], reduction="sum", label_smoothing=smoothing)
    return loss + z_loss * (torch.logsumexp(logits[counted], -1) ** 2).sum()


@pytest.mark.parametrize("score", [score_rows, torch.compile(score_rows, backend="eager")], ids=["eager", "compiled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(chunk: int, smoothing: float, score: Any) -> None:
    hidden, weight, targets = draw()
    ours = chunked_cross_entropy(hidden, weight, targets, 0.37, smoothing, z_loss=0.02, score=score)
    assert torch.allclose(ours, plain(hidden, weight, targets, smoothing), rtol=1e-6)
    expected = plain_with_z_loss(hidden @ weight.T, targets, smoothing, 0.02)
    gradients = torch.autograd.grad(0.37 * ours, (hidden, weight))
    for ours_, theirs in zip(gradients, torch.autograd.grad(0.37 * expected, (hidden, weight)), strict=True):
        assert torch.allclose(ours_, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["gemma2", "llama"])
def test_z_loss_of_models_of_either_path(model_type: str) -> None:
    model = own_head_model(model_type) if model_type in OWN_HEADS else tiny_model()
    judge = copy.deepcopy(model)
    inputs, targets = draw_ids()
    module = CausalLMLoss(model, label_smoothing=0.1, z_loss=0.02).train()
    loss, _ = module(inputs, targets)
    assert torch.allclose(loss, CausalLMLoss(copy.deepcopy(model), 0.1).train()(inputs, targets)[0], rtol=1e-6)
    loss.backward()
    plain_with_z_loss(judge(inputs).logits.flatten(0, 1), targets.flatten(), 0.1, 0.02).backward()
    others = dict(judge.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-5), name
    assert torch.equal(module.eval()(inputs, targets)[0], CausalLMLoss(model).eval()(inputs, targets)[0])


def test_rows_without_a_target_cost_no_products() -> None:
    hidden, weight, targets = draw()
    seen: list[int] = []

    def score(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(logits))
        return score_rows(logits, *rest)

    chunked_cross_entropy(hidden, weight, targets, score=score)
    assert sum(seen) == (targets != IGNORE_INDEX).sum() < ROWS


@pytest.mark.parametrize(("scale", "smoothing"), [(1.0, 0.0), (0.37, 0.0), (0.37, 0.1)])
def test_chunked_loss_is_cross_entropy(chunk: int, scale: float, smoothing: float) -> None:
    hidden, weight, targets = draw()
    ours = chunked_cross_entropy(hidden, weight, targets, upstream=scale, smoothing=smoothing)
    gradients = torch.autograd.grad(ours * scale, (hidden, weight))
    expected = plain(hidden, weight, targets, smoothing)
    for ours_, theirs in zip(gradients, torch.autograd.grad(expected * scale, (hidden, weight)), strict=True):
        assert torch.allclose(ours_, theirs, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours, expected, rtol=1e-6)


def test_what_the_loss_is_really_multiplied_by_counts(chunk: int) -> None:
    """``upstream`` only says where rounding should be small; a wrong one changes no gradient."""
    hidden, weight, targets = draw()
    given = torch.autograd.grad(3 * chunked_cross_entropy(hidden, weight, targets, upstream=0.5), (hidden, weight))
    expected = torch.autograd.grad(3 * plain(hidden, weight, targets), (hidden, weight))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(given, expected, strict=True))


def test_bf16_agrees_within_its_rounding(chunk: int) -> None:
    """Under autocast products are bf16 (8 bits of mantissa); the sum and the weight's gradient stay fp32."""
    hidden, weight, targets = draw()
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    expected = plain(hidden, weight, targets)
    assert ours.dtype == gradients[1].dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=5e-3)
    for ours_, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert (ours_ - theirs).norm() < 0.01 * theirs.norm()


def test_small_probabilities_survive_fp16() -> None:
    """Scaled by the loss scale in fp32 before the cast: unscaled, most of these gradients would be 0 in fp16."""
    torch.manual_seed(0)
    hidden, weight = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(40_000, 8)
    hidden[:] = 0.01 * torch.randn(4, 8)
    targets, scale = torch.zeros(4, dtype=torch.long), 2.0**16
    weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, targets, upstream=scale / 1000)
    gradient = torch.autograd.grad(loss * scale / 1000, weight)[0]
    exact = torch.autograd.grad(plain(hidden.float(), weight, targets) * scale / 1000, weight)[0]
    assert (gradient[1:] - exact[1:]).norm() < 0.01 * exact[1:].norm()


def test_without_grad_mode_no_gradient_is_made(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = draw()
    expected = plain(hidden, weight, targets)
    monkeypatch.setattr(torch, "mm", None)  # what makes the gradient
    with torch.no_grad():
        ours = chunked_cross_entropy(hidden, weight, targets)
    assert not ours.requires_grad
    assert torch.allclose(ours, expected, rtol=1e-6)


def test_batch_without_targets_gives_nothing(chunk: int) -> None:
    hidden, weight, _ = draw()
    loss = chunked_cross_entropy(hidden, weight, torch.full((ROWS,), IGNORE_INDEX))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def labels_of(targets: Tensor) -> Tensor:
    """What transformers shifts itself: each target one place later, and no label at the first place."""
    return functional.pad(targets, (1, 0), value=IGNORE_INDEX)[:, :-1]


def draw_ids() -> tuple[Tensor, Tensor]:
    ids = torch.randint(len(tiny_tokenizer()), (3, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 4:9] = targets[:, -1] = IGNORE_INDEX  # transformers' labels have no place for the last target
    return inputs, targets


def compare(model: PreTrainedModel) -> None:
    """Compare a loss module with transformers' own loss on the same weights, in value and gradients."""
    judge = copy.deepcopy(model)
    inputs, targets = draw_ids()
    loss, count = CausalLMLoss(model)(inputs, targets)
    assert count == (targets != IGNORE_INDEX).sum() == 40
    expected = judge(input_ids=inputs, labels=labels_of(targets)).loss * count
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    expected.backward()
    others = dict(judge.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = others[name].grad
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_transformers(family: str, tied: bool, chunk: int) -> None:
    model = tiny_model(family, overrides={"tie_word_embeddings": tied})
    assert CausalLMLoss(model).plain_head
    compare(model)


OWN_HEADS = {
    "gemma2": {"final_logit_softcapping": 30.0, "head_dim": 16},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
}


def own_head_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(model_type, **shape, intermediate_size=48, **ids, **OWN_HEADS[model_type])
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", OWN_HEADS)
def test_models_that_scale_or_cap_their_logits_take_the_plain_path(model_type: str) -> None:
    model = own_head_model(model_type)
    assert not CausalLMLoss(model).plain_head
    compare(model)


def test_a_bias_added_to_the_logits_takes_the_plain_path() -> None:
    ids = {"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    model = MarianMTModel(MarianConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, **ids))
    assert has_plain_head(model)
    model.final_logits_bias[0, 7] = 1e-3  # as Marian's converted checkpoints have
    assert not has_plain_head(model)


def test_packed_loss_is_the_sum_over_the_documents() -> None:
    module = CausalLMLoss(tiny_model())
    documents = [[9, 10, 11, 12, 13], [20, 21, 22], [9, 33]]
    inputs = torch.tensor([[token for document in documents for token in document]])
    targets = torch.tensor([[token for document in documents for token in [*document[1:], IGNORE_INDEX]]])
    positions = torch.tensor([[place for document in documents for place in range(len(document))]])
    loss, count = module(inputs, targets, positions)
    alone = [module(torch.tensor([d[:-1]]), torch.tensor([d[1:]])) for d in documents]
    assert count == sum(n for _, n in alone) == 7
    assert loss.item() == pytest.approx(sum(each.item() for each, _ in alone), rel=1e-6)


def test_padding_on_the_right_changes_nothing() -> None:
    module = CausalLMLoss(tiny_model())
    inputs, targets = draw_ids()
    padded = functional.pad(inputs, (0, 5), value=1), functional.pad(targets, (0, 5), value=IGNORE_INDEX)
    assert module(*padded)[0].item() == pytest.approx(module(inputs, targets)[0].item(), rel=1e-6)


def test_label_smoothing_acts_in_training_only() -> None:
    model = tiny_model()
    smooth, sharp = CausalLMLoss(model, label_smoothing=0.2), CausalLMLoss(model)
    inputs, targets = draw_ids()
    logits = model(inputs).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=0.2)
    assert torch.allclose(smooth.train()(inputs, targets)[0], expected, rtol=1e-5)
    assert torch.allclose(smooth.eval()(inputs, targets)[0], sharp(inputs, targets)[0], rtol=1e-6)
