"""Which checkpoint a run goes on from, and whether it is this run's."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfkit.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from hfkit.data.batches import Plan
from hfkit.files import digest_of, finite, recover_folder
from hfkit.hub import download_checkpoint
from hfkit.remote import HubError
from hfkit.settings import AdapterConfig, BadInput, HubConfig, OptimConfig

Found = tuple[Path, dict[str, Any]]  # a checkpoint's folder and its manifest
STATE = (
    *("checkpoints", "model", "metrics.jsonl", "result.json", "config.yaml", "report.html", "passport.json"),
    *("samples.jsonl", "audit.json", "predictions.jsonl"),
)


def describe_identity(
    config: Any, optim: OptimConfig, plan: Plan, shape: dict[str, Any], data_key: str, tokenizer: str, **more: Any
) -> dict[str, Any]:
    """Return what a resumed run must share with the one that saved, as a manifest's JSON gives it back.

    Args:
        shape: The fields of the model's configuration.
        more: What a task adds.
    """
    adapter = asdict(config.adapter) if hasattr(config, "adapter") else {}
    identity = {
        "data": data_key,
        "tokenizer": tokenizer,
        "seed": config.seed,
        "data.sequence_length": getattr(config.data, "sequence_length", None),
        "train.global_batch_size": plan.split.global_batch_size,
        "train.batch_stages": plan.split.stages or None,
        "train.max_steps": plan.max_steps,
        "train.sequences": plan.last,
        **{f"optim.{name}": value for name, value in asdict(optim).items()},
        **{f"model.{name}": value for name, value in shape.items()},
        "model.dropout": config.model.dropout,
        **{f"adapter.{name}": value for name, value in adapter.items()},
        **more,
    }
    return json.loads(json.dumps(finite(identity), default=str))


def choose_checkpoint(config: Any, output_dir: Path, identity: dict[str, Any]) -> Found | None:
    """Return the checkpoint that ``config.resume`` names: auto, never, hub, or a path. The main process calls this.

    Args:
        identity: This run's: what began at a path goes on where it was stopped if it is the same.
    """
    resume, checkpoints = config.resume, output_dir / "checkpoints"
    if resume == "never":
        move_aside(output_dir)
        return None
    if resume == "auto":
        recover_folder(output_dir / "model")
        return find_checkpoint(checkpoints)
    if resume == "hub":
        return _newest_of_both(config.hub, checkpoints)
    try:
        return _newest_since(Path(resume), checkpoints, identity)
    except BadInput as error:
        raise BadInput(f"resume: {error}; give auto, never, hub, or the path of a checkpoint") from None


def _newest_of_both(hub: HubConfig, checkpoints: Path) -> Found:
    """Return the newest whole checkpoint, here or on the Hub: a run that moved between machines may have both."""
    found = find_checkpoint(checkpoints)
    if found is not None and hub.revision is not None:  # it began from there; stopped since, it goes on
        return found
    checkpoints.mkdir(parents=True, exist_ok=True)
    try:
        folder = download_checkpoint(hub, checkpoints, after=-1 if found is None else int(found[1]["step"]))
        return folder, read_checkpoint(folder)
    except (BadInput, HubError) as error:
        if found is None:
            raise BadInput(f"resume: {error}") from error
        if isinstance(error, HubError):
            print(f"warning: {error}; going on from what is here", file=sys.stderr)
        return found


def _newest_since(start: Path, checkpoints: Path, identity: dict[str, Any]) -> Found:
    """Return the newest whole checkpoint here of this run, if it began at ``start`` and was stopped since, or that."""
    if not start.is_dir():
        raise BadInput(f"there is no folder {start}")
    manifest = read_checkpoint(start)
    began = {"step": manifest["step"], "manifest": digest_of(manifest)}
    found = find_checkpoint(checkpoints)
    if found is not None and found[1].get("began") == began and found[1]["identity"] == identity:
        return found
    return start, {**manifest, "began": began}


def make_way(output_dir: Path, source: Found) -> None:
    """Move to previous-N/ what is not of the run that goes on from ``source``: later checkpoints, or another run."""
    checkpoints, (start, manifest) = output_dir / "checkpoints", source
    present = list_checkpoints(checkpoints)
    if not start.resolve().is_relative_to(checkpoints.resolve()):
        if present:
            move_aside(output_dir)
    elif later := [path for path in present if int(path.name[5:]) > manifest["step"]]:
        aside = _make_aside(output_dir)
        for path in [output_dir / name for name in STATE]:
            if path.is_file():  # figures up to the step are of both runs
                shutil.copy2(path, aside / path.name)
        (aside / checkpoints.name).mkdir()
        for path in later:
            os.replace(path, aside / checkpoints.name / path.name)
        if (output_dir / "model").exists():
            os.replace(output_dir / "model", aside / "model")
        print(f"Note: what came after step {manifest['step']} is in {aside}.", file=sys.stderr)


def move_aside(output_dir: Path) -> None:
    """Move an earlier run's state to previous-N/."""
    present = [output_dir / name for name in STATE if (output_dir / name).exists()]
    if present:
        aside = _make_aside(output_dir)
        for path in present:
            os.replace(path, aside / path.name)


def _make_aside(output_dir: Path) -> Path:
    """Create the next previous-N/."""
    taken = [path.name.removeprefix("previous-") for path in output_dir.glob("previous-*")]
    aside = output_dir / f"previous-{1 + max((int(number) for number in taken if number.isdigit()), default=0)}"
    aside.mkdir()
    return aside


def warmed_up(optim: OptimConfig, max_steps: int, manifest: dict[str, Any]) -> int:
    """Return the warm-up of a resumed run of ``max_steps``: as given, or 2 % of the length that it began with."""
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    begun = manifest["identity"]
    earlier = optim.warmup_of(begun["train.max_steps"])  # of a checkpoint that does not say, or was told another
    told = begun.get("optim.warmup_steps") is not None
    return min(earlier if told else manifest.get("warmup_steps", earlier), max_steps)


def compare_identity(old: dict[str, Any], new: dict[str, Any], accepted: list[str], output_dir: Path) -> None:
    """Raise BadInput listing every field in which this run differs from the one that saved.

    Args:
        accepted: Names that may differ, with or without their section.
    """
    # An earlier hfkit's checkpoint lacks settings that came later: it was saved under what is now their default.
    old = {f"optim.{name}": value for name, value in asdict(OptimConfig()).items()} | finite(old)
    if "adapter.rank" in new:
        old = {f"adapter.{name}": value for name, value in asdict(AdapterConfig()).items()} | old
        old["adapter.rank"] = old.pop("model.lora_rank", old["adapter.rank"])  # its earlier name
    free = set(accepted)
    if new["optim.schedule"] in ("constant", "wsd") and new["train.max_steps"] > old["train.max_steps"]:
        free.add("max_steps")
    differing = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and name not in free and name.rsplit(".", 1)[-1] not in free
    ]
    if differing:
        raise BadInput(
            f"{output_dir} holds another run: {'; '.join(differing[:6])}. "
            "Use another --output_dir, --resume never, or the old values"
        )
