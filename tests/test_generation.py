"""Generation against plain ``model.generate``: the same tokens in batches, as a stream, and cut at stop strings."""

import copy
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfkit.generation import TextStreamer, complete, continue_prompts, encode_prompts, stream
from hfkit.model import generation_config
from hfkit.settings import BadInput, GenerationSettings, ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
TEXT = "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 天地玄黃"
PROMPTS = ["The quick", "fox", "Zwölf Boxkämpfer jagen Viktor", "a b c d e f g h"]
GREEDY = GenerationSettings(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([TEXT], TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,  # wide enough that the most probable token is far ahead of the second
    )
    built = LlamaForCausalLM(shape)
    built.generation_config = generation_config(320, tokenizer)
    return built.eval()


def plainly(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """What transformers gives for one prompt alone."""
    config = replace_length(model, 12)
    return model.generate(torch.tensor([ids]), generation_config=config, do_sample=False)[0, len(ids) :].tolist()


def replace_length(model: PreTrainedModel, length: int):  # type: ignore[no-untyped-def]
    config = type(model.generation_config)(**model.generation_config.to_dict())
    config.max_new_tokens = length
    return config


def test_greedy_equals_plain_generate_alone_and_in_a_batch(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    encoded = encode_prompts(tokenizer, PROMPTS)
    assert len({len(ids) for ids in encoded}) > 2  # so that the batch is really padded
    expected = [tokenizer.decode(plainly(model, ids), skip_special_tokens=True) for ids in encoded]
    assert [completion.text for completion in complete(model, tokenizer, encoded, GREEDY, 0)] == expected
    assert [complete(model, tokenizer, [ids], GREEDY, 0)[0].text for ids in encoded] == expected
    assert continue_prompts(model, tokenizer, PROMPTS, GREEDY, 5) == expected


def test_a_batch_gives_each_prompts_own_text_without_a_pad_token_too(tokenizer) -> None:  # type: ignore[no-untyped-def]
    # GPT-2 has learned positions and no pad token: where EOS stands in for it, a repetition penalty must not see it.
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, eos_token_id=0
    )
    model, foreign = GPT2LMHeadModel(shape).eval(), copy.deepcopy(tokenizer)
    foreign.pad_token = None
    prompts = encode_prompts(foreign, PROMPTS)
    for penalty in (1.0, 3.0):
        settings = replace(GREEDY, repetition_penalty=penalty)
        alone = [complete(model, foreign, [prompt], settings, 0)[0] for prompt in prompts]
        assert complete(model, foreign, prompts, settings, 0) == alone
    with torch.no_grad():  # the same logits everywhere: 32 for EOS, 16 for all others, or a thirtieth once penalised
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight.fill_(0.5)
        model.transformer.wte.weight[0] = 1
    settings = replace(GREEDY, repetition_penalty=30.0)
    assert {each.finish for each in complete(model, foreign, prompts, settings, 0)} == {"end"}


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        GenerationSettings(max_new_tokens=16, temperature=1.5, top_p=1.0),
        GenerationSettings(max_new_tokens=16, temperature=1.0, min_p=0.05, repetition_penalty=1.3),
        GenerationSettings(max_new_tokens=16, temperature=1.0, top_k=20, stop=["e", "zz"]),
    ],
)
def test_a_stream_gives_the_text_of_the_batch(model, tokenizer, settings) -> None:  # type: ignore[no-untyped-def]
    for prompt in encode_prompts(tokenizer, PROMPTS):
        for seed in range(2):
            pieces: list[str] = []
            streamed = stream(model, tokenizer, prompt, settings, seed, pieces.append)
            assert streamed == complete(model, tokenizer, [prompt], settings, seed)[0]
            assert "".join(pieces) == streamed.text


def test_characters_of_several_tokens_and_stop_strings_wait_until_they_are_whole(tokenizer) -> None:  # type: ignore[no-untyped-def]
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, ["<stop>"], pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer.encode("天🙂 a<sto b<stop> c", add_special_tokens=False):
        streamer.put(torch.tensor([token]))
    assert "".join(pieces) == "天🙂 a<sto b"
    assert not any("�" in piece for piece in pieces)


def test_a_stop_string_ends_the_text_before_it(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    free = complete(model, tokenizer, encode_prompts(tokenizer, ["The quick"]), GREEDY, 0)[0]
    stop = free.text[2:4]
    stopped = complete(model, tokenizer, encode_prompts(tokenizer, ["The quick"]), replace(GREEDY, stop=[stop]), 0)[0]
    assert (stopped.text, stopped.finish) == (free.text[: free.text.index(stop)], "stop")
    assert (free.finish, stopped.tokens < free.tokens) == ("length", True)


def test_an_end_token_is_counted_and_not_shown(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    prompt = encode_prompts(tokenizer, ["fox"])[0]
    third = plainly(model, prompt)[2]
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [own, third]
    try:
        completion = complete(model, tokenizer, [prompt], GREEDY, 0)[0]
    finally:
        model.generation_config.eos_token_id = own
    assert (completion.finish, completion.tokens) == ("end", plainly(model, prompt).index(third) + 1)


def test_sampling_depends_on_the_seed_alone(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    settings = GenerationSettings(max_new_tokens=10, temperature=1.0, top_p=1.0, num_samples=3)
    encoded = encode_prompts(tokenizer, ["fox", "dog"])
    before = torch.random.get_rng_state()
    texts = [[c.text for c in complete(model, tokenizer, encoded, settings, seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 6 and len(set(texts[0])) == 6
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_limit_of_top_k_unless_asked(model, tokenizer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    # transformers' own default is top_k 50, which is used where nothing is said
    seen = {}
    prepare = model._get_logits_processor
    monkeypatch.setattr(model, "_get_logits_processor", lambda *a, **k: seen.setdefault("processors", prepare(*a, **k)))
    complete(model, tokenizer, [[10]], GenerationSettings(max_new_tokens=1, temperature=1.0, top_p=1.0), 0)
    assert not any("TopK" in type(processor).__name__ for processor in seen["processors"])


def test_ids_without_a_token_are_never_made(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    settings = GenerationSettings(max_new_tokens=60, temperature=50.0, top_p=1.0)
    ids: list[int] = []
    streamer = stream(model, tokenizer, [10], settings, 0, lambda piece: None)
    assert streamer.tokens > 0
    output = complete(model, tokenizer, [[10]] * 4, settings, 1)
    ids = [token for completion in output for token in tokenizer.encode(completion.text)]
    assert max(ids) < len(tokenizer)


def test_a_prompt_has_the_room_that_it_has_alone(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    prompts = [[10] * 60, [11, 12], [10] * 55, [13] * 5]  # positions 64
    alone = [complete(model, tokenizer, [prompt], GREEDY, 0)[0] for prompt in prompts]
    assert [each.tokens for each in alone] == [4, 12, 9, 12]
    assert complete(model, tokenizer, prompts, GREEDY, 0) == alone


def test_a_stop_string_that_the_prompt_begins_is_none(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    (prompt,) = encode_prompts(tokenizer, ["The quick"])
    free = complete(model, tokenizer, [prompt], GREEDY, 0)[0]
    assert complete(model, tokenizer, [prompt], replace(GREEDY, stop=["k" + free.text[:1]]), 0)[0] == free


def test_a_prompt_that_fills_the_positions_is_bad_input(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert complete(model, tokenizer, [[10] * 60], GREEDY, 0)[0].tokens <= 4  # positions 64
    with pytest.raises(BadInput, match="64 positions"):
        complete(model, tokenizer, [[10] * 64], GREEDY, 0)
    with pytest.raises(BadInput, match="prompt 2 is empty"):
        encode_prompts(tokenizer, ["a", ""])


def test_special_tokens_in_a_prompt_are_its_characters(tokenizer) -> None:  # type: ignore[no-untyped-def]
    (ids,) = encode_prompts(tokenizer, ["a<|endoftext|>"])
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>"


@pytest.mark.parametrize("change", ["top_p=0", "stop=['']", "num_samples=2, temperature=0", "max_new_tokens=0"])
def test_settings_without_meaning_are_refused(change: str) -> None:
    with pytest.raises(BadInput):
        eval(f"GenerationSettings({change})")


def test_a_prompt_that_is_too_long_is_refused_before_the_first_batch(model, tokenizer, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    recipe = importlib.import_module("generate")
    monkeypatch.setattr(recipe, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(recipe, "load_causal_lm", lambda _: model)
    monkeypatch.setattr(recipe, "complete", lambda *_: pytest.fail("generated"))
    (tmp_path / "prompts.txt").write_text("fox\n" + "0123456789" * 9 + "\n")
    prompts = {"prompt_file": tmp_path / "prompts.txt", "batch_size": 1}
    with pytest.raises(BadInput, match=r"prompt 2 of 90 tokens leaves no room in the model's 64 positions; shorten it"):
        recipe.main(recipe.GenerateConfig(model=ModelConfig(path="any"), **prompts))


def test_the_recipe_reads_files_and_pipes_and_writes_json_lines(model, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("The quick\nfox\n")
    words = f"--model.path {folder} --generation.temperature 0 --generation.max_new_tokens 12".split()
    command = [sys.executable, "recipes/generate.py", *words, "--output_dir", str(tmp_path / "out")]
    piped = subprocess.run(command, cwd=ROOT, input="fox\n", capture_output=True, text=True)
    assert piped.returncode == 0, piped.stderr
    file = ["--prompt_file", str(tmp_path / "prompts.txt"), "--output_file", str(tmp_path / "o.jsonl")]
    assert subprocess.run([*command, *file], cwd=ROOT, capture_output=True).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["The quick", "fox"]
    assert piped.stdout == f"fox{rows[1]['text']}\n" and "tokens/s" in piped.stderr
