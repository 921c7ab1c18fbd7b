"""Compiled and recomputed blocks, judged by the captured graphs: nothing else shows what a kernel is given."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import BlockMask

import hfkit.losses
from hfkit.attention import block_mask
from hfkit.compilation import checkpoint_blocks, compile_blocks
from hfkit.losses import CausalLMLoss
from tiny import tiny_model

IDS = torch.randint(270, (2, 16), generator=torch.Generator().manual_seed(0))
TARGETS = IDS.roll(-1, 1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphModule]]:
    """The graphs that torch.compile captures, in order; they run as captured, without a kernel compiler."""
    captured: list[GraphModule] = []

    def capture(graph: GraphModule, inputs: list[Tensor]) -> Any:
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=capture, fullgraph=True))
    torch._dynamo.reset()
    yield captured
    torch._dynamo.reset()


def attention_calls(graph: GraphModule) -> list[dict[str, Any]]:
    return [dict(node.kwargs) for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_one_graph_without_a_mask_serves_every_block(family: str, graphs: list[GraphModule]) -> None:
    module = CausalLMLoss(tiny_model(family)).train()
    names = list(module.state_dict())
    expected, _ = module(IDS, TARGETS)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    compile_blocks(module)
    loss, _ = module(IDS, TARGETS)
    loss.backward()

    calls = [call for graph in graphs for call in attention_calls(graph)]
    assert len(graphs) == 2, "one block, and the loss's rows"
    assert [(call.get("attn_mask"), call.get("is_causal")) for call in calls] == [(None, True)]
    assert list(module.state_dict()) == names
    assert torch.allclose(loss, expected, rtol=1e-6)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_one_graph_serves_packed_rows_wherever_their_documents_begin(
    graphs: list[GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block mask of a GPU; uncompiled, it has no backward pass on a CPU."""

    def blocks(position_ids: Tensor, attention: str, window: int | None) -> BlockMask:
        return block_mask((position_ids == 0).cumsum(-1), compiled=False)

    module = CausalLMLoss(tiny_model()).train()
    starts = [torch.tensor([[*range(first), *range(16 - first)]]).expand(2, -1) for first in (5, 9, 12)]
    with torch.no_grad():
        expected = [module(IDS, TARGETS, positions)[0] for positions in starts]
        monkeypatch.setattr(hfkit.losses, "isolation_mask", blocks)
        compile_blocks(module)
        losses = [module(IDS, TARGETS, positions)[0] for positions in starts]
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-6)
    assert len(graphs) == 2, "one block, and the loss's rows"


def test_evaluation_and_other_shapes_compile_nothing(graphs: list[GraphModule]) -> None:
    module = CausalLMLoss(tiny_model()).eval()
    compile_blocks(module)
    with torch.no_grad():
        module(IDS, TARGETS)
        module(IDS[:, :7], TARGETS[:, :7])
    module.model.generate(IDS, max_new_tokens=3)
    assert graphs == []


def test_a_copied_block_computes_with_its_own_weights(graphs: list[GraphModule]) -> None:
    module = CausalLMLoss(tiny_model()).train()
    compile_blocks(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(IDS, TARGETS)[0] != module(IDS, TARGETS)[0]


def test_a_model_of_unknown_blocks_is_compiled_whole(graphs: list[GraphModule]) -> None:
    module = CausalLMLoss(tiny_model()).train()
    module._no_split_modules = None
    expected, _ = module(IDS, TARGETS)
    compile_blocks(module)
    assert torch.allclose(module(IDS, TARGETS)[0], expected, rtol=1e-6)
    (graph,) = graphs
    assert [(call.get("attn_mask"), call.get("is_causal")) for call in attention_calls(graph)] == [(None, True)] * 2


def test_checkpointed_blocks_run_twice_and_change_nothing() -> None:
    def run(module: nn.Module) -> list[Tensor]:
        module(IDS, TARGETS)[0].backward()
        return [parameter.grad for parameter in module.parameters()]

    module = CausalLMLoss(tiny_model()).train()
    recomputed = copy.deepcopy(module)
    checkpoint_blocks(recomputed)
    calls: list[int] = []
    recomputed.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(map(torch.equal, run(module), run(recomputed)))
    assert len(calls) == 2


def test_checkpointed_blocks_can_be_compiled(graphs: list[GraphModule]) -> None:
    module = CausalLMLoss(tiny_model()).train()
    expected, _ = module(IDS, TARGETS)
    checkpoint_blocks(module)
    compile_blocks(module)
    loss, _ = module(IDS, TARGETS)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-6) and module.model.lm_head.weight.grad is not None
