"""What a forked run is told before it begins, where a test of the Hub needs more than settings."""

import os
import time
from pathlib import Path

from hfkit import remote
from hfkit.publisher import Publisher


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
    """Be impatient, and write down beside the output folder how many seconds each hand-over took."""
    impatient()
    submit = Publisher.submit

    def submit_and_measure(self: Publisher, model_dir: Path, step: int, checkpoint: Path) -> None:
        begun = time.monotonic()
        submit(self, model_dir, step, checkpoint)
        with self.output_dir.with_suffix(".delays").open("a") as file:
            file.write(f"{time.monotonic() - begun}\n")

    Publisher.submit = submit_and_measure  # type: ignore[method-assign]
