"""Ordered, bounded work on several processes: results come back in order and memory does not grow with the input."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

AHEAD = 3  # pieces per worker that are read before the oldest result is taken


def num_workers() -> int:
    """Return how many processes suit this one: the usable cores, divided among those that the launcher started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _begin_worker() -> None:
    """Leave signals to the parent, and do not outlive it: a fork holds its files and with them the output's lock."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def map_in_order(
    function: Callable[[Given], Made], pieces: Iterable[Given], workers: int | None = None
) -> Iterator[Made]:
    """Yield ``function(piece)`` for each piece in order, computed by several processes.

    Args:
        function: Picklable, as are its argument and result.
        workers: Processes; one computes here. None suits the machine.
    """
    workers = num_workers() if workers is None else workers
    iterator = iter(pieces)
    first = list(islice(iterator, 2))
    if workers == 1 or len(first) < 2:  # a single piece is not worth starting processes
        yield from map(function, first)
        yield from map(function, iterator)
        return
    # Forking keeps what is imported, so workers start in milliseconds; macOS' libraries do not survive a fork.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        waiting: deque[Future[Made]] = deque(pool.submit(function, piece) for piece in first)
        try:
            for piece in iterator:
                waiting.append(pool.submit(function, piece))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
