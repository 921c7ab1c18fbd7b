"""Translate: pairs → tokens → encoder–decoder or causal model → loop → BLEU and chrF on raw text → a folder to use.

python recipes/translation.py                                         the built-in English–German set, minutes on a CPU
accelerate launch recipes/translation.py --config recipes/configs/translation/multi30k_short.yaml
python recipes/translation.py --translate "half past three"           with the model of the run before; - reads lines
"""

import sys
from dataclasses import dataclass, field, replace
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
        super().__post_init__()
        if self.train.sample_every:
            raise BadInput("train.sample_every: translation prints no samples while it trains; leave it out")
        if self.train.batch_stages:
            raise BadInput("train.batch_stages: a step of translation is a batch of similar lengths; leave it out")
        if earlier := self.model.average_checkpoints:
            if self.train.average_checkpoints not in (0, earlier):
                raise BadInput(
                    f"train.average_checkpoints is {self.train.average_checkpoints}, and under its earlier name, "
                    f"model.average_checkpoints, {earlier}: leave the second out"
                )
            self.train = replace(self.train, average_checkpoints=earlier)
            self.model = replace(self.model, average_checkpoints=0)
        if self.train.max_steps is None and self.train.epochs is None:
            self.train.epochs = EPOCHS

    @property
    def one_shot(self) -> bool:
        """Whether a model is used and none trained."""
        return self.translate is not None


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config_or_builtin(
        TranslationConfig, BUILTIN, lacks=lambda config: config.data.is_builtin and config.translate is None
    )

from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hfkit.data.pair_batches import pair_batches, plan_pairs
from hfkit.data.pairs import Pairs, load_pairs
from hfkit.data.readers import given_texts
from hfkit.decoding import open_translator, translate
from hfkit.facts import Facts
from hfkit.files import digest_of
from hfkit.launch import build_accelerator, launch
from hfkit.remote import resolve_model
from hfkit.run import NOTHING_HELD_OUT, Run
from hfkit.tokenizer import tokenizer_hash
from hfkit.translation import (
    LOADERS,
    TranslationLoss,
    build_codec,
    build_translation_model,
    choose_tokenizers,
    set_decoding,
)
from hfkit.translation_scores import score_held_out_pairs, score_translations, write_translations


def main(config: TranslationConfig) -> None:
    """Run the whole story, on every process that was launched."""
    if config.one_shot:
        return translate_texts(config)
    data = load_pairs(config.data)
    tokenizer, target_tokenizer = choose_tokenizers(config.model, config.tokenizer, data.train)
    run = Run(config, describe(config, data, tokenizer, target_tokenizer), select="eval_loss")

    model = build_translation_model(config.model, tokenizer, config.seed, target_tokenizer)
    codec = build_codec(config.model, config.data, tokenizer, model, target_tokenizer)
    decoding = set_decoding(model, codec, config.decoding)
    encoded, cut = codec.encode_splits(data.splits)
    tell(run, data, cut, config.data.sequence_length)

    plan, batches = plan_pairs(config.train, encoded["train"].lengths, config.seed, run.rank, run.world_size)
    loss = TranslationLoss(model, config.model.label_smoothing, config.optim.z_loss)
    run.set_up(loss, config.optim, plan, codec)

    def validate(module: nn.Module) -> dict[str, float]:
        return score_held_out_pairs(run.accelerator, module, encoded.get("validation", encoded["train"]))

    def test(module: nn.Module) -> dict[str, Any]:
        split = "test" if data.test else "validation"
        pairs, model = data.splits[split], run.accelerator.unwrap_model(module).finished_model()
        found = translate(run.accelerator, model, codec, [pair.source for pair in pairs], config.decoding.batch_size)
        if run.is_main:
            write_translations(run.output_dir, pairs, found)
        return {"evaluated_on": split, **score_translations(pairs, found, str(config.data.target_code))}

    run.train(pair_batches(encoded["train"], batches, plan.split), validate)
    run.choose_result(validate)
    extra = {"removed": data.removed, "cut_share": cut, "decoding": asdict(config.decoding) | decoding}
    run.finish(test, extra=extra, loader=LOADERS[config.model.kind])


def tell(run: Run, data: Pairs, cut: dict[str, list[float]], length: int) -> None:
    """Print what became of the pairs."""
    run.say(f"Training pairs: {len(data.train)}; removed: {data.removed}.")
    if not data.validation:
        run.say(NOTHING_HELD_OUT)
    for split, (sources, targets) in cut.items():
        run.say(f"Cut at {length} tokens: {sources:.1%} of {split} sources, {targets:.1%} of targets.")


def describe(
    config: TranslationConfig,
    data: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> Facts:
    """Return what this run is: compared at resume, and written into its passport."""
    splits = {split: {"pairs": len(pairs), "sha256": digest_of(pairs)} for split, pairs in data.splits.items()}
    key = digest_of(splits)[:16]
    names = ("kind", "label_smoothing", "vocabularies", "prompt", "prefix")
    identity = {f"model.{name}": getattr(config.model, name) for name in names}
    identity |= {f"data.{name}": getattr(config.data, name) for name in ("source_code", "target_code")}
    facts = {"key": key, "splits": splits, "removed": data.removed}
    tokenizers = [each for each in (tokenizer, target_tokenizer) if each is not None]
    hashed = tokenizer_hash(tokenizer) if len(tokenizers) == 1 else digest_of([tokenizer_hash(t) for t in tokenizers])
    sizes = dict(zip(("vocab_size", "target_vocab_size"), map(len, tokenizers), strict=False))
    return Facts(key, hashed, identity, facts, {"sha256": hashed, **sizes})


def translate_texts(config: TranslationConfig) -> None:
    """Print the translation of each text, one a line."""
    texts = given_texts(str(config.translate), "translate")
    folder = resolve_model(config.model.path or config.output_dir / "model", config.model.revision)
    model, codec = open_translator(folder)
    set_decoding(model, codec, config.decoding, saved=True)
    accelerator = build_accelerator(config.train)
    if (cut := codec.encode_sources(texts)[1]) and accelerator.is_main_process:
        print(f"Note: {cut:.1%} of the texts are over {codec.length} tokens and cut there.", file=sys.stderr)
    found = translate(accelerator, model.to(accelerator.device), codec, texts, config.decoding.batch_size)
    for translation in found if accelerator.is_main_process else []:
        print(translation.text)


if __name__ == "__main__":
    launch(main, config)
