"""Scores of a translation model: its loss on held-out pairs, BLEU and chrF of what it writes, and the files of both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hfkit.data.pair_batches import EncodedPairs, evaluation_batches
from hfkit.data.pairs import Pair
from hfkit.decoding import Translation
from hfkit.loop import sum_losses
from hfkit.metrics import score_translation, write_lines, write_predictions

BATCH_SIZE = 32  # pairs per forward pass; changes speed alone


def score_held_out_pairs(accelerator: Accelerator, module: nn.Module, pairs: EncodedPairs) -> dict[str, float]:
    """Return eval_loss, in nats per target token without smoothing, and perplexity."""
    batches = evaluation_batches(pairs, BATCH_SIZE, accelerator.process_index, accelerator.num_processes)
    nats, targets = sum_losses(accelerator, module, batches)
    return {"eval_loss": nats / targets, "perplexity": math.exp(min(700.0, nats / targets))}


def score_translations(pairs: Sequence[Pair], found: Sequence[Translation], language: str) -> dict[str, Any]:
    """Return BLEU and chrF against the raw references, and the shares that equal them and that ended by themselves.

    Spaces around a reference make no difference to a share: translations never have any.
    """
    texts = [translation.text for translation in found]
    return {
        **score_translation(texts, [pair.target for pair in pairs], language),
        "exact_match": sum(text == pair.target.strip() for text, pair in zip(texts, pairs, strict=True)) / len(pairs),
        "ended_share": sum(translation.ended for translation in found) / len(pairs),
    }


def write_translations(folder: Path, pairs: Sequence[Pair], found: Sequence[Translation]) -> None:
    """Write predictions.jsonl, and files for the sacrebleu command: `sacrebleu test.ref -i test.hyp`."""
    sources, references = zip(*pairs, strict=True)
    columns = {"src": sources, "ref": references, "hyp": [translation.text for translation in found]}
    for name, lines in columns.items():
        write_lines(folder / f"test.{name}", lines)
    rows = [{"source": s, "reference": r, "hypothesis": h} for s, r, h in zip(*columns.values(), strict=True)]
    write_predictions(folder / "predictions.jsonl", rows)
