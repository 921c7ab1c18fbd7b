"""What the loop costs beside the model: hfkit's steps against a bare PyTorch loop, alternated in one process.

    python benchmarks/overhead.py

The model is so small (hidden 64, 2 layers, 256 tokens a step) that whatever a loop does besides shows. Both sides take
the same data, the same loss and the same optimizer; the figure is the median difference of paired segments.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from hfkit.data.batches import Split, packed_rows
from hfkit.data.shards import StreamWriter, TokenStream
from hfkit.launch import tune_process
from hfkit.loop import Hooks, Loop, Progressed, Rhythm
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm
from hfkit.optim import build_optimizer, build_schedule
from hfkit.progress import Progress
from hfkit.settings import ModelConfig, OptimConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer
from hfkit.tracking import MetricsLog, Throughput
from results import save_result

PAIRS, STEPS, LENGTH, ROWS = 11, 60, 64, 4
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def build_stream(folder: Path, vocabulary: int) -> TokenStream:
    """Write a stream of random documents of 300 tokens."""
    generator = np.random.default_rng(0)
    writer = StreamWriter(folder, "train-0", vocabulary)
    writer.write([*generator.integers(6, vocabulary, 299).tolist(), 0] for _ in range(500))
    writer.close()
    return TokenStream(folder, "train-0", vocabulary)


def main() -> None:
    """Time both loops and print the difference."""
    tune_process()
    tokenizer = train_tokenizer(["the cat sat on the mat"], TokenizerConfig(vocab_size=300))
    config, optim = ModelConfig(preset="tiny", config_overrides={**SHAPE, "intermediate_size": 176}), OptimConfig()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder:
        stream = build_stream(Path(folder), len(tokenizer))
        read = packed_rows([stream], [1.0], LENGTH, Split(ROWS, ROWS), seed=0)
        ours = CausalLMLoss(build_causal_lm(config, tokenizer))
        bare = CausalLMLoss(build_causal_lm(config, tokenizer)).to(accelerator.device)
        optimizer, bare_optimizer = build_optimizer(ours, optim), build_optimizer(bare, optim)
        module, optimizer = accelerator.prepare(ours, optimizer)
        total = PAIRS * STEPS + STEPS
        schedule = build_schedule(optim, total)
        log, throughput, progress = MetricsLog(Path(folder) / "metrics.jsonl"), Throughput(), Progressed()
        bar = Progress(total, "train", "step")
        hooks = Hooks(
            log=lambda figures: log.write({**figures, "tokens_per_second": throughput.read()}),
            advance=lambda step, loss: bar.update(1, loss=loss),
        )

        def run_ours(until: int) -> None:
            loop = Loop(accelerator, module, optimizer, read, schedule, Rhythm(until), progress, hooks)
            loop.run()

        def run_bare(first: int, until: int) -> None:
            for number in range(first, until):
                step = read(number)
                (batch,) = step.micro_batches
                loss, _ = bare(**batch)
                (loss / step.targets).backward()
                torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
                bare_optimizer.step()
                bare_optimizer.zero_grad()

        run_ours(STEPS)
        run_bare(0, STEPS)
        ours_ms, bare_ms = [], []
        for pair in range(1, PAIRS + 1):
            start = time.perf_counter()
            run_ours((pair + 1) * STEPS)
            middle = time.perf_counter()
            run_bare(pair * STEPS, (pair + 1) * STEPS)
            end = time.perf_counter()
            ours_ms.append((middle - start) / STEPS * 1e3)
            bare_ms.append((end - middle) / STEPS * 1e3)
    difference = [a - b for a, b in zip(ours_ms, bare_ms, strict=True)]
    save_result(
        "overhead",
        {
            "hfkit_ms": statistics.median(ours_ms),
            "bare_ms": statistics.median(bare_ms),
            "difference_ms": statistics.median(difference),
            "difference_range_ms": [min(difference), max(difference)],
            "pairs": PAIRS,
        },
    )


if __name__ == "__main__":
    main()
