"""Ordered, bounded work on several processes: results come back in order and memory does not grow with the input."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

AHEAD = 3  # pieces per worker that are read before the oldest result is taken

_function: Callable[[Any], Any]  # what this process, a worker, was started to compute


def num_workers() -> int:
    """Return how many processes suit this one: the usable cores, divided among those that the launcher started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _begin_worker(function: Callable[[Any], Any]) -> None:
    """Leave signals to the parent, and do not outlive it: a fork holds its files and with them the output's lock."""
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _work(piece: Any) -> Any:
    return _function(piece)


def map_in_order(
    function: Callable[[Given], Made], pieces: Iterable[Given], workers: int | None = None
) -> Iterator[tuple[Given, Made]]:
    """Yield each piece with ``function(piece)``, in order, computed by several processes.

    Args:
        function: Each worker gets it once, so that it may hold much. Its argument and result are pickled; so is the
            function itself where processes are not forked.
        workers: Processes; one computes here. None suits the machine.
    """
    workers = num_workers() if workers is None else workers
    iterator = iter(pieces)
    first = list(islice(iterator, 2))
    if workers == 1 or len(first) < 2:  # a single piece is not worth starting processes
        for piece in chain(first, iterator):
            yield piece, function(piece)
        return
    # Forking keeps what is imported, so workers start in milliseconds; macOS' libraries do not survive a fork.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(function,)) as pool:
        waiting: deque[tuple[Given, Future[Made]]] = deque()
        try:
            for piece in chain(first, iterator):
                waiting.append((piece, pool.submit(_work, piece)))
                if len(waiting) >= AHEAD * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
