"""What makes generation faster on this machine: batches, a static cache, a compiled model, against plain ``generate``.

    python benchmarks/generation_speed.py

Greedy, 32 prompts of 32 tokens and 64 new tokens each, on random weights of two presets; each way is timed three times
in turn after a first time that does not count, and the median of tokens per second stands.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel

from hfkit.generation import complete
from hfkit.launch import tune_process
from hfkit.model import build_causal_lm
from hfkit.settings import GenerationSettings, ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer
from results import save_result

PROMPTS, LENGTH, NEW, ROUNDS = 32, 32, 64, 3
SETTINGS = GenerationSettings(max_new_tokens=NEW, temperature=0)


def plainly(model: PreTrainedModel, ids: torch.Tensor, cache: str = "dynamic") -> None:
    """Continue prompts with transformers' own generate, to the full length."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=1, cache_implementation=cache)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def ways_of(preset: str) -> dict[str, tuple[int, Callable[[], None]]]:
    """Return each way's prompts and how to run it."""
    tokenizer = train_tokenizer(["a small text"], TokenizerConfig(vocab_size=300))
    model = build_causal_lm(ModelConfig(preset=preset, config_overrides={"vocab_size": 4096}), tokenizer).eval()
    model.generation_config.eos_token_id = None  # every text to its full length
    model.generation_config.suppress_tokens = None
    compiled = build_causal_lm(ModelConfig(preset=preset, config_overrides={"vocab_size": 4096}), tokenizer).eval()
    compiled.forward = torch.compile(compiled.forward)
    ids = torch.randint(6, 300, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = ids.tolist()

    def hfkit(size: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, PROMPTS, size):
                complete(model, tokenizer, rows[start : start + size], SETTINGS, seed=0)

        return run

    return {
        "plain generate, one prompt": (1, lambda: plainly(model, ids[:1])),
        "plain generate, one prompt, static cache": (1, lambda: plainly(model, ids[:1], "static")),
        "one prompt, static cache, compiled": (1, lambda: plainly(compiled, ids[:1], "static")),
        "hfkit, batches of 8": (PROMPTS, hfkit(8)),
        "hfkit, batches of 32": (PROMPTS, hfkit(32)),
        "plain generate, 32 prompts": (PROMPTS, lambda: plainly(model, ids)),
        "plain generate, 32 prompts, static cache": (PROMPTS, lambda: plainly(model, ids, "static")),
    }


def main() -> None:
    """Time every way."""
    tune_process()
    figures: dict[str, dict[str, float]] = {}
    for preset in ("tiny", "mini"):
        ways = ways_of(preset)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(ROUNDS + 1):
            for name, (_, run) in ways.items():
                begin = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - begin)
        figures[preset] = {n: round(p * NEW / statistics.median(seconds[n]), 1) for n, (p, _) in ways.items()}
    save_result("generation_speed", {"tokens_per_second": figures, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
