"""Translation: exact gradients, every kind of pretrained model with its codes, and translations that reload."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    MarianConfig,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
)

from hfkit.codec import Codec
from hfkit.data.pair_batches import EncodedPairs, evaluation_batches, pair_batches, plan_pairs
from hfkit.data.pairs import Pair, load_pairs
from hfkit.decoding import open_translator, translate
from hfkit.loop import sum_losses
from hfkit.model import generation_config
from hfkit.settings import (
    BadInput,
    DecodingConfig,
    OptimConfig,
    PairDataConfig,
    TokenizerConfig,
    TrainConfig,
    TranslationModelConfig,
)
from hfkit.tokenizer import add_end, train_tokenizer
from hfkit.translation import TranslationLoss, build_codec, build_translation_model, set_decoding
from processes import run_in_processes

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

SMALL = ("one", "two", "three", "four", "five"), ("eins", "zwei", "drei", "vier", "fünf")
LARGE = ("six", "seven", "eight", "nine"), ("sechs", "sieben", "acht", "neun")
PAIRS = [
    Pair(f"{a} {b} dogs", f"{c} {d} Hunde") for a, c in zip(*SMALL, strict=True) for b, d in zip(*LARGE, strict=True)
]


def marian(width: int) -> dict[str, int]:
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 2 * width}
    return {"d_model": width} | {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sizes.items()}


MARIAN, SIZES = marian(32), marian(16)
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
SHAPES = {"seq2seq": MARIAN, "causal": LLAMA}


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair], TokenizerConfig(vocab_size=320))
    if kind == "seq2seq":
        add_end(tokenizer)
    return tokenizer


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


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_do_not_depend_on_the_split(kind: str) -> None:
    model, codec = build(kind)
    pairs = encode(codec, [*PAIRS[:7], Pair("one", "eins")])

    def gradient(micro: int, world: int) -> torch.Tensor:
        module = TranslationLoss(model, label_smoothing=0.1).train()
        module.zero_grad()
        for rank in range(world):
            plan, batches = plan_pairs(
                TrainConfig(max_steps=2, global_batch_size=8, micro_batch_size=micro),
                pairs.lengths,
                0,
                rank,
                world,
            )
            step = pair_batches(pairs, batches, plan.split)(1)
            for batch in step.micro_batches:
                loss, _ = module(**batch)
                (loss / step.targets).backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    whole = gradient(8, 1)
    for micro, world in ((1, 1), (2, 1), (4, 1), (4, 2), (1, 2), (2, 2)):
        torch.testing.assert_close(gradient(micro, world), whole, atol=1e-6, rtol=1e-4)


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


def run_recipe(folder: Path, kind: str, **fields: Any) -> Path:
    """Overfit 20 pairs with the recipe; return its folder."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"translation": {"en": s, "de": t}}) + "\n" for s, t in PAIRS[:20]))
    (folder / "more.jsonl").write_text(json.dumps({"translation": {"en": "ten", "de": "zehn"}}) + "\n")
    recipe: Any = importlib.import_module("translation")
    recipe.main(
        recipe.TranslationConfig(
            data=PairDataConfig(
                train_files=str(path), validation_files=str(folder / "more.jsonl"), sequence_length=24, **fields
            ),
            tokenizer=TokenizerConfig(vocab_size=320),
            model=TranslationModelConfig(kind=kind, config_overrides=SHAPES[kind], label_smoothing=0.1),
            optim=OptimConfig(learning_rate=1e-2, schedule="linear", weight_decay=0.0),
            train=TrainConfig(max_steps=60, global_batch_size=20, micro_batch_size=20, eval_every=0, save_every=0),
            decoding=DecodingConfig(num_beams=2),
            output_dir=folder,
            resume="never",
        )
    )
    return folder


@pytest.fixture(scope="module", params=SHAPES)
def overfitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(tmp_path_factory.mktemp(request.param), request.param)


def test_overfitted_pairs_are_translated_and_end(overfitted: Path) -> None:
    model, codec = open_translator(overfitted / "model")
    found = translate(Accelerator(cpu=True), model, codec, [pair.source for pair in PAIRS], batch_size=8)
    assert [translation.ended for translation in found] == [True] * 20
    assert [translation.text for translation in found] == [pair.target for pair in PAIRS]


def test_plain_transformers_gives_the_same_translation(overfitted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(overfitted / "model")
    auto = AutoModelForSeq2SeqLM if "seq2seq" in str(overfitted) else AutoModelForCausalLM
    model = auto.from_pretrained(overfitted / "model")
    prompt = PAIRS[3].source + ("" if "seq2seq" in str(overfitted) else "\n")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs)[0]
    if "causal" in str(overfitted):
        output = output[inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == PAIRS[3].target


def test_files_score_as_the_result_says(overfitted: Path) -> None:
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


WORDS = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz:")]


def save_pretrained(name: str, folder: Path) -> None:
    """Save a tiny random model of a family with its own kind of tokenizer."""
    if name in ("mbart", "mbart50"):
        specials = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        tokenizer: Any = (MBartTokenizer if name == "mbart" else MBart50Tokenizer)(vocab=specials + WORDS)
        config: Any = MBartConfig(vocab_size=len(tokenizer), **SIZES)
    elif name == "nllb":
        vocabulary = {
            token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(w for w, _ in WORDS)])
        }
        tokenizer = NllbTokenizer(vocab=vocabulary, merges=[])
        config = M2M100Config(vocab_size=len(tokenizer), decoder_start_token_id=2, **SIZES)
    else:
        tokenizer = make_tokenizer("seq2seq")
        if name == "marian":
            tokenizer.add_special_tokens({"extra_special_tokens": [">>de<<", ">>fr<<"]})
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
        if name == "t5":
            config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **ids)
        else:
            config = MarianConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **ids, **SIZES)
    model = AutoModelForSeq2SeqLM.from_config(config)
    if name in ("t5", "marian"):
        model.generation_config = generation_config(config.vocab_size, tokenizer)
        model.generation_config.decoder_start_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
    language = {"mbart": "de_DE", "mbart50": "de_DE", "nllb": "deu_Latn"}.get(name)
    if language:
        first = output[0] if name == "mbart" else output[1]  # mBART-25 starts with the language itself
        assert tokenizer.convert_ids_to_tokens(int(first)) == language
    assert codec.prefix == {"marian": ">>de<< ", "t5": "translate English to German: "}.get(name, "")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("nllb", "de", r"data.target_code: the model does not know the language 'de'.*it knows .*deu_Latn"),
        ("mbart50", "deu", r"does not know the language 'deu' \(did you mean 'de_DE'\?\); it knows .*cs_CZ"),
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
