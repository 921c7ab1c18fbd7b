"""Translating a file: hfkit's search in batches of similar length against plain ``generate`` in the file's order.

    python benchmarks/translation_speed.py --model.path runs/multi30k-short/model --texts runs/multi30k-short/test.src

Each way translates the same sentences, alternated, with the model's own beams and then greedily; the figures are
medians of CPU seconds, which other work disturbs least. Plain ``generate`` has batches of 32 and of hfkit's size.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from hfkit.codec import Codec
from hfkit.decoding import open_translator, translate
from hfkit.launch import tune_process
from hfkit.settings import DecodingConfig
from hfkit.translation import set_decoding
from results import save_result, spread

SIZE, PAIRS = DecodingConfig().batch_size, 5


@torch.no_grad()
def plainly(model: PreTrainedModel, codec: Codec, texts: list[str], batch_size: int) -> list[str]:
    """Translate with transformers alone, in the order of the file."""
    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        batch = [codec.prefix + text for text in texts[start : start + batch_size]]
        inputs = codec.tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
        found += codec.writer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    return [text.strip() for text in found]


def compare(model: PreTrainedModel, codec: Codec, texts: list[str]) -> dict[str, Any]:
    """Return the figures of each way with the model's search as it is set."""
    accelerator = Accelerator(cpu=True)
    ways: dict[str, Callable[[], list[str]]] = {
        "hfkit": lambda: [each.text for each in translate(accelerator, model, codec, texts, SIZE)],
        **{f"plain generate, {size}": partial(plainly, model, codec, texts, size) for size in (32, SIZE)},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[str]] = {}
    for _ in range(PAIRS):
        for name, way in ways.items():
            start = time.process_time()
            found[name] = way()
            seconds[name].append(time.process_time() - start)
    ratios = {
        name: spread([theirs / ours for theirs, ours in zip(values, seconds["hfkit"], strict=True)])
        for name, values in seconds.items()
    }
    return {
        name: {
            "cpu_seconds": spread(values),
            "ours_is_faster_by": ratios[name],
            "same_translations": sum(a == b for a, b in zip(found[name], found["hfkit"], strict=True)),
        }
        for name, values in seconds.items()
    }


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
    beams = model.generation_config.num_beams
    result = {"pairs": PAIRS, "sentences": len(texts), "batch_size": SIZE, "threads": torch.get_num_threads()}
    result[f"{beams} beams"] = compare(model, codec, texts)
    set_decoding(model, codec, DecodingConfig(num_beams=1, max_new_tokens=model.generation_config.max_new_tokens))
    result["greedy"] = compare(model, codec, texts)
    save_result("translation_speed", result)


if __name__ == "__main__":
    main()
