"""Peak memory and time of the loss at a vocabulary of 50,304: hfkit's in chunks against transformers' on whole logits.

    python benchmarks/loss_memory.py

Each side runs in a process of its own, forward and backward from (2048, 256) hidden states; memory is what the process
grows by beyond states and weights.
"""

import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from hfkit.losses import chunked_cross_entropy
from results import save_result, spread

ROWS, WIDTH, VOCABULARY, ROUNDS = 2048, 256, 50304, 5


def run_chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hfkit's loss, per target."""
    return chunked_cross_entropy(hidden, weight, targets, upstream=1 / ROWS) / ROWS


def run_whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """transformers' loss on logits."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = (hidden @ weight.T)[None]
    return ForCausalLMLoss(logits, None, VOCABULARY, shift_labels=targets[None])


def measure(side: str, connection: Connection) -> None:
    """Send megabytes that the peak grows by, seconds of each round, and the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = (0.05 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,))
    loss_of = {"hfkit": run_chunked, "transformers": run_whole}[side]
    loss_of(hidden[:8], weight, targets[:8])  # whatever a first call loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        loss = loss_of(hidden, weight, targets)
        loss.backward()
        seconds.append(time.perf_counter() - begin)
        hidden.grad = weight.grad = None
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    connection.send({"peak_mb": round(peak), "seconds": spread(seconds), "loss": round(loss.item(), 5)})


def main() -> None:
    """Measure both sides and write the result."""
    context = multiprocessing.get_context("spawn")
    result: dict[str, Any] = {"rows": ROWS, "width": WIDTH, "vocabulary": VOCABULARY}
    for side in ("transformers", "hfkit"):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(side, theirs))
        process.start()
        theirs.close()
        result[side] = ours.recv()
        process.join()
    result["memory_ratio"] = round(result["hfkit"]["peak_mb"] / result["transformers"]["peak_mb"], 3)
    save_result("loss_memory", result)


if __name__ == "__main__":
    main()
