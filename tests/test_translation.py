"""Translation: exact gradients, every kind of pretrained model with its codes, and translations that reload."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoTokenizer,
)

from hfkit.codec import Codec
from hfkit.data.pair_batches import EncodedPairs, evaluation_batches, pair_batches, plan_pairs
from hfkit.data.pairs import Pair, load_pairs
from hfkit.decoding import Translation, open_translator, translate
from hfkit.launch import build_accelerator
from hfkit.loop import sum_losses, train_step
from hfkit.settings import (
    BadInput,
    DecodingConfig,
    OptimConfig,
    PairDataConfig,
    TokenizerConfig,
    TrainConfig,
    TranslationModelConfig,
)
from hfkit.tokenizer import train_tokenizer
from hfkit.translation import TranslationLoss, build_codec, build_translation_model, choose_tokenizers, set_decoding
from hfkit.translation_scores import score_translations
from hfkit.usage import SENTENCE, find_task, usage
from processes import run_in_processes
from translators import LLAMA, MARIAN, PAIRS, make_tokenizer, save_pretrained

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

SHAPES = {"seq2seq": MARIAN, "causal": LLAMA}


def build(kind: str) -> tuple[Any, Codec]:
    tokenizer = make_tokenizer(kind)
    config = TranslationModelConfig(kind=kind, config_overrides=SHAPES[kind])
    model = build_translation_model(config, tokenizer, seed=1)
    codec = build_codec(config, PairDataConfig(sequence_length=24), tokenizer, model)
    set_decoding(model, codec, DecodingConfig(num_beams=2, max_new_tokens=12))
    return model, codec


def encode(codec: Codec, pairs: list[Pair]) -> EncodedPairs:
    sources, _ = codec.encode_sources([pair.source for pair in pairs])
    targets, _ = codec.encode_targets([pair.target for pair in pairs])
    return EncodedPairs(sources, targets, int(codec.tokenizer.pad_token_id), codec.start_id)


def moved(kind: str, micro: int) -> torch.Tensor:
    """Return how far one step of plain gradient descent moves this process's weights: minus the gradient."""
    model, codec = build(kind)
    pairs = encode(codec, [*PAIRS[:7], Pair("one", "eins")])
    accelerator = build_accelerator(TrainConfig(precision="fp32"))
    module = TranslationLoss(model, label_smoothing=0.1)
    prepared, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=1.0))
    config = TrainConfig(max_steps=2, global_batch_size=8, micro_batch_size=micro)
    plan, batches = plan_pairs(config, pairs.lengths, 0, accelerator.process_index, accelerator.num_processes)
    parameters = list(prepared.parameters())
    before = torch.cat([p.detach().flatten() for p in parameters])
    step = pair_batches(pairs, batches, plan.split)(1)
    train_step(accelerator, prepared, optimizer, step, number=1, seed=0, max_grad_norm=0.0, parameters=parameters)
    return torch.cat([p.detach().flatten() for p in parameters]) - before


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_do_not_depend_on_the_split(kind: str) -> None:
    whole = moved(kind, 8)
    assert whole.abs().max() > 0.01
    for micro in (1, 2, 4):
        torch.testing.assert_close(moved(kind, micro), whole, atol=1e-6, rtol=1e-4)
    for micro in (1, 4):
        for of_rank in run_in_processes(2, lambda micro=micro: moved(kind, micro).numpy()):
            torch.testing.assert_close(torch.from_numpy(of_rank), whole, atol=1e-6, rtol=1e-4)


def test_loss_is_transformers_own() -> None:
    model, codec = build("seq2seq")
    batch = encode(codec, PAIRS[:5]).collate(range(5))
    loss, count = TranslationLoss(model, label_smoothing=0.1).eval()(**batch)
    judged = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]).loss
    assert (loss / count).item() == pytest.approx(judged.item(), abs=1e-6)
    model, codec = build("causal")
    batch = encode(codec, PAIRS[:1]).collate([0])
    loss, count = TranslationLoss(model).eval()(**batch)
    labels = torch.cat([torch.full((1, 1), -100), batch["targets"]], dim=1)  # transformers shifts them back
    ids = torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1)
    assert (loss / count).item() == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), abs=1e-6)
    assert count.item() == len(codec.encode_targets([PAIRS[0].target])[0][0])


@pytest.mark.parametrize("kind", SHAPES)
def test_scores_and_translations_do_not_depend_on_batches_or_processes(kind: str) -> None:
    model, codec = build(kind)
    pairs = [*PAIRS[:10], Pair("one two three four five dogs", "eins zwei drei vier fünf Hunde")]  # 11
    encoded, sources = encode(codec, pairs), [pair.source for pair in pairs]

    def score(batch_size: int) -> tuple[float, list[str]]:
        accelerator = Accelerator(cpu=True)
        batches = evaluation_batches(encoded, batch_size, accelerator.process_index, accelerator.num_processes)
        nats, targets = sum_losses(accelerator, TranslationLoss(model), batches)
        found = translate(accelerator, model, codec, sources, batch_size)
        return nats / targets, [translation.text for translation in found]

    loss, texts = score(1)
    assert len(texts) == 11
    for other_loss, others in (score(3), score(8), *run_in_processes(2, lambda: score(3))):
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert others == texts


def test_budget_batches_keep_to_the_budget_and_reach_every_pair() -> None:
    _, codec = build("seq2seq")
    encoded = encode(codec, PAIRS)
    plan, batches = plan_pairs(TrainConfig(epochs=2, global_batch_tokens=64), encoded.lengths, 3, 0, 1)
    assert plan.max_steps == 2 * len(batches(0)) == 2 * len(batches(1))
    for epoch in (0, 1):
        assert sorted(np.concatenate(batches(epoch))) == list(range(len(PAIRS)))
        assert max(len(rows) * encoded.lengths[rows].max() for rows in batches(epoch)) <= 64


def test_cut_targets_do_not_teach_to_stop() -> None:
    _, codec = build("seq2seq")
    codec = Codec(codec.tokenizer, "seq2seq", "", "", 4, codec.start_id)
    sources, share = codec.encode_sources([PAIRS[0].source * 3, "one"])
    targets, _ = codec.encode_targets([PAIRS[0].target * 3, "eins"])
    end = codec.tokenizer.eos_token_id
    assert (share, len(sources[0]), sources[0][-1], targets[0].count(end)) == (0.5, 4, end, 0)
    assert targets[1][-1] == end


def write_rows(path: Path, pairs: list[Pair]) -> str:
    path.write_text("".join(json.dumps({"translation": {"en": s, "de": t}}) + "\n" for s, t in pairs))
    return str(path)


def run_recipe(folder: Path, model: TranslationModelConfig, steps: int, **codes: str) -> Path:
    """Train on 20 pairs with the recipe; return its folder."""
    recipe: Any = importlib.import_module("translation")
    data = PairDataConfig(
        train_files=write_rows(folder / "pairs.jsonl", PAIRS),
        validation_files=write_rows(folder / "more.jsonl", [Pair("ten", "zehn")]),
        sequence_length=24,
        **codes,
    )
    config = recipe.TranslationConfig(
        data=data,
        tokenizer=TokenizerConfig(vocab_size=320),
        model=model,
        optim=OptimConfig(learning_rate=1e-2, schedule="linear", weight_decay=0.0),
        train=TrainConfig(max_steps=steps, global_batch_size=20, micro_batch_size=20, eval_every=0, save_every=0),
        decoding=DecodingConfig(num_beams=2),
        output_dir=folder,
        resume="never",
    )
    recipe.main(config)
    return folder


OVERFITTED = {
    "seq2seq": TranslationModelConfig(config_overrides=MARIAN),
    "separate": TranslationModelConfig(config_overrides=MARIAN, vocabularies="separate"),
    "causal": TranslationModelConfig(kind="causal", config_overrides=LLAMA),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of every kind, and one that goes on with a multilingual model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (*OVERFITTED, "nllb", "pretrained")}
    for name, model in OVERFITTED.items():
        run_recipe(folders[name], model, steps=60)
    save_pretrained("nllb", folders["pretrained"])
    model = TranslationModelConfig(path=str(folders["pretrained"]))
    run_recipe(folders["nllb"], model, steps=2, source_code="eng_Latn", target_code="deu_Latn")
    return folders


def translations(folder: Path) -> list[Translation]:
    model, codec = open_translator(folder / "model")
    return translate(Accelerator(cpu=True), model, codec, [pair.source for pair in PAIRS], batch_size=8)


@pytest.mark.parametrize("name", OVERFITTED)
def test_overfitted_pairs_are_translated_and_end(runs: dict[str, Path], name: str) -> None:
    found = translations(runs[name])
    assert [translation.ended for translation in found] == [True] * 20
    assert [translation.text for translation in found] == [pair.target for pair in PAIRS]


def test_a_model_of_two_vocabularies_keeps_both_when_it_is_trained_on(runs: dict[str, Path], tmp_path: Path) -> None:
    model = TranslationModelConfig(path=str(runs["separate"] / "model"))
    source, target = choose_tokenizers(model, TokenizerConfig(), PAIRS)
    assert target is not None and target.get_vocab() != source.get_vocab()
    assert target.get_vocab() == AutoTokenizer.from_pretrained(f"{model.path}/target_tokenizer").get_vocab()
    run_recipe(tmp_path, model, steps=1)
    _, codec = open_translator(tmp_path / "model")
    assert codec.writer.get_vocab() == target.get_vocab() and codec.tokenizer.get_vocab() == source.get_vocab()


def test_a_tokenizer_larger_than_the_model_is_refused(runs: dict[str, Path]) -> None:
    model = TranslationModelConfig(path=str(runs["seq2seq"] / "model"))
    larger = train_tokenizer([text for pair in PAIRS for text in pair], TokenizerConfig(vocab_size=320))
    larger.add_tokens([f"word{number}" for number in range(100)])
    with pytest.raises(BadInput, match=r"the tokenizer has \d+ tokens and .* only 320: use the model's own tokenizer"):
        build_translation_model(model, larger)


def test_what_is_asked_of_the_search_comes_before_what_was_saved(  # type: ignore[no-untyped-def]
    runs: dict[str, Path], capsys
) -> None:
    model, codec = open_translator(runs["seq2seq"] / "model")
    known = set_decoding(model, codec, DecodingConfig(length_penalty=0.5), saved=True)
    assert known == {"num_beams": 2, "length_penalty": 0.5, "max_new_tokens": 24}
    assert set_decoding(model, codec, DecodingConfig()) == {"num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 24}
    recipe: Any = importlib.import_module("translation")
    given = {"model": TranslationModelConfig(path=str(runs["seq2seq"] / "model")), "translate": PAIRS[0].source}
    for decoding, text in ((DecodingConfig(), PAIRS[0].target), (DecodingConfig(max_new_tokens=1), "e")):
        recipe.translate_texts(recipe.TranslationConfig(decoding=decoding, **given))
        said = capsys.readouterr()
        assert said.out.startswith(text) and (said.out.strip() == PAIRS[0].target) == (text == PAIRS[0].target)
        assert "cut there" not in said.err
    recipe.translate_texts(recipe.TranslationConfig(**given | {"translate": PAIRS[0].source * 9}))
    assert "Note: 100.0% of the texts are over 24 tokens and cut there." in capsys.readouterr().err


def test_a_text_to_translate_is_searched_for_without_the_built_in_settings() -> None:
    words = [sys.executable, "recipes/translation.py", "--translate", "one", "--print_config"]
    said = subprocess.run(words, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert "num_beams: null" in said.stdout


@pytest.mark.parametrize("kind", SHAPES)
def test_special_tokens_in_a_text_are_its_characters(kind: str) -> None:
    _, codec = build(kind)
    text, special = "a<|endoftext|><|pad|> b", codec.tokenizer.all_special_ids
    source, target = codec.encode_sources([text])[0][0], codec.encode_targets([text])[0][0]
    assert sum(token in special for token in source) == (kind == "seq2seq")  # its end
    assert [token for token in target if token in special] == [codec.tokenizer.eos_token_id]
    assert codec.tokenizer.decode(source, skip_special_tokens=True).strip() == text
    framed = replace(codec, **({"prompt": "<|user|>{source}"} if kind == "causal" else {"prefix": "<|user|>"}))
    assert framed.encode_sources(["a"])[0][0][0] == codec.tokenizer.convert_tokens_to_ids("<|user|>")  # it is meant


def test_spaces_around_a_reference_are_no_mistake() -> None:
    scores = score_translations([Pair("yes", "ja "), Pair("no", "nein")], [Translation("ja", True)] * 2, "de")
    assert scores["exact_match"] == 0.5


def test_damaged_weights_are_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["seq2seq"] / "model", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(BadInput, match=rf"model.path {tmp_path} does not load: [^\n]*$"):
        build_translation_model(TranslationModelConfig(path=str(tmp_path)), make_tokenizer("seq2seq"))
    with pytest.raises(BadInput, match=rf"^{tmp_path} does not load: [^\n]*$"):
        open_translator(tmp_path)


PLAIN = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

texts, folders = json.loads(sys.argv[1])
for name, folder in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = AutoTokenizer.from_pretrained(folder, subfolder="target_tokenizer") if name == "separate" else tokenizer
    model = (AutoModelForCausalLM if name == "causal" else AutoModelForSeq2SeqLM).from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(text + "\\n" * (name == "causal"), return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] if name == "causal" else 0 :]
        found.append(written.decode(output, skip_special_tokens=True).strip())
    print(json.dumps([name, found]))
assert not any(module.startswith("hfkit") for module in sys.modules)
"""


def test_plain_transformers_in_a_fresh_process_gives_the_same_translations(runs: dict[str, Path]) -> None:
    folders = {name: str(runs[name] / "model") for name in (*OVERFITTED, "nllb")}
    given = json.dumps([[pair.source for pair in PAIRS[::4]], folders])
    said = subprocess.run(
        [sys.executable, "-c", PLAIN, given],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(json.loads(line) for line in said.stdout.splitlines())
    for name in folders:
        assert found[name] == [translation.text for translation in translations(runs[name])[::4]], name


@pytest.mark.parametrize("name", [*OVERFITTED, "nllb"])
def test_what_the_card_shows_translates(runs: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = runs[name] / "model"
    config = json.loads((model / "config.json").read_text())
    exec(usage(str(model), find_task(config), config).replace(SENTENCE, PAIRS[3].source), {})
    assert capsys.readouterr().out.strip() == translations(runs[name])[3].text


def test_files_score_as_the_result_says(runs: dict[str, Path]) -> None:
    overfitted = runs["seq2seq"]
    result = json.loads((overfitted / "result.json").read_text())
    assert result["examples"] == 1 and result["evaluated_on"] == "validation"
    assert json.loads((overfitted / "predictions.jsonl").read_text())["reference"] == "zehn"
    command = [str(Path(sys.executable).with_name("sacrebleu")), "test.ref", "-i", "test.hyp", "-m", "bleu", "chrf"]
    said = subprocess.run(
        [*command, "--chrf-word-order", "2", "-w", "6"], cwd=overfitted, capture_output=True, text=True
    )
    scores = {answer["name"]: answer["score"] for answer in json.loads(said.stdout)}
    assert scores["BLEU"] == pytest.approx(result["bleu"], abs=1e-6)
    assert scores["chrF2++"] == pytest.approx(result["chrf"], abs=1e-6)


def load(folder: Path, source: str, target: str) -> tuple[Any, Codec]:
    config = TranslationModelConfig(path=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build_translation_model(config, tokenizer)
    data = PairDataConfig(source_code=source, target_code=target, sequence_length=64)
    return model, build_codec(config, data, tokenizer, model)


FAMILIES = {
    "mbart": ("en_XX", "de_DE"),
    "mbart50": ("en_XX", "de_DE"),
    "nllb": ("eng_Latn", "deu_Latn"),
    "m2m100": ("en", "de"),
    "opus": ("en", "de"),
    "marian": ("en", "de"),
    "t5": ("en", "de"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_pretrained_families_learn_and_generate_with_their_codes(name: str, tmp_path: Path) -> None:
    save_pretrained(name, tmp_path)
    model, codec = load(tmp_path, *FAMILIES[name])
    tokenizer = codec.tokenizer
    encoded = encode(codec, [Pair("a dog", "ein hund"), Pair("no", "nein")])
    loss, count = TranslationLoss(model).eval()(**encoded.collate([0, 1]))
    batch = tokenizer(
        [codec.prefix + "a dog", codec.prefix + "no"],
        text_target=["ein hund", "nein"],
        return_tensors="pt",
        padding=True,
    )
    labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
    judged = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert (loss / count).item() == pytest.approx(judged.item(), abs=1e-5)  # the decoder begins as in transformers
    set_decoding(model, codec, DecodingConfig(num_beams=1, max_new_tokens=4))
    output = model.generate(**tokenizer(codec.prefix + "a dog", return_tensors="pt", return_token_type_ids=False))[0]
    language = {"mbart": "de_DE", "mbart50": "de_DE", "nllb": "deu_Latn", "m2m100": "__de__"}.get(name)
    if language:
        first = output[0] if name == "mbart" else output[1]  # mBART-25 starts with the language itself
        assert tokenizer.convert_ids_to_tokens(int(first)) == language
        assert language not in translate(Accelerator(cpu=True), model, codec, ["a dog"], 1)[0].text
    assert codec.prefix == {"marian": ">>de<< ", "opus": ">>de<< ", "t5": "translate English to German: "}.get(name, "")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("nllb", "de", r"data.target_code: the model does not know the language 'de'.*it knows .*deu_Latn"),
        ("mbart50", "deu", r"does not know the language 'deu' \(did you mean 'de_DE'\?\); it knows .*cs_CZ"),
        ("m2m100", "xx", r"data.target_code: the model does not know the language 'xx'.*; it knows af, am, .*zu"),
        ("marian", "es", r"data.target_code: the model does not know the language 'es'.*; it knows de, fr"),
    ],
)
def test_unknown_languages_list_the_known_ones(name: str, target: str, message: str, tmp_path: Path) -> None:
    save_pretrained(name, tmp_path)
    with pytest.raises(BadInput, match=message):
        load(tmp_path, FAMILIES[name][0], target)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"translation": {"en": "a", "de": "ein"}}\n' * 3 + '{"translation": {"en": "b", "de": " "}}\n')
    files = {"train_files": str(rows), "validation_share": 0.0}
    with pytest.raises(BadInput, match=r"rows.jsonl:1: translation: no column 'fr'; the columns are en, de. Set"):
        load_pairs(PairDataConfig(target_key="fr", **files))
    with pytest.raises(BadInput, match=r"test pair 4: one side is empty"):
        load_pairs(PairDataConfig(test_files=str(rows), **files))
    with pytest.raises(BadInput, match=r"no training pair is left.*contaminated 3"):
        load_pairs(PairDataConfig(test_files=_first(rows), **files))
    with pytest.raises(BadInput, match=r"goes from en, not from 'de'"):
        load_pairs(PairDataConfig(source_key="de", target_key="en"))
    config = TranslationModelConfig(config_overrides={**MARIAN, "max_position_embeddings": 16})
    tokenizer = make_tokenizer("seq2seq")
    model = build_translation_model(config, tokenizer)
    with pytest.raises(BadInput, match=r"data.sequence_length 24 is over the model's limit of 16 positions"):
        build_codec(config, PairDataConfig(sequence_length=24), tokenizer, model)
    with pytest.raises(BadInput, match=r"has no field 'd_modell'; did you mean 'd_model'"):
        build_translation_model(TranslationModelConfig(config_overrides={"d_modell": 3}), tokenizer)


def _first(rows: Path) -> str:
    path = rows.with_name("first.jsonl")
    path.write_text(rows.read_text().splitlines(keepends=True)[0])
    return str(path)
