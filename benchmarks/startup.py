"""How long one waits: for --help, for a mistake to be named, for the first batch after a resume, for the first step.

    python benchmarks/startup.py

CPU time is that of the process and its children; the first step is that of the quickstart on a corpus that is prepared,
in seconds from the start of the command to its first line of metrics.jsonl.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from hfkit.data.batches import Split, packed_rows
from hfkit.data.shards import StreamWriter, TokenStream
from results import save_result, spread

ROOT = Path(__file__).parent.parent
QUICKSTART = [sys.executable, "recipes/pretrain.py", "--config", "recipes/configs/pretrain/quickstart.yaml"]
ROUNDS = 5


def cpu_seconds(words: list[str]) -> float:
    """Run a command and return its CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_batch_ms(step: int, stream: TokenStream) -> float:
    """Return milliseconds from a stream on disk to the batch of ``step``: what a resume does beside loading."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        packed_rows([stream], [1.0], 256, Split(16, 8), seed=0)(step)
        times.append(time.perf_counter() - begin)
    return round(median(times) * 1e3, 3)


def first_step_seconds(cache: str, folder: Path) -> float:
    """Start the quickstart and return the seconds to its first logged step; then stop it."""
    metrics = folder / "metrics.jsonl"
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*QUICKSTART, "--train.log_every", "1", "--output_dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "HFKIT_CACHE": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    process.send_signal(signal.SIGTERM)
    process.wait()
    return seconds


def main() -> None:
    """Measure and write the result."""
    pretrain = [sys.executable, "recipes/pretrain.py"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = StreamWriter(folder, "train-0", 4096)
        writer.append(np.random.default_rng(0).integers(6, 4096, 1_000_000), np.full(1000, 1000))
        writer.close()
        stream = TokenStream(folder, "train-0", 4096)
        first_step_seconds(f"{name}/cache", folder / "prepare")  # prepares the corpus
        result = {
            "load_before": round(os.getloadavg()[0], 1),
            "help_cpu_seconds": spread([cpu_seconds([*pretrain, "--help"]) for _ in range(ROUNDS)]),
            "typo_cpu_seconds": spread([cpu_seconds([*pretrain, "--train.max_stepz", "1"]) for _ in range(ROUNDS)]),
            "resume_to_first_batch_ms": {str(step): first_batch_ms(step, stream) for step in (10, 1_000, 1_000_000)},
            "first_step_seconds": spread([first_step_seconds(f"{name}/cache", folder / str(n)) for n in range(3)]),
        }
    save_result("startup", result)


if __name__ == "__main__":
    main()
