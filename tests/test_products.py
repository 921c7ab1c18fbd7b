"""Products by oneDNN: a linear layer's values and gradients as before, compiled or not, and only where they pay."""

import copy

import pytest
import torch
from torch import Tensor, nn

import hfkit.products
from hfkit.products import multiply, use_faster_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def _some_other_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hfkit.products, "FASTER", True)


def layers(bias: bool) -> tuple[nn.Linear, nn.Linear, Tensor]:
    """Return a plain layer, the same layer by oneDNN, and (2, 150, 256) input."""
    torch.manual_seed(0)
    plain = nn.Linear(256, 160, bias=bias)
    faster = copy.deepcopy(plain)
    use_faster_products(faster)
    return plain, faster, torch.randn(2, 150, 256)


def outcome(layer: nn.Linear, rows: Tensor) -> list[Tensor]:
    """Return the output and every gradient."""
    rows = rows.clone().requires_grad_()
    output = layer(rows)
    wanted = [rows, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_keeps_its_values_and_gradients(bias: bool, frozen: bool, compiled: bool) -> None:
    plain, faster, rows = layers(bias)
    assert "forward" in vars(faster)
    for layer in (plain, faster):
        layer.weight.requires_grad_(not frozen)
    ours = torch.compile(faster, backend="aot_eager", fullgraph=True) if compiled else faster
    found, expected = outcome(ours, rows), outcome(plain, rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_copied_layer_multiplies_by_its_own_weight() -> None:
    _, faster, rows = layers(bias=False)
    other = copy.deepcopy(faster)
    nn.init.zeros_(other.weight)
    assert other(rows).count_nonzero() == 0 and faster(rows).count_nonzero() > 0


def test_few_rows_stay_with_mkl() -> None:
    plain, faster, rows = layers(bias=True)
    assert torch.equal(faster(rows[:, :8]), plain(rows[:, :8])) and torch.equal(faster(rows[0, 0]), plain(rows[0, 0]))


def test_a_second_derivative_is_refused_rather_than_zero() -> None:
    _, faster, rows = layers(bias=False)
    [gradient] = torch.autograd.grad(faster(rows.requires_grad_()).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_decides_as_before() -> None:
    plain, faster, rows = layers(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(faster(rows), plain(rows)) and faster(rows).dtype == torch.bfloat16


def test_small_layers_and_layers_of_other_classes_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(64, 64), Own(256, 256))
    use_faster_products(model)
    assert all("forward" not in vars(layer) for layer in model)


@pytest.mark.parametrize("vocabulary", [50, 1100])
def test_products_of_losses_are_those_of_plain_matrices(vocabulary: int) -> None:
    rows, weight = torch.randn(300, 32), torch.randn(vocabulary, 32)
    torch.testing.assert_close(multiply(rows, weight), rows @ weight.T, rtol=1e-4, atol=1e-4)
    found = multiply(rows @ weight.T, weight.T)
    torch.testing.assert_close(found, rows @ weight.T @ weight, rtol=1e-4, atol=1e-2)
