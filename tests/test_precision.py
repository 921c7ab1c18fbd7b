"""Precision: what is refused, and which layers fp8 is for."""

import pytest
import torch
from torch import nn

from hfkit.precision import gains_from_fp8, resolve_precision
from hfkit.settings import BadInput


@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [
        ((2048, 5632), "model.layers.0.mlp.up_proj", True),
        ((5632, 2048), "model.layers.0.mlp.down_proj", True),
        ((2048, 256), "model.layers.0.self_attn.k_proj", False),  # small: the casts cost more than they save
        ((2048, 2040), "model.layers.0.mlp.up_proj", False),  # not a multiple of 16
        ((2048, 32000), "lm_head", False),
    ],
)
def test_large_products_but_the_head_gain_from_fp8(shape: tuple[int, int], name: str, expected: bool) -> None:
    layer = nn.Linear(*shape, bias=False, device="meta")
    assert gains_from_fp8(layer, name) is expected
    assert not gains_from_fp8(nn.Embedding(2048, 2048, device="meta"), name)


def test_fp8_is_refused_on_a_gpu_without_it_and_where_torchao_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(BadInput, match="Hopper"):
        resolve_precision("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("hfkit.precision.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"torchao.*hfkit\[quant\]"):
        resolve_precision("fp8")
