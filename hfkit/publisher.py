"""A background thread that publishes a run's checkpoints while training goes on, and its model at the end.

`main` holds the model; each pushed checkpoint is also a branch `step-00001000`.

A training step waits for the hand-over only, which names the files a second time (hard links; copies where the file
system has none) and asks nothing of the network: however slow the Hub is, its bound is the disk's. A checkpoint of 1 GB
in 9 files: 13 ms, at most 24, over 59 hand-overs (2026-11-24, 2 busy CPU cores); under each fault: docs/log.md.
"""

import shlex
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from hfkit.checkpoint import list_checkpoints, read_checkpoint, step_folder
from hfkit.hub import OtherWriter, push_folder
from hfkit.remote import call, explain
from hfkit.settings import BadInput, HubConfig, PublishConfig
from hfkit.staging import complete, stage_branch, stage_final, stage_model

FINISH_TIMEOUT = 600.0  # seconds
PATIENCE = 10.0  # seconds for a push on its way when the process must end; schedulers kill after 30 or more
Status = Literal["none", "done", "failed"]


@dataclass(frozen=True)
class Job:
    """A staged push: its folder holds `main`, or `branch` for the branch of a step, or both."""

    folder: Path
    step: int | None = None  # None: the finished model

    @property
    def name(self) -> str:
        return "the model" if self.step is None else f"step {self.step}"


class Publisher:
    """Publishes checkpoints in the background and the finished model at the end; without `hub.repo_id` does nothing.

    One checkpoint waits while another is on its way: a newer one takes its place. Errors are warnings of one line.
    """

    def __init__(self, config: HubConfig, output_dir: Path) -> None:
        self.config, self.output_dir = config, output_dir
        self._staging = output_dir / ".push"
        shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was killed
        if config.repo_id is not None:
            disable_progress_bars()  # the client's would tear the training's
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._heads: dict[str, str] = {}  # branch → commit that this run made
        self._outcomes: dict[str, Status] = {}  # of the latest checkpoint, of the finished model
        self._latest: int | None = None  # its step

    def due(self, step: int) -> bool:
        """Return whether the checkpoint of this step is to be pushed."""
        every = self.config.branch_every
        return bool(self.config.repo_id and every) and step % every == 0

    def submit(self, model_dir: Path, step: int, checkpoint: Path) -> None:
        """Hand over a whole, saved checkpoint; returns at once, and the files may be changed or deleted after.

        Args:
            model_dir: Folder with configuration and tokenizer; the weights are the checkpoint's.
        """
        if self.config.repo_id is None:
            return
        job = Job(self._staging / f"{step_folder(step)}-{uuid.uuid4().hex[:8]}", step)
        try:
            stage_model(job.folder / "main", model_dir, checkpoint)
            stage_branch(job.folder / "branch", model_dir, checkpoint, self.config)
        except OSError as error:  # a full disk, a folder that is gone: training goes on
            self._note(job, "failed", f"staging it: {error}")
        else:
            self._enqueue(job)

    def catch_up(self, model_dir: Path, checkpoints: Path) -> None:
        """Hand over the newest kept checkpoint that was due: the run may have been stopped while it was on its way."""
        due = due_checkpoints(checkpoints, self.config.branch_every)
        if due:  # what arrived is not sent again
            self.submit(model_dir, int(due[-1].name[5:]), due[-1])

    def finish(
        self,
        model_dir: Path | None = None,
        timeout: float = FINISH_TIMEOUT,
        must_end: Callable[[], bool] = lambda: False,
    ) -> Status:
        """Publish the finished model, wait for all pushes at most ``timeout`` seconds, say how they ended, and stop.

        Args:
            model_dir: The finished `model/`; None (a run that was preempted) only waits.
            must_end: Whether this process is to end soon; from then on `PATIENCE` seconds are left.
        """
        if self.config.repo_id is None:
            return "none"
        if model_dir is not None:
            job = Job(self._staging / f"final-{uuid.uuid4().hex[:8]}")
            try:
                stage_final(job.folder / "main", model_dir, self.output_dir, self.config)
            except OSError as error:
                self._note(job, "failed", f"staging it: {error}")
            else:
                self._enqueue(job)
        with self._changed:
            self._wait(timeout, must_end)
            for job in [*([self._running] if self._running else []), *self._waiting]:
                self._note(job, "failed", "it did not end in time")
            self._stopped.set()
            self._changed.notify_all()
        if "failed" in self._outcomes.values():
            if model_dir is not None:  # otherwise the run goes on, and pushes again
                self._tell_remedy()
            return "failed"
        shutil.rmtree(self._staging, ignore_errors=True)
        if model_dir is not None:
            print(f"Published: {address(self.config.repo_id)}", file=sys.stderr)
        return "done" if self._outcomes else "none"

    def _tell_remedy(self) -> None:
        """Print the command that finishes the push, and what it cannot bring back."""
        kept = [path.name for path in list_checkpoints(self.output_dir / "checkpoints")]
        if self._outcomes.get("step") == "failed" and (name := step_folder(self._latest or 0)) not in kept:
            print(
                f"warning: the branch {name} stays missing: its checkpoint is not kept any more "
                "(train.keep_checkpoints), so that the command below publishes all but it",
                file=sys.stderr,
            )
        print(f"to finish the push: {finish_command(self.config, self.output_dir)}", file=sys.stderr)

    def _wait(self, seconds: float, must_end: Callable[[], bool]) -> None:
        """Wait until nothing is left to push, or the time is up."""
        end, hurried = time.monotonic() + seconds, False
        while (self._waiting or self._running) and (left := end - time.monotonic()) > 0:
            if not hurried and must_end():
                hurried, end = True, min(end, time.monotonic() + PATIENCE)
            self._changed.wait(min(left, 0.1))

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if job.step is not None:  # a newer checkpoint takes the place of the one that waits
                for old in self._waiting:
                    shutil.rmtree(old.folder, ignore_errors=True)
                self._waiting.clear()
            self._waiting.append(job)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                job = self._running = self._waiting.pop(0)
            try:
                push_job(job, self.config, self.output_dir, self._heads, self._stopped)
                self._note(job, "done")
            except Exception as error:  # whatever it is, neither the training nor this thread may end by it
                if not isinstance(error, OtherWriter):
                    self._heads.pop("main", None)  # whether the commit landed is not known
                self._note(job, "failed", explain(error))
            shutil.rmtree(job.folder, ignore_errors=True)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _note(self, job: Job, outcome: Status, problem: str = "") -> None:
        """Remember how the latest push of this kind ended, and warn if it failed; nobody listens once it is stopped."""
        if self._stopped.is_set():
            return
        self._outcomes["model" if job.step is None else "step"] = outcome
        self._latest = self._latest if job.step is None else job.step
        if problem:
            print(f"warning: pushing {job.name} to {self.config.repo_id} failed: {problem}", file=sys.stderr)


def publish_run(config: PublishConfig, path: Path) -> str:
    """Publish a finished run folder, or a model folder, now; return the address of the repository.

    The whole checkpoints that the run kept become branches as in training: those due by `hub.push_every`, or all with
    `hub.include_checkpoints` alone.

    Raises:
        BadInput: if the folder holds no model, or a card of its own that a license or language was given for.
        HubError: if it failed; repeating it sends what is missing.
    """
    model_dir = path / "model" if (path / "model" / "config.json").exists() else path
    if not (model_dir / "config.json").exists() or not any(model_dir.glob("*.safetensors")):
        raise BadInput(f"{path} is neither a run folder with a finished model/ nor a model folder with safetensors")
    output_dir = model_dir.parent if (model_dir.parent / "config.yaml").exists() else model_dir
    own_card = (model_dir / "README.md").exists() and not (output_dir / "config.yaml").exists()
    if own_card and (config.license or config.language):
        raise BadInput(f"{model_dir} has a card of its own: write hub.license and hub.language into its README.md")
    due = due_checkpoints(output_dir / "checkpoints", config.branch_every)
    if config.branch_every and not due:
        print(f"warning: {path} keeps no checkpoint for a branch: only main is published", file=sys.stderr)
    staging = output_dir / f".push-{uuid.uuid4().hex[:8]}"
    heads: dict[str, str] = {}
    try:
        stage_final(staging / "main", model_dir, output_dir, config)
        push_job(Job(staging), config, output_dir, heads, threading.Event())
        for checkpoint in due:
            job = Job(staging / checkpoint.name, int(read_checkpoint(checkpoint)["step"]))
            stage_branch(job.folder / "branch", model_dir, checkpoint, config)
            push_job(job, config, output_dir, heads, threading.Event())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return address(str(config.repo_id))


def due_checkpoints(checkpoints: Path, every: int) -> list[Path]:
    """Return the kept checkpoints of each step that ``every`` divides, oldest first; none if it is 0."""
    return [path for path in list_checkpoints(checkpoints) if every and int(path.name[5:]) % every == 0]


def address(repo_id: str) -> str:
    """Return where people find a model repository."""
    return f"{HfApi().endpoint}/{repo_id}"


def push_job(
    job: Job, config: PublishConfig, output_dir: Path, heads: dict[str, str], stopped: threading.Event
) -> None:
    """Complete what is staged and push it: `main` first, so that a new branch begins with the same files."""
    assert config.repo_id is not None
    repo_id, message = config.repo_id, f"Publish {job.name}"
    call(lambda: HfApi().create_repo(repo_id, private=config.private, exist_ok=True), stopped)
    main, branch = job.folder / "main", job.folder / "branch"
    if main.exists():
        complete(main, output_dir, config, job.step)
        heads["main"] = push_folder(main, repo_id, message=message, parent=heads.get("main"), stopped=stopped)
    if branch.exists() and job.step is not None:
        complete(branch, output_dir, config, job.step)
        start = heads.get("main", "main")
        push_folder(branch, repo_id, revision=step_folder(job.step), start=start, message=message, stopped=stopped)


def finish_command(config: PublishConfig, output_dir: Path) -> str:
    """Return the command that finishes a push, for a shell.

    Example:
        >>> finish_command(PublishConfig("me/model", push_every=500, license="mit"), Path("my runs/a"))
        "python recipes/push.py --model.path 'my runs/a' --hub.repo_id me/model --hub.push_every 500 --hub.license mit"
    """
    words = ["python", "recipes/push.py", "--model.path", str(output_dir), "--hub.repo_id", str(config.repo_id)]
    for name in ("private", "push_every", "include_samples", "include_checkpoints"):
        if (value := getattr(config, name)) != getattr(PublishConfig, name):  # its default
            words += [f"--hub.{name}", str(value).lower()]
    words += ["--hub.license", config.license] if config.license else []
    languages = [config.language] if isinstance(config.language, str) else config.language or []
    words += ["--hub.language", *languages] if languages else []
    return shlex.join(words)
