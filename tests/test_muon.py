"""Muon: its iteration against an exact decomposition, its step against torch's own, and its half of AdamW."""

import torch
from pytest import MonkeyPatch

from hfkit.muon import COEFFICIENTS, STEPS, MuonAdamW, iterates_in, orthogonalise
from hfkit.optim import build_optimizer
from hfkit.settings import OptimConfig


def test_singular_values_are_pushed_to_one_in_the_same_directions() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16)):
        matrices = torch.randn(shape)
        result = orthogonalise(matrices)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.3
        nearest = left @ right
        assert torch.nn.functional.cosine_similarity(result.flatten(1), nearest.flatten(1)).min() > 0.98


def test_long_matrices_take_the_same_steps_through_their_gram_matrix() -> None:
    torch.manual_seed(3)
    directions = torch.randn(2, 16, 16) @ torch.randn(2, 16, 80).mul(torch.logspace(0, -3, 80))
    x = directions / directions.norm(dim=(-2, -1), keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalise(directions), x, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(orthogonalise(directions.mT), x.mT, atol=1e-4, rtol=1e-3)


def test_only_a_run_in_bf16_iterates_in_it_on_a_cpu_and_finds_the_same_directions(monkeypatch: MonkeyPatch) -> None:
    for units, dtype in (({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert iterates_in("cpu", bf16=True) is dtype and iterates_in("cpu", bf16=False) is torch.float32
    assert iterates_in("cuda", bf16=False) is torch.bfloat16
    torch.manual_seed(4)
    layer, steps = torch.nn.Linear(40, 16), []
    before, gradient = layer.weight.detach().clone(), torch.randn(16, 40)
    for bf16 in (False, True):
        layer.weight.data.copy_(before)
        layer.weight.grad, layer.bias.grad = gradient, torch.zeros(16)
        build_optimizer(layer, OptimConfig(name="muon"), bf16).step()
        steps.append(layer.weight.detach() - before)
    difference = (steps[1] - steps[0]).norm() / steps[0].norm()
    assert 1e-4 < difference < 0.02


def test_steps_agree_with_torch_muon_up_to_its_bf16() -> None:
    torch.manual_seed(1)
    start = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(24, 8)]
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    theirs = [torch.nn.Parameter(value.clone()) for value in start]
    groups = [
        {"params": ours, "muon": True, "lr": 0.1, "weight_decay": 0.1},
        {"params": [torch.nn.Parameter(start[0])]},
    ]
    mine = MuonAdamW(groups, lr=0.1)
    judge = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        judge.step()
    for a, b, begin in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - begin).norm()


def test_other_parameters_take_exactly_the_step_of_adamw() -> None:
    torch.manual_seed(2)
    matrix, vector, lonely = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4)), None
    lonely = torch.nn.Parameter(vector.detach().clone())
    groups = [{"params": [matrix], "muon": True, "lr": 0.1}, {"params": [vector], "lr": 0.01, "weight_decay": 0.1}]
    both = MuonAdamW(groups, lr=0.01, betas=(0.9, 0.95))
    alone = torch.optim.AdamW([lonely], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(4, 4), torch.randn(4)
        lonely.grad = vector.grad.clone()
        both.step()
        alone.step()
    assert torch.equal(vector, lonely)
    assert set(both.state[matrix]) == {"momentum"} and "exp_avg" in both.state[vector]


def test_nothing_moves_where_a_gradient_is_not_finite() -> None:
    matrix, vector = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    before = matrix.detach().clone(), vector.detach().clone()
    optimizer = MuonAdamW([{"params": [matrix], "muon": True, "lr": 0.1}, {"params": [vector]}], lr=0.01)
    matrix.grad, vector.grad = torch.full((4, 4), torch.nan), torch.zeros(4)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(matrix, before[0]) and torch.equal(vector, before[1])
