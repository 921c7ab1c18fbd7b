"""Attention in training: what it is given for plain, padded and packed rows, and that none of it changes the model."""

import functools
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import hfkit.losses
from hfkit.attention import (
    NAME,
    block_masks,
    isolation_mask,
    mask_unless_plain,
    sliding_window,
    use_training_attention,
)
from hfkit.compilation import compile_blocks
from hfkit.losses import CausalLMLoss
from hfkit.model import check_isolation
from hfkit.settings import BadInput
from tiny import tiny_model

FAMILIES = ["llama", "qwen3", "gpt2"]
IDS = torch.randint(270, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[*range(5), *range(7)], [*range(12)]])


@pytest.fixture
def masks_seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks that SDPA is called with, in order."""
    seen: list[Any] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Any = None, is_causal: bool = False, **rest: Any) -> Any:
        seen.append(("causal" if is_causal else None) if attn_mask is None else attn_mask)
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_rows_have_the_logits_of_sdpa_and_no_mask(family: str, masks_seen: list[Any]) -> None:
    model = tiny_model(family).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        masks_seen.clear()
        use_training_attention(model)
        assert torch.equal(model(IDS).logits, expected)
    assert model.config._attn_implementation == NAME and masks_seen == ["causal", "causal"]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_still_masked(family: str, masks_seen: list[Any]) -> None:
    model = tiny_model(family).eval()
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    with torch.no_grad():
        expected = model(IDS, attention_mask=padded).logits
        use_training_attention(model)
        assert torch.equal(model(IDS, attention_mask=padded).logits, expected)
    assert all(isinstance(mask, torch.Tensor) for mask in masks_seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_padded_prompts_is_that_of_sdpa(family: str) -> None:
    model = tiny_model(family).eval()
    prompts = {"input_ids": IDS, "attention_mask": (torch.arange(12) >= torch.tensor([[4], [0]])).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    expected = model.generate(**prompts, **options)
    use_training_attention(model)
    assert torch.equal(model.generate(**prompts, **options), expected)


def test_a_sliding_window_is_no_plain_row() -> None:
    shape = {"batch_size": 1, "q_length": 6, "kv_length": 6, "device": "cpu"}
    assert mask_unless_plain(**shape) is None
    assert mask_unless_plain(**shape, local_size=3) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_isolate_documents_as_the_mask_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU isolation is a block mask; here the same mask runs uncompiled."""
    module = CausalLMLoss(tiny_model(family))
    batch = {"input_ids": IDS, "targets": IDS.roll(-1, 1), "position_ids": POSITIONS}

    def blocks(position_ids: torch.Tensor, attention: str, window: int | None) -> BlockMask:
        return block_masks((position_ids == 0).cumsum(-1), window, compiled=False)

    with torch.no_grad():  # uncompiled, it has no backward pass on a CPU
        expected, _ = module(**batch)
        monkeypatch.setattr(hfkit.losses, "isolation_mask", blocks)
        loss, _ = module(**batch)
        plain, _ = module(**batch | {"position_ids": None})
    assert torch.allclose(loss, expected, rtol=1e-6) and not torch.allclose(plain, expected, rtol=1e-6)


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "sliding_window": 3,
}
SLIDING = [  # all layers, one of two layers
    AutoConfig.for_model("mistral", **SHAPE),
    AutoConfig.for_model("gemma3_text", **SHAPE, layer_types=["sliding_attention", "full_attention"]),
    AutoConfig.for_model("qwen3", **SHAPE, use_sliding_window=True, max_window_layers=1),
]


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("config", SLIDING, ids=lambda config: config.model_type)
def test_sliding_layers_see_their_window_of_a_packed_document_and_no_more(
    config: PretrainedConfig, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of 5, 7 and 12 tokens, each beyond the window of 3, against plain transformers on each alone."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    check_isolation(model, 12)
    documents = [IDS[:1, :5], IDS[:1, 5:], IDS[1:]]
    with torch.no_grad():
        alone = torch.cat([model(document).logits[0] for document in documents])
    module = CausalLMLoss(model)
    window = sliding_window(config)
    mask = isolation_mask(POSITIONS, NAME, window)
    blind = isolation_mask(POSITIONS, NAME)
    if in_blocks:
        document = (POSITIONS == 0).cumsum(-1)
        mask, blind = (block_masks(document, each, compiled=False) for each in (window, None))

    def read(mask: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(IDS, attention_mask=mask, position_ids=POSITIONS, use_cache=False).logits.flatten(0, 1)

    torch.testing.assert_close(read(mask), alone, rtol=0, atol=1e-5)
    assert not in_blocks or not torch.allclose(read(blind), alone, rtol=0, atol=1e-3)  # what the window changes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compile_blocks(module)
    model.train()  # which runs the compiled blocks, and drops nothing
    torch.testing.assert_close(read(mask), alone, rtol=0, atol=1e-5)


def test_eager_attention_refuses_rows_beyond_a_window() -> None:
    model = AutoModelForCausalLM.from_config(SLIDING[0], attn_implementation="eager")
    check_isolation(model, 3)
    with pytest.raises(BadInput, match=r"window of 3 tokens in packed rows of 12; use sdpa"):
        check_isolation(model, 12)


@pytest.mark.parametrize(("family", "compiled"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_documents_one_by_one_have_the_gradients_of_masked_rows(
    family: str, compiled: bool, monkeypatch: pytest.MonkeyPatch, masks_seen: list[Any]
) -> None:
    module = CausalLMLoss(tiny_model(family))
    masks_seen.clear()
    positions = [POSITIONS, POSITIONS.flip(0), torch.arange(12).remainder(3).expand(2, -1)]

    def outcomes() -> list[torch.Tensor]:
        losses = [module(IDS, IDS.roll(-1, 1), position_ids)[0] for position_ids in positions]
        return [*losses, *torch.autograd.grad(sum(losses), list(module.parameters()))]

    with monkeypatch.context() as patched:
        patched.setattr(hfkit.losses, "isolation_mask", lambda position_ids, *_: isolation_mask(position_ids, "sdpa"))
        expected = outcomes()
    assert all(isinstance(mask, torch.Tensor) for mask in masks_seen)
    masks_seen.clear()
    if compiled:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        compile_blocks(module)
    for one, other in zip(outcomes(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert masks_seen == ["causal"] * 2 * (3 + 3 + 8)


def test_attention_of_ones_own_choice_stays() -> None:
    model = tiny_model("llama", attention="eager")
    use_training_attention(model)
    assert model.config._attn_implementation == "eager"
    assert isolation_mask(POSITIONS, "eager").is_floating_point()
    assert isolation_mask(POSITIONS, "sdpa").dtype == torch.bool
    assert isolation_mask(POSITIONS, NAME).tolist() == [[[[0, 5, 12, 24]]]]


def test_the_saved_configuration_names_no_attention() -> None:
    module = CausalLMLoss(tiny_model("llama"))
    assert NAME not in module.model.config.to_json_string()


def test_under_bf16_the_residual_stream_is_bf16_and_rotations_are_computed_in_fp32() -> None:
    module = CausalLMLoss(tiny_model("llama"))
    streams: list[torch.dtype] = []
    for layer in module.model.model.layers:
        layer.register_forward_hook(lambda block, inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module(IDS, IDS)
    assert streams == [torch.bfloat16] * 2 and loss.dtype == torch.float32
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32
    module(IDS, IDS)
    assert streams[2:] == [torch.float32] * 2
