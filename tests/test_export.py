"""The model folder: what plain transformers loads from it, and that it is whole whenever the process dies."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hfkit.export as export
from hfkit.export import export_description, export_model
from hfkit.files import recover_folder, replace_folder
from hfkit.model import build_causal_lm
from hfkit.settings import ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a small text of a few words"], TokenizerConfig(vocab_size=270))


def build(tokenizer: PreTrainedTokenizerBase, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    overrides = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "tie_word_embeddings": tied,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = build_causal_lm(ModelConfig(preset="tiny", config_overrides=overrides), tokenizer)
    model.config.use_cache = False  # as in training
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_the_folder_and_gives_the_same_logits(
    tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, folder = build(tokenizer, tied), tmp_path / "model"
    export_model(model, tokenizer, folder, write=True)
    assert model.config.use_cache is False  # training goes on as before
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("a few words")["input_ids"]])
    assert ids[0].tolist() == tokenizer("a few words")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.use_cache is True
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    assert loaded.num_parameters() == model.num_parameters()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    assert os.listdir(tmp_path) == ["model"]


def test_only_the_process_that_writes_writes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export_model(build(tokenizer), tokenizer, tmp_path / "model", write=False)
    assert os.listdir(tmp_path) == []


def test_an_earlier_folder_is_replaced_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(build(tokenizer), tokenizer, folder, write=True)
    (folder / "of-the-earlier-one").write_text("")
    (tmp_path / ".new-model").mkdir()  # of an export that was killed
    (tmp_path / ".new-model" / "stray").write_text("")
    model = build(tokenizer, seed=1)
    export_model(model, tokenizer, folder, write=True)
    assert not {"of-the-earlier-one", "stray"} & set(os.listdir(folder)) and os.listdir(tmp_path) == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_model_that_does_not_come_back_is_not_put_in_place(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    export_model(build(tokenizer), tokenizer, folder, write=True)
    before = (folder / "model.safetensors").read_bytes()
    others = {name: tensor + 1 for name, tensor in build(tokenizer).state_dict().items()}
    monkeypatch.setattr(export, "_with_tied", lambda model, tensors: others)
    with pytest.raises(RuntimeError, match=r"did not come back from the saved model as it was"):
        export_model(build(tokenizer), tokenizer, folder, write=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_description_is_the_folder_without_its_weights(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build(tokenizer)
    export_model(model, tokenizer, tmp_path / "model", write=True)
    export_description(model, tokenizer, tmp_path / "description")
    whole, part = (set(os.listdir(tmp_path / name)) for name in ("model", "description"))
    assert whole - part == {"model.safetensors"} and not part - whole
    made, exported = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("description", "model"))
    assert made == exported and model.config.use_cache is False


def folder_with(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("calls, left", [(0, "old"), (1, "old"), (2, "new")], ids=["none", "moved aside", "both"])
def test_a_replacement_cut_off_after_any_rename_is_completed(
    calls: int, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, temporary = folder_with(tmp_path / "model", "old"), folder_with(tmp_path / ".new-model", "new")
    rename, done = os.replace, [0]

    def dying(source: Path, target: Path) -> None:
        if done[0] == calls:
            raise KeyboardInterrupt
        rename(source, target)
        done[0] += 1

    def died(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("hfkit.files.os.replace", dying)
        patched.setattr("hfkit.files.sync", died)
        replace_folder(temporary, final)
    assert final.exists() is (calls != 1)
    recover_folder(final)
    assert (final / "file").read_text() == left
    assert not (tmp_path / ".old-model").exists()
    recover_folder(final)  # nothing is left to do
    assert (final / "file").read_text() == left


def test_a_folder_that_never_was_is_not_made_up(tmp_path: Path) -> None:
    recover_folder(tmp_path / "model")
    assert os.listdir(tmp_path) == []
    replace_folder(folder_with(tmp_path / ".new-model", "new"), tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
