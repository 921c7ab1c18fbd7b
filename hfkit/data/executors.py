"""One function in many tasks, by datatrove's executors: on this machine, under Slurm, or on a Ray cluster."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import setup_default_logger

from hfkit.data.workers import map_in_order, num_workers
from hfkit.settings import BadInput, ExecutorConfig

POLL = 5.0  # seconds between looks at the tasks of a cluster
PATIENCE = 60  # looks in a row without an answer, five minutes: Slurm's controller may be starting again
_JOBS = "jobs.txt"  # the step's jobs at Slurm, in the folder of its logs, for whoever comes after

Share = Callable[[int, int], None]
"""What a task does, given its number and how many there are."""


class Step(PipelineStep):
    """A pipeline of one step, which reads and writes files of its own."""

    type = "hfkit"

    def __init__(self, name: str, share: Share, logs: Path) -> None:
        self.name = name
        super().__init__()
        self.share, self.logs = share, logs

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do the share of task ``rank``; what is wrong with the input is left for who started the tasks."""
        try:
            self.share(rank, world_size)
        except BadInput as error:
            (self.logs / f"error-{rank:05d}.txt").write_text(str(error))
            raise
        yield from data or ()


def run_tasks(executor: ExecutorConfig, scratch: Path, name: str, share: Share, tasks: int | None = None) -> None:
    """Run ``share`` in each task, but for those that were completed before, and wait for the end.

    Args:
        executor: Which one, and how many tasks where ``tasks`` is not given.
        scratch: Folder that all tasks reach; gets the logs, and the marks of completed tasks.

    Raises:
        BadInput: what a task raised.
        RuntimeError: where to look when tasks ended without being done: for want of memory or time, or with their node.
    """
    tasks = tasks or executor.tasks
    logs = scratch / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    for left in logs.glob("error-*.txt"):
        left.unlink()
    job = _build_executor(executor, Step(name, share, logs), logs, tasks)
    waiting = f"{name}: {len(job.get_incomplete_ranks())} of {tasks} tasks"
    print(f"{waiting} by datatrove's {executor.name} executor; logs in {logs}", file=sys.stderr)
    try:
        with (logs / "driver.log").open("a") as log, redirect_stderr(log):
            setup_default_logger()  # writes to what is stderr now, as do the tasks that are forked
            job.run()
    finally:
        setup_default_logger()
    if left := job.get_incomplete_ranks(skip_completed=True):
        if told := sorted(logs.glob("error-*.txt")):
            raise BadInput(told[0].read_text())
        raise RuntimeError(f"{len(left)} tasks of the step {name} did not end well; see {logs}")


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor on this machine, with hfkit's worker processes.

    Its own pool waits for ever for a worker that was killed, and leaves processes that hold the run's lock where the
    run itself was (datatrove 0.10.1).
    """

    def __init__(self, pipeline: list[PipelineStep], tasks: int, logging_dir: str, workers: int | None = None) -> None:
        super().__init__(pipeline, tasks, min(tasks, workers or num_workers()), logging_dir)

    def run(self) -> None:
        """Run the tasks that were not completed before, and write their statistics."""
        self.save_executor_as_json()
        for _ in map_in_order(self._run_for_rank, self.get_incomplete_ranks(), self.workers):
            pass


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's executor under Slurm, which waits for its jobs, and takes them back where it ends before they do."""

    def launch_job(self) -> None:
        """Submit the tasks that were not completed before, and wait until all are done or the job left the queue."""
        logs = Path(self.logging_dir.path)
        cancel_jobs(logs)  # of a run that was killed: the same tasks would run twice at a time
        self.job_id_retriever: Callable[[str], str] = partial(_note_job, logs, self.job_id_retriever)
        try:
            super().launch_job()
            while self.get_incomplete_ranks(skip_completed=True) and _is_queued(self.job_id):
                time.sleep(POLL)
            if self.get_incomplete_ranks(skip_completed=True):
                time.sleep(POLL)  # what the last task wrote reaches this machine late on some file systems
        finally:
            if self.get_incomplete_ranks(skip_completed=True):
                _scancel(logs)
            else:
                (logs / _JOBS).unlink(missing_ok=True)


def cancel_jobs(logs: Path) -> None:
    """Cancel the Slurm jobs of a step that have not ended, and wait until they are gone."""
    for job in _scancel(logs):
        while _is_queued(job):
            time.sleep(POLL)
    (logs / _JOBS).unlink(missing_ok=True)


def _note_job(logs: Path, retrieve: Callable[[str], str], printed: str) -> str:
    job = retrieve(printed)
    with (logs / _JOBS).open("a") as file:
        file.write(f"{job}\n")
    return job


def _scancel(logs: Path) -> list[str]:
    jobs = path.read_text().split() if (path := logs / _JOBS).exists() else []
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True)  # those that ended are unknown to it, and an error
    return jobs


def _is_queued(job: str) -> bool:
    """Return whether a job waits or runs; no answer is no sign of its end."""
    for _ in range(PATIENCE):
        listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
        if listed.returncode == 0 or "Invalid job id" in listed.stderr:  # what ended long ago is unknown
            return bool(listed.stdout.strip())
        time.sleep(POLL)
    raise RuntimeError(f"squeue failed {PATIENCE} times in a row: {listed.stderr.strip()}")


class RayExecutor(RayPipelineExecutor):
    """datatrove's executor on a Ray cluster, the one that RAY_ADDRESS names or else one on this machine.

    The cluster is left after each step: a run ends without Python's exit handlers, and processes would stay behind.
    """

    def run(self) -> None:
        """Run the tasks that were not completed before."""
        import ray

        try:
            super().run()
        finally:
            ray.shutdown()


def _build_executor(executor: ExecutorConfig, step: Step, logs: Path, tasks: int) -> PipelineExecutor:
    kinds = {"local": LocalExecutor, "slurm": SlurmExecutor, "ray": RayExecutor}
    given = {"job_name": f"hfkit-{step.name}"} if executor.name == "slurm" else {}
    try:
        return kinds[executor.name](
            **{"pipeline": [step], "tasks": tasks, "logging_dir": str(logs), **given, **executor.options}
        )
    except TypeError as error:
        raise BadInput(f"executor.options: {str(error).partition(' ')[2]}") from None
