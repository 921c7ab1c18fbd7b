"""Two processes on the CPU for a test: forks of this one that meet over gloo, so nothing is imported again."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState, PartialState


def run_in_processes(count: int, function: Callable[[], Any]) -> list[Any]:
    """Return what ``function()`` returns in each of ``count`` processes of one group, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work(rank: int) -> None:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in variables.items()})
        PartialState._reset_state()
        AcceleratorState._reset_state(True)
        try:
            results.put((rank, function()))
        except BaseException as error:  # told to the test, which waits
            results.put((rank, error))
        os._exit(0)

    children = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    answers = dict(results.get() for _ in children)
    for child in children:
        child.join(30)
    if errors := [answer for answer in answers.values() if isinstance(answer, BaseException)]:
        raise errors[0]
    return [answers[rank] for rank in range(count)]
