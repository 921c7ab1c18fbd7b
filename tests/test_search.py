"""The search that finished sentences leave: token for token what transformers' own ``generate`` finds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hfkit.search import can_search, search
from hfkit.settings import TranslationModelConfig
from hfkit.translation import build_translation_model
from tiny import tiny_model
from translators import MARIAN, make_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams that stop early": {"num_beams": 4, "early_stopping": True},
    "beams until none is better": {"num_beams": 4, "early_stopping": False, "length_penalty": 0.6},
    "beams until none could be better": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "longer is worse": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    "processors": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "suppress_tokens": [20, 31, 32]},
}
ENDS = list(range(6, 46))  # a random model ends at one token in eight, so that sentences leave at every step


def inputs_of(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a random model and nine sentences, padded on the side that the model is used to."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, 270, (9, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(2, 8, (9, 1), generator=generator)).long()
    if kind == "causal":
        return tiny_model().eval(), {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    config = TranslationModelConfig(config_overrides={**MARIAN, "init_std": 0.3})
    return build_translation_model(config, make_tokenizer("seq2seq")).eval(), {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_search_finds_what_generate_finds(kind: str, name: str) -> None:
    model, inputs = inputs_of(kind)
    model.generation_config.update(do_sample=False, eos_token_id=ENDS, pad_token_id=1, max_new_tokens=12)
    model.generation_config.update(**SETTINGS[name])
    assert can_search(model)
    expected = model.generate(**inputs, use_cache=True)
    rows: list[int] = []
    model.register_forward_hook(lambda module, given, output: rows.append(len(output.logits)))
    found = model.generate(**inputs, use_cache=True, custom_generate=search)
    assert found.tolist() == expected.tolist()
    if name != "beams until none could be better":  # at twice the length anything could
        assert min(rows) < max(rows), "some sentences leave before others"


def test_what_asks_for_a_row_by_its_place_is_left_to_generate() -> None:
    def can(stateful: bool = False, **settings: Any) -> bool:
        config = GenerationConfig(pad_token_id=1, **settings)
        return can_search(SimpleNamespace(generation_config=config, _is_stateful=stateful))

    assert can(num_beams=3) and can(repetition_penalty=1.0, num_return_sequences=1)
    assert not can(stateful=True) and not can(num_beams=3, num_return_sequences=2)
    for name, value in {
        "repetition_penalty": 1.2,
        "encoder_repetition_penalty": 1.2,
        "encoder_no_repeat_ngram_size": 2,
        "return_dict_in_generate": True,
        "guidance_scale": 1.5,
        "do_sample": True,
    }.items():
        assert not can(**{name: value}), name
    assert not can_search(SimpleNamespace(generation_config=GenerationConfig()))  # without a token to fill up with
