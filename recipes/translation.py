"""Translate: pairs → tokens → encoder–decoder or causal model → loop → BLEU and chrF on raw text → a folder to use.

python recipes/translation.py                                         the built-in English–German set, minutes on a CPU
accelerate launch recipes/translation.py --config recipes/configs/translation/multi30k_short.yaml
python recipes/translation.py --translate "half past three"           with the model of the run before; - reads lines
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config_or_builtin
from hfkit.settings import BadInput, DecodingConfig, PairDataConfig, RunConfig, TranslationModelConfig

BUILTIN = Path(__file__).parent / "configs" / "translation" / "builtin.yaml"
EPOCHS = 8.0  # where neither epochs nor max_steps are given


@dataclass
class TranslationConfig(RunConfig):
    """Train and score a translation model: from scratch, or one that exists."""

    data: PairDataConfig = field(default_factory=PairDataConfig)
    """Which pairs, and what the languages are called."""
    model: TranslationModelConfig = field(default_factory=TranslationModelConfig)
    """Kind, shape, prompt or prefix."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beams and length."""
    translate: str | None = None
    """Train nothing: translate this text (or - : each line of standard input) with model.path, or this run's model."""
    output_dir: Path = Path("runs/translation")
    """Checkpoints, figures, translations, report and the final model."""

    def __post_init__(self) -> None:
        if self.model.average_checkpoints > self.train.keep_checkpoints:
            raise BadInput(
                f"model.average_checkpoints {self.model.average_checkpoints} needs as many checkpoints; "
                f"train.keep_checkpoints is {self.train.keep_checkpoints}"
            )
        if self.train.max_steps is None and self.train.epochs is None:
            self.train.epochs = EPOCHS


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config_or_builtin(TranslationConfig, BUILTIN)

import math
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkit.data.pair_batches import EncodedPairs, evaluation_batches, pair_batches, plan_pairs
from hfkit.data.pairs import Pair, Pairs, load_pairs
from hfkit.decoding import open_translator, translate
from hfkit.facts import Facts
from hfkit.files import digest_of
from hfkit.launch import build_accelerator, launch
from hfkit.loop import sum_losses
from hfkit.metrics import score_translation, write_lines, write_predictions
from hfkit.remote import resolve_model
from hfkit.run import Run
from hfkit.tokenizer import add_end, load_tokenizer, tokenizer_hash, train_tokenizer
from hfkit.translation import LOADERS, TranslationLoss, build_codec, build_translation_model, set_decoding


def main(config: TranslationConfig) -> None:
    """Run the whole story, on every process that was launched."""
    if config.translate is not None:
        return translate_texts(config)
    data = load_pairs(config.data)
    tokenizer = choose_tokenizer(config, data.train)
    run = Run(config, describe(config, data, tokenizer), select="eval_loss")

    model = build_translation_model(config.model, tokenizer, config.seed)
    codec = build_codec(config.model, config.data, tokenizer, model)
    set_decoding(model, codec, config.decoding)
    cut: dict[str, list[float]] = {}

    def encode(split: str, pairs: list[Pair]) -> EncodedPairs:
        sources, long_sources = codec.encode_sources([pair.source for pair in pairs])
        targets, long_targets = codec.encode_targets([pair.target for pair in pairs])
        cut[split] = [long_sources, long_targets]
        return EncodedPairs(sources, targets, int(tokenizer.pad_token_id), codec.start_id)

    encoded = {split: encode(split, pairs) for split, pairs in data.splits.items() if pairs}
    run.say(f"Training pairs: {len(data.train)}; removed: {data.removed}.")
    for split, (source, target) in cut.items():
        run.say(
            f"Cut at {config.data.sequence_length} tokens: {source:.1%} of {split} sources, {target:.1%} of targets."
        )

    plan, batches = plan_pairs(config.train, encoded["train"].lengths, config.seed, run.rank, run.world_size)
    run.set_up(TranslationLoss(model, config.model.label_smoothing), config.optim, plan, tokenizer)

    def validate(module: nn.Module) -> dict[str, float]:
        held_out = encoded.get("validation", encoded["train"])
        nats, targets = sum_losses(run.accelerator, module, evaluation_batches(held_out, 32, run.rank, run.world_size))
        return {"eval_loss": nats / targets, "perplexity": math.exp(min(700.0, nats / targets))}

    def test(module: nn.Module) -> dict[str, Any]:
        split = "test" if data.test else "validation"
        pairs = data.splits[split]
        model = run.accelerator.unwrap_model(module).finished_model()
        found = translate(run.accelerator, model, codec, [pair.source for pair in pairs], config.decoding.batch_size)
        texts = [translation.text for translation in found]
        if run.is_main:
            write_translations(run.output_dir, pairs, texts)
        return {
            "evaluated_on": split,
            **score_translation(texts, [pair.target for pair in pairs], str(config.data.target_code)),
            "exact_match": sum(text == pair.target for text, pair in zip(texts, pairs, strict=True)) / len(pairs),
            "ended_share": sum(translation.ended for translation in found) / len(pairs),
        }

    run.train(pair_batches(encoded["train"], batches, plan.split), validate)
    run.choose_best(validate, config.model.average_checkpoints)
    extra = {"removed": data.removed, "cut_share": cut, "decoding": asdict(config.decoding)}
    run.finish(test, extra=extra, loader=LOADERS[config.model.kind])


def choose_tokenizer(config: TranslationConfig, pairs: list[Pair]) -> PreTrainedTokenizerBase:
    """Return the model's own tokenizer; for one built from scratch the one named, or one trained on both languages."""
    named = config.tokenizer if config.tokenizer.path else config.model
    if named.path:
        tokenizer = load_tokenizer(named.path, named.revision)
    else:
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), config.tokenizer)
    if config.model.kind == "seq2seq" and config.model.path is None:
        add_end(tokenizer)
    return tokenizer


def describe(config: TranslationConfig, data: Pairs, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Return what this run is: compared at resume, and written into its passport."""
    splits = {split: {"pairs": len(pairs), "sha256": digest_of(pairs)} for split, pairs in data.splits.items()}
    key = digest_of(splits)[:16]
    names = ("kind", "label_smoothing", "prompt", "prefix")
    identity = {f"model.{name}": getattr(config.model, name) for name in names}
    identity |= {f"data.{name}": getattr(config.data, name) for name in ("source_code", "target_code")}
    hashed = tokenizer_hash(tokenizer)
    facts = {"key": key, "splits": splits, "removed": data.removed}
    return Facts(key, hashed, identity, facts, {"sha256": hashed, "vocab_size": len(tokenizer)})


def write_translations(folder: Path, pairs: list[Pair], texts: list[str]) -> None:
    """Write predictions.jsonl, and files for the sacrebleu command: `sacrebleu test.ref -i test.hyp`."""
    columns = {"src": [pair.source for pair in pairs], "ref": [pair.target for pair in pairs], "hyp": texts}
    for name, lines in columns.items():
        write_lines(folder / f"test.{name}", lines)
    rows = zip(*columns.values(), strict=True)
    write_predictions(
        folder / "predictions.jsonl", [{"source": s, "reference": r, "hypothesis": h} for s, r, h in rows]
    )


def translate_texts(config: TranslationConfig) -> None:
    """Print the translation of each text, one a line."""
    folder = resolve_model(config.model.path or config.output_dir / "model", config.model.revision)
    model, codec = open_translator(folder)
    texts = [line.rstrip("\n") for line in sys.stdin] if config.translate == "-" else [str(config.translate)]
    if not all(text.strip() for text in texts) or not texts:
        raise BadInput("translate: the text is empty")
    accelerator = build_accelerator(config.train)
    found = translate(accelerator, model.to(accelerator.device), codec, texts, config.decoding.batch_size)
    for translation in found if accelerator.is_main_process else []:
        print(translation.text)


if __name__ == "__main__":
    launch(main, config)
