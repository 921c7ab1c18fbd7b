"""One side timed in this process, step by step: with CUDA events on a GPU, so that measuring waits for nothing."""

import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from pairs import Enough, Tick

SYNC_STEPS = 4  # after the timed ones, in which the host's waits for the device are counted


class Stopwatch:
    """A tick that ends its side after ``warm_up`` and ``steps`` steps."""

    def __init__(self, device: str, warm_up: int, steps: int) -> None:
        self.cuda, self.warm_up, self.steps = device == "cuda", warm_up, steps
        self.began = time.perf_counter()
        self.first_step_seconds = 0.0
        self.marks: list[Any] = []
        self.losses: list[Any] = []
        self.waits = warnings.catch_warnings(record=True)
        self.caught: list[warnings.WarningMessage] = []

    def __call__(self, loss: Any = None) -> None:
        """Note the step."""
        self.marks.append(self._mark())
        self.losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        done = len(self.marks)
        if done == 1:
            if self.cuda:
                torch.cuda.synchronize()
            self.first_step_seconds = time.perf_counter() - self.began
        if self.cuda and done == self.warm_up + self.steps:
            self.caught = self.waits.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if done == self.warm_up + self.steps + SYNC_STEPS:
            self.stop()
            raise Enough

    def stop(self) -> None:
        """Leave torch as it was."""
        if self.cuda and len(self.marks) >= self.warm_up + self.steps:
            torch.cuda.set_sync_debug_mode("default")
            self.waits.__exit__(None, None, None)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def figures(self) -> dict[str, Any]:
        """Return milliseconds a step, and what the first step and the losses were."""
        if self.cuda:
            torch.cuda.synchronize()
        marks = self.marks[self.warm_up - 1 : self.warm_up + self.steps]
        times = [begin.elapsed_time(end) if self.cuda else (end - begin) * 1e3 for begin, end in pairwise(marks)]
        losses = [None if loss is None else round(float(loss), 4) for loss in self.losses]
        return {
            "first_step_seconds": round(self.first_step_seconds, 1),
            "ms_per_step": round(median(times), 2),
            "ms_per_step_p90": round(sorted(times)[int(0.9 * len(times))], 2),
            "losses": [losses[min(step, len(losses)) - 1] for step in (1, 10, self.warm_up + self.steps)],
            "host_waits": sum("synchroniz" in str(caught.message) for caught in self.caught) if self.cuda else None,
        }


def time_side(side: Callable[[Tick], None], device: str, warm_up: int, steps: int) -> dict[str, Any]:
    """Run one side and return its figures; on CUDA with its peak memory."""
    watch = Stopwatch(device, warm_up, steps)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        side(watch)
    except Enough:
        pass
    finally:
        watch.stop()
    figures = watch.figures()
    if device == "cuda":
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return figures
