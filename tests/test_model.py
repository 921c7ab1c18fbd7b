"""Models: sizes by a table, refusals, padding ids that are never generated, packed documents that never meet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hfkit.model
from hfkit.classification import build_classifier
from hfkit.model import (
    PRESETS,
    build_causal_lm,
    check_isolation,
    count_parameters,
    find_length,
    flops_per_token,
    isolation_mask,
    load_causal_lm,
    padded_size,
    set_length,
)
from hfkit.prediction import classify_texts
from hfkit.settings import BadInput, ClassifierConfig, ModelConfig
from tiny import SHAPES, tiny_model, tiny_tokenizer

PARAMETERS = {  # with a vocabulary of 32,768
    "tiny": 4_998_272,
    "mini": 13_135_104,
    "small": 26_745_216,
    "base": 110_119_680,
    "medium": 341_885_952,
    "large": 1_103_194_112,
    "xl": 1_543_620_608,
    "gpt2-tiny": 5_249_792,
    "gpt2": 111_794_688,
    "qwen3-tiny": 4_932_992,
    "qwen3-base": 100_684_032,
    "qwen3-large": 909_210_112,
}
FAMILIES = [(family, attention) for family in SHAPES for attention in ("eager", "sdpa")]


def on_meta(preset: str, vocab_size: int) -> PreTrainedModel:
    """Build a preset without memory for its weights."""
    with torch.device("meta"):
        return build_causal_lm(
            ModelConfig(preset=preset, config_overrides={"vocab_size": vocab_size}), tiny_tokenizer()
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_the_parameters_of_the_table(preset: str) -> None:
    model = on_meta(preset, 32_768)
    assert count_parameters(model).parameters == PARAMETERS[preset]
    assert model.config.max_position_embeddings >= 2048


def test_tiny_is_about_a_million_parameters() -> None:
    assert count_parameters(on_meta("tiny", 4096)).parameters == 1_328_256


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"'huge' does not exist; there are tiny, mini, small"):
        build_causal_lm(ModelConfig(preset="huge"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("family", "wrong", "right"),
    [
        ("llama", "num_layer", "num_hidden_layers"),
        ("llama", "hiden_size", "hidden_size"),
        ("gpt2", "n_layers", "n_layer"),
    ],
)
def test_unknown_override_is_refused_with_a_suggestion(family: str, wrong: str, right: str) -> None:
    with pytest.raises(BadInput, match=rf"no field '{wrong}'; did you mean '{right}'\?"):
        tiny_model(family, overrides={wrong: 2})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden_size": 33}, "33"),
        ({"hidden_size": "a"}, "hidden_size must be a whole number of at least 1, not 'a'"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number of at least 1, not 'many'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number of at least 1, not -1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1, not 0"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 0}, "negative power"),
        ({"hidden_act": 7}, "7"),
        ({"hidden_act": "foo"}, "transformers knows no 'foo'"),
        ({"model_type": "foo"}, "transformers has no model_type 'foo'"),
    ],
)
def test_impossible_override_is_bad_input_in_one_line(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=rf"^model\.config_overrides: [^\n]*{words}[^\n]*$"):
        tiny_model(overrides=wrong)


def test_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(BadInput, match=r"vocab_size 256 is smaller than the tokenizer's 270 tokens"):
        tiny_model(overrides={"vocab_size": 256})


def test_vocabulary_is_padded_to_a_multiple_of_64() -> None:
    assert [padded_size(n) for n in (1, 64, 65, 270, 32_768)] == [64, 64, 128, 320, 32_768]
    assert tiny_model().get_input_embeddings().weight.shape == (320, 32)


@pytest.mark.parametrize("do_sample", [False, True])
def test_ids_without_a_token_are_never_generated(do_sample: bool) -> None:
    """Two padding ids whose head rows point opposite ways: one of them always has by far the largest logit."""
    model = tiny_model(overrides={"tie_word_embeddings": False})
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[-1] = 10_000 * torch.randn(32, generator=torch.Generator().manual_seed(0))
        head[-2] = -head[-1]
    torch.manual_seed(0)
    prompt = torch.tensor([[7, 8, 9]])
    free = model.generate(prompt, max_new_tokens=20, do_sample=do_sample, suppress_tokens=[])
    assert (free[0, 3:] >= len(tiny_tokenizer())).all()
    suppressed = model.generate(prompt, max_new_tokens=20, do_sample=do_sample)
    assert (suppressed < len(tiny_tokenizer())).all()


DOCUMENTS = [[9, 10, 11, 12, 13], [20, 21], [9], [33, 34, 35, 36]]


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_packed_documents_get_the_logits_they_get_alone(family: str, attention: str) -> None:
    model = tiny_model(family, attention=attention).eval()
    ids = torch.tensor([[token for document in DOCUMENTS for token in document]])
    positions = torch.tensor([[place for document in DOCUMENTS for place in range(len(document))]])
    with torch.no_grad():
        packed = model(ids, attention_mask=isolation_mask(positions, attention), position_ids=positions).logits
        alone = [model(torch.tensor([document])).logits for document in DOCUMENTS]
        together = model(ids).logits
    assert torch.allclose(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    assert not torch.allclose(together, packed, rtol=0, atol=1e-2)  # without a mask they would differ


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_self_test_of_isolation_passes_and_sees_a_wrong_mask(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, attention=attention).train()
    check_isolation(model, 12)
    assert model.training

    def plain_causal(position_ids: Tensor, attention: str) -> Tensor:
        return isolation_mask(torch.arange(position_ids.shape[1])[None], attention)

    monkeypatch.setattr(hfkit.model, "isolation_mask", plain_causal)
    with pytest.raises(BadInput, match="are not isolated"):
        check_isolation(model, 12)


@pytest.mark.parametrize("family", SHAPES)
def test_dropout_acts_in_training_only_and_leaves_no_trace_in_the_saved_model(family: str, tmp_path: Path) -> None:
    model, plain = tiny_model(family, dropout=0.5), tiny_model(family)
    ids = torch.tensor([[9, 10, 11, 12]])
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)
        dropped = [model.train()(ids).logits for _ in range(2)]
        assert not torch.allclose(dropped[0], dropped[1], atol=1e-3)
        embedded, kept = model.get_input_embeddings()(ids), model.eval().get_input_embeddings()(ids)
    assert torch.equal(embedded, torch.where(embedded == 0, 0, 2 * kept))
    assert 0.3 < (embedded == 0).float().mean() < 0.7
    model.save_pretrained(tmp_path / "dropped")
    plain.save_pretrained(tmp_path / "plain")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "dropped" / n).read_bytes() == (tmp_path / "plain" / n).read_bytes() for n in names)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dropped").train()(ids).logits, expected)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.rand(5)
    first = tiny_model(seed=3).state_dict()
    torch.rand(7)
    again, other = tiny_model(seed=3).state_dict(), tiny_model(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("family", "into_stream", "inside"),
    [("llama", "o_proj", "q_proj"), ("qwen3", "down_proj", "up_proj"), ("gpt2", "c_proj", "c_attn")],
)
def test_what_a_block_adds_starts_smaller(family: str, into_stream: str, inside: str) -> None:
    """Standard deviations sqrt(2 / 5d), and 1 / sqrt(2 · blocks) of it for what is added to the residual stream."""
    weights = tiny_model(family).state_dict()

    def deviation(part: str) -> float:
        return torch.cat([w.flatten() for name, w in weights.items() if name.endswith(f"{part}.weight")]).std().item()

    assert deviation(inside) == pytest.approx((2 / (5 * 32)) ** 0.5, rel=0.05)
    assert deviation(into_stream) == pytest.approx((2 / (5 * 32)) ** 0.5 / 2, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_and_operations_by_hand(tied: bool) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 16, "tie_word_embeddings": tied}
    model = tiny_model(overrides=shape)
    block = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8  # attention, gated inner layer, two norms
    matrix = 2 * block + 8 + 320 * 8  # blocks, last norm, head
    size = count_parameters(model)
    assert (size.matrix, size.parameters) == (matrix, matrix if tied else matrix + 320 * 8)
    assert flops_per_token(model, length=10) == 6 * matrix + 12 * 2 * 2 * 4 * 10  # layers, heads, head size, length


def test_positions_of_gpt2_are_no_matrix_product() -> None:
    model = tiny_model("gpt2")
    size = count_parameters(model)
    assert size.parameters - size.matrix == 2048 * 32


def test_training_length_is_noted_and_found(tmp_path: Path) -> None:
    model = tiny_model()
    assert find_length(model.config) == 1024
    set_length(model.config, 48)
    model.save_pretrained(tmp_path)
    assert find_length(AutoModelForCausalLM.from_pretrained(tmp_path).config) == 48
    assert find_length(tiny_model(overrides={"max_position_embeddings": 96}).config) == 96


def test_positions_behind_the_padding_are_no_room() -> None:
    config = AutoConfig.for_model("roberta", max_position_embeddings=34, pad_token_id=1)
    set_length(config, 32)
    with pytest.raises(BadInput, match=r"sequence_length 33 is over the model's limit of 32 positions"):
        set_length(config, 33)


@pytest.mark.parametrize("family", SHAPES)
def test_length_over_the_models_positions_is_refused(family: str) -> None:
    config = tiny_model(family).config
    set_length(config, 2048)
    with pytest.raises(BadInput, match=r"sequence_length 2049 is over the model's limit of 2048 positions"):
        set_length(config, 2049)


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for load in (
        lambda: load_causal_lm(ModelConfig(path=str(tmp_path))),
        lambda: build_classifier(ClassifierConfig(path=str(tmp_path)), tiny_tokenizer(), ["a", "b"]),
        lambda: classify_texts(tmp_path, ["a text"]),
    ):
        with pytest.raises(BadInput, match=f"{tmp_path} does not load: [^\n]*$"):
            load()
