"""Optimizers and schedules, against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from hfkit.losses import CausalLMLoss
from hfkit.optim import build_optimizer, build_schedule, set_learning_rate, split_parameters
from hfkit.settings import BadInput, OptimConfig
from tiny import tiny_model

HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("settings", "max_steps", "shares"),
    [
        # cosine from step 2 over 8 steps: eighths of a half turn, between 1 and the floor
        ({"schedule": "cosine", "warmup_steps": 2, "min_learning_rate_share": 0.0}, 10,
         {0: 0.5, 1: 1.0, 2: 1.0, 4: (1 + HALF) / 2, 6: 0.5, 8: (1 - HALF) / 2}),
        ({"schedule": "cosine", "warmup_steps": 0, "min_learning_rate_share": 0.2}, 4,
         {0: 1.0, 1: 0.2 + 0.8 * (1 + HALF) / 2, 2: 0.6, 3: 0.2 + 0.8 * (1 - HALF) / 2}),
        ({"schedule": "linear", "warmup_steps": 4, "min_learning_rate_share": 0.0}, 14,
         {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 5: 0.9, 9: 0.5, 13: 0.1}),
        ({"schedule": "linear", "warmup_steps": 0, "min_learning_rate_share": 0.5}, 4, {0: 1.0, 2: 0.75, 3: 0.625}),
        ({"schedule": "constant", "warmup_steps": 4}, 100, {0: 0.25, 2: 0.75, 3: 1.0, 4: 1.0, 99: 1.0}),
        # wsd falls over the last fifth of 20 steps: 4 steps, to a quarter at the last
        ({"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.2}, 20,
         {0: 0.5, 1: 1.0, 10: 1.0, 16: 1.0, 17: 0.75, 18: 0.5, 19: 0.25}),
        ({"schedule": "wsd", "warmup_steps": 0, "decay_share": 0.5}, 4, {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5}),
        ({"schedule": "inverse_sqrt", "warmup_steps": 4}, 100, {0: 0.25, 3: 1.0, 4: math.sqrt(4 / 5), 15: 0.5}),
        ({"schedule": "inverse_sqrt", "warmup_steps": 0}, 100, {0: 1.0, 3: 0.5, 99: 0.1}),
    ],
)  # fmt: skip
def test_schedule_by_hand(settings: dict[str, Any], max_steps: int, shares: dict[int, float]) -> None:
    share = build_schedule(OptimConfig(**settings), max_steps)
    assert {step: share(step) for step in shares} == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_schedule_rises_once_to_its_peak_then_never_rises(schedule: Any) -> None:
    share = build_schedule(OptimConfig(schedule=schedule, warmup_steps=7), 60)
    shares = [share(step) for step in range(60)]
    assert shares[:7] == sorted(shares[:7]) and shares[6] == max(shares) == 1.0
    assert shares[6:] == sorted(shares[6:], reverse=True) and shares[-1] > 0


def test_floor_is_where_cosine_and_linear_end() -> None:
    for schedule in ("cosine", "linear"):
        share = build_schedule(OptimConfig(schedule=schedule, min_learning_rate_share=0.1), 100_000)  # type: ignore[arg-type]
        assert share(99_999) == pytest.approx(0.1, abs=2e-5)


def test_warm_up_is_two_percent_unless_given() -> None:
    assert [OptimConfig().warmup_of(steps) for steps in (1, 20, 100, 1000, 2000)] == [0, 0, 2, 20, 40]
    assert OptimConfig(warmup_steps=0).warmup_of(1000) == 0
    assert OptimConfig(warmup_steps=1000).warmup_of(1000) == 1000


def test_given_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(BadInput, match=r"optim\.warmup_steps 11 is over the run's 10 steps"):
        build_schedule(OptimConfig(warmup_steps=11), 10)


@pytest.mark.parametrize(
    ("family", "tied", "decayed", "others"),
    [
        (
            "llama",
            True,
            2 * 7,
            1 + 2 * 2 + 1,
        ),  # q k v o gate up down; embedding (the head too), two norms a block, last
        ("llama", False, 2 * 7 + 1, 1 + 2 * 2 + 1),  # the head is a matrix of its own
        ("qwen3", True, 2 * 7, 1 + 2 * 4 + 1),  # and norms of queries and keys
        (
            "gpt2",
            True,
            2 * 4,
            2 + 2 * (4 + 4) + 2,
        ),  # c_attn, 2 c_proj, c_fc; 2 embeddings, their biases, norms with bias
    ],
)
def test_groups_by_hand_count(family: str, tied: bool, decayed: int, others: int) -> None:
    model = tiny_model(family, overrides={"tie_word_embeddings": tied})
    matrices, rest = split_parameters(model)
    assert (len(matrices), len(rest)) == (decayed, others)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim == 2 for p in matrices)
    assert not any("embed" in names[id(p)] or "wte" in names[id(p)] or "wpe" in names[id(p)] for p in matrices)
    assert all(p.ndim == 1 or p.shape[0] in (320, 2048) for p in rest)
    held = [p for group in build_optimizer(CausalLMLoss(model), OptimConfig()).param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted({id(p) for p in model.parameters()})  # each once, a tied one too


def test_frozen_parameters_are_not_held() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert split_parameters(layer) == ([], [layer.bias])


def adamw_by_hand(value: float, gradients: list[float], rate: float, decay: float) -> float:
    """Loshchilov and Hutter (2019, arXiv:1711.05101), algorithm 2."""
    first = second = 0.0
    for step, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        value -= rate * decay * value
        value -= rate * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.95**step)) + 1e-8)
    return value


def test_two_steps_of_adamw_by_hand() -> None:
    """A matrix of one number decays and a bias does not; all else is the same."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(-1.0)
    optimizer = build_optimizer(layer, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    for gradient in (0.3, -0.7):
        layer.weight.grad, layer.bias.grad = torch.tensor([[gradient]]), torch.tensor([gradient / 2])
        optimizer.step()
    assert layer.weight.item() == pytest.approx(adamw_by_hand(2.0, [0.3, -0.7], 0.1, 0.5), rel=1e-6)
    assert layer.bias.item() == pytest.approx(adamw_by_hand(-1.0, [0.15, -0.35], 0.1, 0.0), rel=1e-6)


def test_learning_rate_is_a_share_of_each_groups_peak() -> None:
    module = CausalLMLoss(tiny_model())
    module.own_rates = [([module.model.lm_head.weight], 0.5)]
    optimizer = build_optimizer(module, OptimConfig(learning_rate=0.01))
    assert set_learning_rate(optimizer, 0.25) == 0.0025
    assert set_learning_rate(optimizer, 0.5) == 0.005  # of the peak, not of the rate before
    by_size = {sum(p.numel() for p in group["params"]): group["lr"] for group in optimizer.param_groups}
    assert by_size[320 * 32] == 0.25 and sorted(by_size.values()) == [0.005, 0.005, 0.25]
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if group["lr"] == 0.25)
