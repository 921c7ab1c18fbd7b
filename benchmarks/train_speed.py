"""Training steps on the CPU: hfkit against transformers' Trainer, an Accelerate example and a bare PyTorch loop.

    python benchmarks/train_speed.py [--tasks small,small-compiled,tiny] [--pairs 5]

`small` is a Llama of 9.3 M parameters on 8 × 256 tokens, where matrix products decide; `tiny` is so small (4 × 64
tokens, hidden 64, 2 layers) that what a loop costs beside the model shows. Tasks that are not asked for keep the
figures that they have in the result file.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from pairs import alternate, summarise
from peers import PEERS, Task
from results import FOLDER, save_result

SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 320,
}
TASKS = {
    "small": Task(SMALL, rows=8, length=256),
    "small-compiled": Task(SMALL, rows=8, length=256, compiled=True),
    "small-bf16": Task(SMALL, rows=8, length=256, precision="bf16"),
    "tiny": Task(TINY, rows=4, length=64),
}
STEPS = {"tiny": 60}  # of a segment; the others take 6


def main() -> None:
    """Measure the tasks asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="small,small-compiled,tiny")
    parser.add_argument("--peers", default="hfkit,trainer,accelerate,bare", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of a segment")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    path = options.output / "train_speed.json"
    result: dict[str, Any] = {}
    if path.exists():
        earlier = json.loads(path.read_text("utf-8"))
        result = {name: figures for name, figures in earlier.items() if name in TASKS}
    for name in options.tasks.split(","):
        task, steps = TASKS[name], options.steps or STEPS.get(name, 6)
        sides = {peer: partial(PEERS[peer], task) for peer in options.peers.split(",")}
        load = round(os.getloadavg()[0], 1)
        figures = summarise(alternate(sides, options.pairs, steps), steps)
        result[name] = {"pairs": options.pairs, "steps": steps, "load_before": load, **figures}
        save_result("train_speed", result, options.output)


if __name__ == "__main__":
    main()
