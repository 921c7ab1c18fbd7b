"""Translating a file: hfkit's batches of similar length against plain ``generate`` in the file's order.

    python benchmarks/translation_speed.py --model.path runs/multi30k-short/model --texts runs/multi30k-short/test.src

Each way translates the same sentences with the model's own search, alternated; the figures are medians of CPU seconds,
which other work on the machine disturbs least. Batches in the file's order wait for their longest sentence; one
sentence at a time is what a loop over the file does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from hfkit.codec import Codec
from hfkit.decoding import open_translator, translate
from hfkit.launch import tune_process
from results import save_result

BATCH_SIZE, PAIRS = 32, 3


@torch.no_grad()
def plainly(model: PreTrainedModel, codec: Codec, texts: list[str], batch_size: int) -> list[str]:
    """Translate with transformers alone, in the order of the file."""
    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        batch = [codec.prefix + text for text in texts[start : start + batch_size]]
        inputs = codec.tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
        found += codec.writer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    return [text.strip() for text in found]


def main() -> None:
    """Time the ways and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model.path", dest="model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--lines", type=int, default=256, help="sentences from its beginning")
    asked = parser.parse_args()
    tune_process()
    model, codec = open_translator(asked.model)
    model.eval()
    texts = asked.texts.read_text("utf-8").splitlines()[: asked.lines]
    accelerator = Accelerator(cpu=True)
    ways: dict[str, Callable[[], list[str]]] = {
        "hfkit": lambda: [each.text for each in translate(accelerator, model, codec, texts, BATCH_SIZE)],
        "plain generate, batches": lambda: plainly(model, codec, texts, BATCH_SIZE),
        "plain generate, one by one": lambda: plainly(model, codec, texts, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts_of: dict[str, list[str]] = {}
    for _ in range(PAIRS):
        for name, way in ways.items():
            start = time.process_time()
            texts_of[name] = way()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {
        name: {
            "cpu_seconds": round(medians[name], 2),
            "range": [round(min(values), 2), round(max(values), 2)],
            "times_hfkit": round(medians[name] / medians["hfkit"], 2),
            "same_translations": sum(a == b for a, b in zip(texts_of[name], texts_of["hfkit"], strict=True)),
        }
        for name, values in seconds.items()
    }
    search = {"num_beams": model.generation_config.num_beams, "batch_size": BATCH_SIZE, "sentences": len(texts)}
    save_result("translation_speed", {**search, "ways": figures})


if __name__ == "__main__":
    main()
