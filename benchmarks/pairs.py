"""Sides of a comparison measured in turn, A B A B …: a slow minute of the machine then meets all of them.

Each side lives in a process of its own, started and warmed up alone; while one takes its steps the others wait. A ratio
is taken within each round and the median of the rounds is reported, with the smallest and the largest.
"""

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from results import spread


class Enough(BaseException):
    """Ends a side's loop, whatever library runs it."""


Tick = Callable[..., None]
"""What a side calls after each of its steps, with the loss where it has one at hand: a number, or still a tensor."""


class Metronome:
    """A tick that times steps by the segment, and waits between the side's turns."""

    def __init__(self, connection: Connection, warm_up: int, steps: int) -> None:
        self.connection, self.left, self.steps = connection, warm_up, steps
        self.loss: Any = 0.0
        self.started = time.perf_counter(), time.process_time()

    def __call__(self, loss: Any = None) -> None:
        """Count a step; at the end of a segment send its figures and wait."""
        self.left -= 1
        if loss is not None:
            self.loss = loss
        if self.left:
            return
        wall, cpu = (now - then for now, then in zip(self._now(), self.started, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.connection.send({"seconds": wall, "cpu": cpu, "loss": float(self.loss), "peak_mb": peak})
        if not self.connection.recv():
            raise Enough
        self.left, self.started = self.steps, self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


Side = Callable[[Tick], None]


def _live(side: Side, connection: Connection, warm_up: int, steps: int) -> None:
    with contextlib.suppress(Enough):
        side(Metronome(connection, warm_up, steps))
    os._exit(0)  # whatever threads a library has left


def alternate(sides: dict[str, Side], pairs: int, steps: int, warm_up: int = 3) -> dict[str, list[dict[str, float]]]:
    """Return each side's figures by round.

    Args:
        sides: What to run, by name; each is called in its own process and takes steps until it is stopped.
        steps: Steps of a segment.
        warm_up: Steps before the first; their time is the side's `warm_up_seconds`, imports included.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    figures: dict[str, list[dict[str, float]]] = {}
    for name, side in sides.items():
        connections[name], theirs = context.Pipe()
        begin = time.perf_counter()
        context.Process(target=_live, args=(side, theirs, warm_up, steps), daemon=True).start()
        theirs.close()
        connections[name].recv()
        figures[name] = [{"warm_up_seconds": time.perf_counter() - begin}]
    for _ in range(pairs):
        for name, connection in connections.items():
            connection.send(True)
            figures[name].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return figures


def summarise(figures: dict[str, list[dict[str, float]]], steps: int, ours: str = "hfkit") -> dict[str, Any]:
    """Return milliseconds a step, memory and loss of each side, and how many times as fast ``ours`` is."""
    summary: dict[str, Any] = {}
    mine = figures[ours][1:]
    for name, (start, *rounds) in figures.items():
        summary[name] = {
            "ms_per_step": spread([part["seconds"] / steps * 1e3 for part in rounds]),
            "cpu_ms_per_step": spread([part["cpu"] / steps * 1e3 for part in rounds]),
            "warm_up_seconds": round(start["warm_up_seconds"], 1),
            "peak_mb": round(rounds[-1]["peak_mb"]),
            "last_loss": round(rounds[-1]["loss"], 3),
        }
        if name != ours:
            paired = list(zip(mine, rounds, strict=True))
            summary[name]["ours_is_faster_by"] = spread([theirs["seconds"] / own["seconds"] for own, theirs in paired])
            by_cpu = [theirs["cpu"] / own["cpu"] for own, theirs in paired]
            summary[name]["ours_is_faster_by_cpu_time"] = spread(by_cpu)  # where other work disturbs the clock
            extra = [(own["seconds"] - theirs["seconds"]) / steps * 1e3 for own, theirs in paired]
            summary[name]["ours_minus_theirs_ms"] = round(median(extra), 2)
    return summary
