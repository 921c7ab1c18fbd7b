"""Peak memory of preparation on a generated corpus and on one ten times as large.

    python benchmarks/prepare_memory.py [--megabytes 20]

The corpus is words drawn by Zipf's law in documents of 20 to 2,000 words, a tenth of them copies. Memory is the sum
over the run's processes of what each has for itself plus its share of what is shared (PSS), sampled every 20 ms. What
the imports alone take is reported beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from results import save_result

PREPARE = """
import sys
from pathlib import Path
import hfkit.data.prepare
from hfkit.settings import DataConfig, TokenizerConfig
print("ready", flush=True)
sys.stdin.readline()
config = DataConfig(train_files=sys.argv[1], cache_dir=Path(sys.argv[2]))
hfkit.data.prepare.prepare_data(config, TokenizerConfig(vocab_size=8192, sample_bytes=5_000_000))
"""


def write_corpus(path: Path, size: int) -> None:
    """Write about ``size`` bytes of JSON Lines."""
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(30_000)])
    written, recent = 0, ""
    with path.open("w") as file:
        while written < size:
            ranks = np.minimum(draw.zipf(1.3, draw.integers(20, 2000)), len(words)) - 1
            recent = recent if recent and draw.random() < 0.1 else " ".join(words[ranks])
            written += file.write(json.dumps({"text": recent}) + "\n")


def measure(corpus: Path) -> dict[str, float]:
    """Prepare the corpus in a process of its own; return its peak memory in MB."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", PREPARE, str(corpus), cache]
        run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert run.stdin is not None and run.stdout is not None
        run.stdout.readline()
        idle, peak, begin = memory(run.pid), 0, time.monotonic()
        run.stdin.write(b"go\n")
        run.stdin.close()
        while run.poll() is None:
            peak = max(peak, memory(run.pid))
            time.sleep(0.02)
    if run.returncode:
        raise SystemExit(f"preparation ended with {run.returncode}")
    seconds = round(time.monotonic() - begin, 1)
    return {"megabytes": round(corpus.stat().st_size / 1e6, 1), "peak": peak, "imports": idle, "seconds": seconds}


def memory(pid: int) -> int:
    """Return the megabytes that a process and its children hold, shared pages counted once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass
    return round(total / 1e6)


def main() -> None:
    """Measure both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    size = parser.parse_args().megabytes * 1_000_000
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, factor in (("small", 1), ("large", 10)):
            corpus = Path(folder) / f"{name}.jsonl"
            write_corpus(corpus, size * factor)
            figures[name] = measure(corpus)
            corpus.unlink()
    figures["ratio"] = round(figures["large"]["peak"] / figures["small"]["peak"], 3)
    save_result("prepare_memory", figures)


if __name__ == "__main__":
    main()
