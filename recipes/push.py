"""Publish a finished run, or a model folder, on the Hub; what is there already is not sent again.

python recipes/push.py --model.path runs/my-run --hub.repo_id me/my-model

Exit status: 0 published (the address is printed), 2 bad input, 4 the Hub failed (everything stays local; run it again).
"""

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from hfkit.config import fail, parse_config
from hfkit.settings import BadInput, PublishConfig


@dataclass
class PublishedModel:
    """What to publish."""

    path: Path | None = None
    """Folder of a finished run, or of a model; null takes output_dir."""


@dataclass
class PushedParts(PublishConfig):
    """Where, and how much of it."""

    required: bool = True
    """A push that fails ends with status 4; false makes it a warning, and the status 0."""
    push_every: int | None = None
    """Publish each kept checkpoint at a multiple of this many steps too, as a branch `step-…`, as training does; null:
    none, or all of them with include_checkpoints."""


@dataclass
class PushConfig:
    """Publish a finished run or model folder."""

    model: PublishedModel = field(default_factory=PublishedModel)
    """What to publish."""
    hub: PushedParts = field(default_factory=PushedParts)
    """Where, and how much of it."""
    output_dir: Path | None = None
    """Folder of a finished run, where model.path is not given."""
    seed: int = 0
    """Changes nothing here: every recipe takes it."""


def main() -> int:
    config = parse_config(PushConfig)
    path = config.model.path or config.output_dir
    if path is None or not path.is_dir():
        fail(f"--model.path must be the folder of a finished run or of a model, not {path}")
    if config.hub.repo_id is None:
        fail("--hub.repo_id is missing; give it as name/model")

    from hfkit.remote import HubError, check_access
    from hfkit.status import DONE, PUSH_FAILED

    try:
        check_access(replace(config.hub, required=True))

        from hfkit.publisher import publish_run

        print(publish_run(config.hub, path))
    except BadInput as error:
        fail(str(error))
    except HubError as error:
        kind, status = ("error", PUSH_FAILED) if config.hub.required else ("warning", DONE)
        command = shlex.join(["python", *sys.argv])
        print(f"{kind}: {error}\nto finish the push: {command}", file=sys.stderr)
        return status
    return DONE


if __name__ == "__main__":
    sys.exit(main())
