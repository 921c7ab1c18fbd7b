"""Products of linear layers in fp32 on a CPU by oneDNN, where that is faster than the MKL that PyTorch calls.

MKL keeps its best kernels for its maker's processors. On two Zen 4 cores MKL reaches 84–93 GFLOP/s in a layer's forward
product (70 at 256 × 256) and 89–95 in the gradient of its input, oneDNN, which PyTorch carries too, 99–105 in both; the
gradient of the weight stays with MKL, 92–96 against 83–87 (2026-11-26, torch 2.13, 2,048 rows); so do few rows.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def _made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


FASTER = _made_by_amd() and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
WORTHWHILE = 1 << 15  # numbers of a weight; below, a call costs more than it saves
MANY_ROWS = 256  # below, MKL is as fast, and oneDNN needs a millisecond the first time that it meets a number of rows

_library = torch.library.Library("hfkit", "DEF")
_library.define("product(Tensor rows, Tensor weight) -> Tensor")


@torch.library.impl(_library, "product", "CPU")
def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


@torch.library.register_fake("hfkit::product", lib=_library)
def _product_shape(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], len(weight))


def multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows @ weight.T`` without a gradient, by the faster library."""
    plain = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32
    if FASTER and plain and weight.numel() >= WORTHWHILE and len(rows) >= MANY_ROWS:
        return torch.ops.hfkit.product(rows, weight)
    return rows @ weight.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(rows, weight)
        return torch.ops.hfkit.product(rows, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = context.saved_tensors
        for_rows = torch.ops.hfkit.product(upstream, weight.T) if context.needs_input_grad[0] else None
        for_weight = upstream.flatten(0, -2).T @ rows.flatten(0, -2) if context.needs_input_grad[1] else None
        return for_rows, for_weight


def use_faster_products(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by the faster library; parameters and what is saved stay the same."""
    if not FASTER:
        return
    layers: Any = model.modules()
    for layer in layers:
        plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        if plain and layer.weight.numel() >= WORTHWHILE and layer.weight.dtype == torch.float32:
            layer.forward = MethodType(_forward, layer)  # a method, so that a copied layer calls itself


def _forward(layer: nn.Linear, rows: Tensor) -> Tensor:
    """A linear layer's forward."""
    plain = rows.device.type == "cpu" and rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not plain or rows.shape[:-1].numel() < MANY_ROWS:
        return functional.linear(rows, layer.weight, layer.bias)
    product = _Linear.apply(rows, layer.weight)
    return product if layer.bias is None else product + layer.bias
