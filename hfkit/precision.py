"""Which numbers the products are made in: what was asked for, what the launcher said, what the device can."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import AORecipeKwargs
from torch import nn

from hfkit.settings import BadInput


def resolve_precision(asked: str) -> str:
    """Return Accelerate's name of the precision: as asked, else the launcher's, else bf16 on a GPU that has it.

    Raises:
        BadInput: for fp16 without CUDA, which would run without a loss scale, and for fp8 where it cannot be had.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "auto":
        capable = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        asked = launcher if launcher != "no" else ("bf16" if capable else "fp32")
    if asked == "fp16" and not torch.cuda.is_available():
        raise BadInput("train.precision fp16 needs a CUDA GPU (its loss scale does); use fp32 or bf16 here")
    if asked == "fp8":
        _check_fp8()
    if asked == "bf16" and not torch.cuda.is_available() and not _cpu_has_bf16():
        print("warning: this CPU has no bf16 units, so bf16 is several times slower than fp32 here", file=sys.stderr)
    return "no" if asked == "fp32" else asked


def _check_fp8() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise BadInput("train.precision fp8 needs a GPU of NVIDIA's Ada, Hopper or a later kind; use bf16 or fp32 here")
    if find_spec("torchao") is None:
        raise BadInput("train.precision fp8 needs torchao: pip install 'hfkit[quant]', or use bf16")


def fp8_recipe() -> AORecipeKwargs:
    """Return how linear layers are made fp8: scaled by tensor, which is the fastest; parameters stay as they are."""
    from torchao.float8 import Float8LinearConfig

    # The gathering in fp8 that Accelerate would turn on wraps the weights in a subclass, on a single GPU too.
    config = Float8LinearConfig(pad_inner_dim=True, enable_fsdp_float8_all_gather=False)
    return AORecipeKwargs(config=config, module_filter_func=gains_from_fp8)


def gains_from_fp8(layer: nn.Module, name: str) -> bool:
    """Whether a layer's product is large enough to pay for its casts; the output head always stays as it is.

    (torchao's own limits for tensor-wise scaling on an H100: small are ≤ 4,096 inputs with ≤ 1,024 outputs.)
    """
    if not isinstance(layer, nn.Linear) or name.rsplit(".", 1)[-1] in ("lm_head", "embed_out", "score"):
        return False
    if layer.in_features % 16 or layer.out_features % 16:
        return False
    return layer.in_features > 4096 or layer.out_features > 1024


def _cpu_has_bf16() -> bool:
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", _cpu_flags()))


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
