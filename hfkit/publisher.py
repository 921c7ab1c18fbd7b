"""What of a run leaves the machine, and a background thread that publishes it while training goes on.

Published are the files of `model/`, a card and a passport made for the public, with `hub.include_samples` the samples,
with `hub.include_checkpoints` the training state; no pickles, no scripts, no logs. `main` holds the model; each pushed
checkpoint is also a branch `step-00001000`.

A training step waits for the hand-over only: hard links, however slow the Hub is (a checkpoint of 1 GB in 9 files:
13 ms, at most 24, over 59 hand-overs; 2026-11-24, 2 busy CPU cores).
"""

import os
import shutil
import sys
import threading
import uuid
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, get_token, logging
from huggingface_hub.utils import disable_progress_bars

from hfkit.card import render_model_card
from hfkit.checkpoint import list_checkpoints, read_checkpoint, step_folder
from hfkit.files import read_json, write_atomic, write_json
from hfkit.hub import STATE_FOLDER, OtherWriter, push_folder
from hfkit.passport import public_passport
from hfkit.remote import HubError, call, explain
from hfkit.settings import BadInput, HubConfig

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL_FILES = (*WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
SAMPLE_FILES = ("samples.jsonl", "predictions.jsonl")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # learned from data, not written by a run
FINISH_TIMEOUT = 600.0  # seconds
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
        if config.repo_id is not None:  # the client's bars would tear the training's, its warnings hold signed links
            disable_progress_bars()
            logging.set_verbosity_error()
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._heads: dict[str, str] = {}  # branch → commit that this run made
        self._outcomes: dict[str, Status] = {}  # of the latest checkpoint, of the finished model

    def due(self, step: int) -> bool:
        """Return whether the checkpoint of this step is to be pushed."""
        every = self.config.push_every
        return bool(self.config.repo_id and every) and step % (every or 1) == 0

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

    def finish(self, model_dir: Path | None = None, timeout: float = FINISH_TIMEOUT) -> Status:
        """Publish the finished model, wait for all pushes at most ``timeout`` seconds, say how they ended, and stop.

        Args:
            model_dir: The finished `model/`; None (a run that was preempted) only waits.
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
            self._changed.wait_for(lambda: not self._waiting and self._running is None, timeout)
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                self._note(job, "failed", f"it did not end within {timeout:.0f} s")
            self._stopped.set()
            self._changed.notify_all()
        if "failed" in self._outcomes.values():
            print(f"to finish the push: {finish_command(self.config, self.output_dir)}", file=sys.stderr)
            return "failed"
        shutil.rmtree(self._staging, ignore_errors=True)
        return "done" if self._outcomes else "none"

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
        if problem:
            print(f"warning: pushing {job.name} to {self.config.repo_id} failed: {problem}", file=sys.stderr)


def publish_run(config: HubConfig, path: Path) -> str:
    """Publish a finished run folder, or a model folder, now; return the address of the repository.

    With `hub.include_checkpoints` every whole checkpoint that the run kept becomes a branch.

    Raises:
        BadInput: if the folder holds no model.
        HubError: if it failed; repeating it sends what is missing.
    """
    model_dir = path / "model" if (path / "model" / "config.json").exists() else path
    if not (model_dir / "config.json").exists() or not any(model_dir.glob("*.safetensors")):
        raise BadInput(f"{path} is neither a run folder with a finished model/ nor a model folder with safetensors")
    output_dir = model_dir.parent if (model_dir.parent / "config.yaml").exists() else model_dir
    staging = output_dir / f".push-{uuid.uuid4().hex[:8]}"
    heads: dict[str, str] = {}
    try:
        stage_final(staging / "main", model_dir, output_dir, config)
        push_job(Job(staging), config, output_dir, heads, threading.Event())
        for checkpoint in list_checkpoints(output_dir / "checkpoints") if config.include_checkpoints else []:
            job = Job(staging / checkpoint.name, int(read_checkpoint(checkpoint)["step"]))
            stage_branch(job.folder / "branch", model_dir, checkpoint, config)
            push_job(job, config, output_dir, heads, threading.Event())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{HfApi().endpoint}/{config.repo_id}"


def push_job(job: Job, config: HubConfig, output_dir: Path, heads: dict[str, str], stopped: threading.Event) -> None:
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


def finish_command(config: HubConfig, output_dir: Path) -> str:
    """Return the command that finishes a push."""
    words = f"python recipes/push.py --model.path {output_dir} --hub.repo_id {config.repo_id}"
    words += " --hub.private false" if not config.private else ""
    words += " --hub.include_samples true" if config.include_samples else ""
    return words + (" --hub.include_checkpoints true" if config.include_checkpoints else "")


def stage_model(into: Path, model_dir: Path, checkpoint: Path | None = None) -> None:
    """Link the files of a model that may be published; with ``checkpoint``, its weights in place of the model's."""
    link_files(model_dir, into, MODEL_FILES)
    if checkpoint is not None:
        for path in [path for path in into.iterdir() if matches(path.name, WEIGHTS)]:
            path.unlink()
        link_files(checkpoint, into, ("model.safetensors",))


def stage_branch(into: Path, model_dir: Path, checkpoint: Path, config: HubConfig) -> None:
    """Link what the branch of a step holds."""
    stage_model(into, model_dir, checkpoint)
    if config.include_checkpoints:
        link_files(checkpoint, into / STATE_FOLDER)


def stage_final(into: Path, model_dir: Path, output_dir: Path, config: HubConfig) -> None:
    """Link what `main` holds in the end."""
    stage_model(into, model_dir)
    if config.include_samples:
        link_files(output_dir, into, SAMPLE_FILES)


def link_files(source: Path, into: Path, patterns: tuple[str, ...] = ("*",)) -> None:
    """Put hard links to the files of a folder into another: no copy, and later changes of the folder do not matter.

    Files are replaced, never rewritten, everywhere in hfkit, so a link keeps its content.
    """
    into.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and matches(path.name, patterns):
            try:
                os.link(path.resolve(), into / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, into / path.name)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a file name has one of these forms."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def complete(folder: Path, output_dir: Path, config: HubConfig, step: int | None) -> None:
    """Write the card and the public passport into a staged folder, and take this machine's paths out of the rest.

    Raises:
        HubError: if a file would still give away the token or a path.
    """
    for path in folder.glob("*config.json"):
        if (content := read_json(path)) is not None and (shown := without_paths(content)) != content:
            write_json(path, shown)  # a new file: the original, linked to, stays as it is
    if passport := read_json(output_dir / "passport.json"):
        write_json(folder / "passport.json", public_passport(passport))
    card = folder / "README.md"
    if (output_dir / "config.yaml").exists() or not card.exists():
        write_atomic(card, render_model_card(output_dir, folder, config.repo_id, step))
    check_private(folder, output_dir)


def without_paths(value: Any) -> Any:
    """Return a JSON value with each path on this machine cut to its last part.

    Example:
        >>> without_paths({"_name_or_path": "/home/ada/gpt2", "base": "openai-community/gpt2"})
        {'_name_or_path': 'gpt2', 'base': 'openai-community/gpt2'}
    """
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def check_private(folder: Path, output_dir: Path) -> None:
    """Raise HubError if a text file holds the Hub token, the home folder or the run's folder."""
    places = {str(place) for place in (Path.home(), output_dir.resolve(), Path.cwd()) if len(place.parts) > 1}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in (".safetensors", ".parquet"):
            continue
        content = path.read_bytes()
        if (token := get_token()) and token.encode() in content:
            raise HubError(f"{path.name} holds the Hub token; nothing was sent")
        if path.name not in VOCABULARIES and any(place.encode() + b"/" in content for place in places):
            raise HubError(f"{path.name} holds a path of this machine; nothing was sent")
