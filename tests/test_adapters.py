"""LoRA: only the added matrices train; saved, loaded by peft and merged they say the same."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hfkit.adapters import attach_adapter, has_adapter, merge_adapter, save_adapter, stored_tensors
from hfkit.checkpoint import model_tensors, restore_model, save_checkpoint, state_writers
from hfkit.losses import CausalLMLoss
from hfkit.settings import AdapterConfig, BadInput

peft = pytest.importorskip("peft")
IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture
def base(tmp_path: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def train_a_little(model: LlamaForCausalLM) -> None:
    module = CausalLMLoss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        loss, _ = module(IDS, IDS.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_leaves_the_base_weights_and_starts_from_its_logits(base) -> None:  # type: ignore[no-untyped-def]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    logits = base(IDS).logits
    attach_adapter(base, AdapterConfig(rank=4))
    assert torch.equal(base(IDS).logits, logits)
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("lm_head" in name for name in trained)
    train_a_little(base)
    assert not torch.allclose(base(IDS).logits, logits, atol=1e-2)
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_merged_and_reloaded_adapters_give_the_adapters_logits(base, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    attach_adapter(base, AdapterConfig(rank=4, alpha=6))
    train_a_little(base)
    expected = base.eval()(IDS).logits
    save_adapter(base, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["lora_alpha"] == 6

    merged = merge_adapter(base)
    assert has_adapter(base) and not has_adapter(merged)
    assert (merged(IDS).logits - expected).abs().max() < 1e-5
    assert torch.equal(base(IDS).logits, expected)  # the copy was merged, not the model
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain) is LlamaForCausalLM and (plain(IDS).logits - expected).abs().max() < 1e-5

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert (loaded(IDS).logits - expected).abs().max() < 1e-6


def test_no_adapter_changes_nothing(base) -> None:  # type: ignore[no-untyped-def]
    attach_adapter(base, AdapterConfig())
    assert merge_adapter(base) is base and all(parameter.requires_grad for parameter in base.parameters())


def test_names_that_match_no_layer_are_refused(base) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match="target_modules"):
        attach_adapter(base, AdapterConfig(rank=2, target_modules=["nothing"]))


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_layers_that_share_a_weight_are_refused(layer: str) -> None:
    shape = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    attach_adapter(LlamaForCausalLM(shape), AdapterConfig(rank=2, target_modules=[layer]))
    shape.tie_word_embeddings = True
    with pytest.raises(BadInput, match=rf"target_modules: .*{layer} has its weight in common.*leave it out"):
        attach_adapter(LlamaForCausalLM(shape), AdapterConfig(rank=2, target_modules=[layer]))


def test_sharded_training_is_refused(base, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInput, match=r"not sharded: launch with ddp\.yaml, or train without adapter"):
        attach_adapter(base, AdapterConfig(rank=2))


@pytest.fixture
def quantized(base):  # type: ignore[no-untyped-def]
    pytest.importorskip("torchao")
    attach_adapter(base, AdapterConfig(rank=4, quantize="int8"))
    return base


def test_quantized_weights_take_a_quarter_and_say_nearly_the_same(base, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torchao")
    logits = base(IDS).logits
    plain = sum(tensor.nbytes for name, tensor in model_tensors(base).items() if "proj" in name)
    attach_adapter(base, AdapterConfig(rank=4, quantize="int8"))
    assert 0 < (base(IDS).logits - logits).abs().max() < 0.02
    held = sum(tensor.nbytes for name, tensor in model_tensors(base).items() if "base_layer" in name)
    assert held < 0.32 * plain  # a byte a number, and four a row


def test_training_beside_quantized_weights_merges_into_a_plain_model_that_says_the_same(quantized, tmp_path) -> None:  # type: ignore[no-untyped-def]
    frozen = {name: value.clone() for name, value in model_tensors(quantized).items() if "base_layer" in name}
    before = quantized(IDS).logits
    train_a_little(quantized)
    expected = quantized.eval()(IDS).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    assert all(torch.equal(value, frozen[name]) for name, value in model_tensors(quantized).items() if name in frozen)

    merged = merge_adapter(quantized)
    assert (merged(IDS).logits - expected).abs().max() < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain) is LlamaForCausalLM and plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")
    assert (plain(IDS).logits - expected).abs().max() < 1e-5


def test_a_checkpoint_holds_the_quantized_weights_themselves(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    train_a_little(quantized)
    expected = quantized(IDS).logits
    optimizer = torch.optim.AdamW([p for p in quantized.parameters() if p.requires_grad])
    folder = save_checkpoint(tmp_path, 1, state_writers(quantized, optimizer), {})
    with torch.no_grad():
        for tensor in stored(quantized).values():
            tensor.zero_()
    restore_model(folder, quantized)
    assert torch.equal(quantized(IDS).logits, expected)


def stored(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {k: part for name, p in model.named_parameters() for k, part in stored_tensors(name, p).items()}


def test_quantizing_without_matrices_or_other_layers_is_refused() -> None:
    with pytest.raises(BadInput, match=r"adapter.rank must be above 0"):
        AdapterConfig(quantize="int8")
    pytest.importorskip("torchao")
    shape = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(BadInput, match="Conv1D"):
        attach_adapter(GPT2LMHeadModel(shape), AdapterConfig(rank=2, quantize="int8"))
