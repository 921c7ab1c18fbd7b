"""What a forked run is told before it begins, where a test of the Hub needs more than settings."""

import json
import os
import time
from pathlib import Path

from hfkit import publisher, remote
from hfkit.launch import stopper
from hfkit.publisher import Publisher
from hfkit.recorder import Recorder


def impatient() -> None:
    """Give up on a Hub after two tries and a second of silence, instead of minutes."""
    remote.FIRST_WAIT, remote.LONGEST_WAIT, remote.TIMEOUT, remote.TRIES = 0.001, 0.01, 1.0, 2


def signed_in_wrongly() -> None:
    """Use a token that the Hub does not know."""
    os.environ["HF_TOKEN"] = "hf_notAtokenOfAnybody"


def waiting_for_each_push() -> None:
    """Train on only when a checkpoint is published: otherwise a newer one may take the place of one that waits."""
    submit = Publisher.submit

    def submit_and_wait(self: Publisher, model_dir: Path, step: int, checkpoint: Path) -> None:
        submit(self, model_dir, step, checkpoint)
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None)

    Publisher.submit = submit_and_wait  # type: ignore[method-assign]


def measured() -> None:
    """Be impatient, and write down beside the output folder when each step ended and how long each hand-over took."""
    impatient()
    submit, advance = Publisher.submit, Recorder.advance

    def note(output_dir: Path, **figures: float) -> None:
        with output_dir.with_suffix(".times").open("a") as file:
            file.write(json.dumps(figures) + "\n")

    def submit_and_note(self: Publisher, model_dir: Path, step: int, checkpoint: Path) -> None:
        begun, worked = time.monotonic(), time.thread_time()
        submit(self, model_dir, step, checkpoint)
        note(self.output_dir, handed_over=time.monotonic() - begun, worked=time.thread_time() - worked)

    def advance_and_note(self: Recorder, step: int, loss: float) -> None:
        advance(self, step, loss)
        note(self.output_dir, stepped=time.monotonic())

    Publisher.submit = submit_and_note  # type: ignore[method-assign]
    Recorder.advance = advance_and_note  # type: ignore[method-assign]


def waiting_for_a_signal() -> None:
    """Stand still after the first hand-over until the run is told to stop, and do not wait long for a push then."""
    publisher.PATIENCE = 0.5
    submit = Publisher.submit

    def submit_and_stand_still(self: Publisher, model_dir: Path, step: int, checkpoint: Path) -> None:
        submit(self, model_dir, step, checkpoint)
        while not stopper.requested:
            time.sleep(0.01)

    Publisher.submit = submit_and_stand_still  # type: ignore[method-assign]


def in_a_hurry() -> None:
    """Do not wait long for a push when the run is told to stop."""
    publisher.PATIENCE = 0.5


def leaking() -> None:
    """End with an error whose text holds the token and the home folder, in the fifth step."""

    def fail(self: Recorder, step: int, loss: float) -> None:
        if step == 5:
            raise RuntimeError(f"signed in with {os.environ['HF_TOKEN']} in {os.environ['HOME']}")

    Recorder.advance = fail  # type: ignore[method-assign]
