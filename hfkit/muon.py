"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

Muon moves a matrix by the nearest semi-orthogonal matrix to its momentum, found by five Newton–Schulz steps (Jordan et
al., 2024, kellerjordan.github.io/posts/muon). ``torch.optim.Muon`` takes one matrix at a time and iterates in bf16,
17–35x slower than fp32 on a CPU without bf16 units; here equal shapes are one batched product, in the precision that
suits the device and the run.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; they push singular values towards 1 fastest
STEPS = 5


def iterates_in(device: str, bf16: bool) -> torch.dtype:
    """Return the precision of the iteration on a kind of device: bf16, which is enough, where that is fast.

    On a CPU only a run in bf16 (``bf16``) may, so that an fp32 run is the same on one process and on two.
    16 matrices of 256 × 256 with AVX512-BF16: 97 ms in fp32 → 45 (2026-11-26, one Zen 4 core, torch 2.13).
    """
    units = torch.cpu.get_capabilities() if bf16 and device == "cpu" else {}
    fast = device == "cuda" or units.get("avx512_bf16") or units.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def orthogonalise(matrices: Tensor, bf16: bool = False) -> Tensor:
    """Return the nearly semi-orthogonal matrices in the direction of (n, rows, columns): all singular values near 1.

    Args:
        bf16: Whether the run is in bf16.

    Example:
        >>> torch.linalg.svdvals(orthogonalise(torch.eye(3)[None] * torch.tensor([1.0, 2.0, 4.0]))).min() > 0.6
        tensor(True)
    """
    a, b, c = COEFFICIENTS
    dtype = iterates_in(matrices.device.type, bf16)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)  # (n, short, long): the products are short × short
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if dtype is torch.float32 and x.shape[-1] > 2 * x.shape[-2]:
        x = _polynomial(x @ x.mT) @ x
    else:
        for _ in range(STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _polynomial(gram: Tensor) -> Tensor:
    """Return the matrix that all steps together multiply by, from (n, short, short): no product is short × long.

    The factors of the steps are polynomials of one matrix, so they commute: with P = a + bG + cG², x becomes Px and its
    Gram matrix PGP. Squares lose half the digits, which fp32 has and bf16 has not.
    """
    a, b, c = COEFFICIENTS
    product: Tensor | None = None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with ``muon: True``, fused AdamW for the others.

    Args:
        groups: Parameter groups; a Muon group holds matrices only. Sharded (DTensor) matrices are gathered for the
            iteration and cut again.
        momentum: Of Muon, with Nesterov's look-ahead.
        bf16: Whether the run is in bf16.
        adamw: Keyword arguments of ``torch.optim.AdamW``.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, *, bf16: bool = False, **adamw: Any
    ) -> None:
        self.bf16 = bf16
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "muon": False})
        self.adamw = torch.optim.AdamW([{**g} for g in self.param_groups if not g["muon"]], lr=lr, fused=True, **adamw)
        # One state and one list of groups for both halves, so that schedules and checkpoints see one optimizer.
        self.adamw.state = self.state
        muon_groups = [group for group in self.param_groups if group["muon"]]
        self.param_groups = [*muon_groups, *self.adamw.param_groups]
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; where ``found_inf`` is 1, nothing changes."""
        assert closure is None, "the loop computes gradients before the step"
        if self.found_inf is not None:
            self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)

    def _step_muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape, parameter.device].append(parameter)
        for (shape, _), parameters in by_shape.items():
            directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
            updates = orthogonalise(torch.stack(directions), self.bf16)
            # Tall matrices move further, so that each output changes as much whatever the shape.
            rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                applied = 1.0 if self.found_inf is None else 1.0 - self.found_inf
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * applied)
                parameter.sub_(_like(update * applied, parameter), alpha=rate)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the momentum and return Nesterov's direction, whole."""
        assert parameter.grad is not None
        gradient = parameter.grad
        if self.found_inf is not None:
            gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0) * (1.0 - self.found_inf)
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(state["momentum"], momentum)
        return direction.full_tensor() if isinstance(direction, DTensor) else direction


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return ``value`` cut as ``parameter`` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
