"""Checkpoints that are either whole and verified or do not exist.

A save writes into a hidden temporary folder, syncs every file, writes the manifest (sizes and SHA-256) last and renames
the folder into place; only then are older ones dropped, each renamed out of sight before its files go. There is no
pointer file to tear: the newest checkpoint is the highest step whose manifest verifies. Weights and optimizer state are
safetensors under the parameters' names, everything else is JSON: nothing that is loaded can run code, and the number of
processes is not part of the format. Order, learning rate and random numbers are functions of the step, so they are not
here at all.
"""

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hfkit.adapters import stored_tensors
from hfkit.files import digest, digest_of, finite, read_json, sync, write_json
from hfkit.settings import BadInput

MANIFEST = "manifest.json"
FORMAT = 1
Writers = dict[str, Callable[[Path], None]]
_verified: set[tuple[str, str]] = set()  # (folder, manifest digest) that this process has read through


def step_folder(step: int) -> str:
    """Return the name of the checkpoint after ``step`` optimizer steps.

    Example:
        >>> step_folder(100)
        'step-00000100'
    """
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path, step: int, writers: Writers, facts: dict[str, Any], keep: int = 2, needed: Iterable[int | None] = ()
) -> Path:
    """Write one checkpoint, then drop all but it, the newest ``keep`` and those that are needed.

    Args:
        writers: File name → function that writes that file to the path it is given.
        facts: What the manifest says besides the files: world size, data key, configuration, progress.
        needed: Steps whose checkpoints stay, such as the best one's.

    Raises:
        OSError: if there is no room or writing fails; earlier checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    _check_space(root)
    temporary = root / f".tmp-{step}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        files = {}
        for name, write in writers.items():
            write(temporary / name)
            sync(temporary / name)
            files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": digest(temporary / name)}
        manifest = finite({"format": FORMAT, "step": step, **facts, "files": files})  # as it will be read
        write_json(temporary / MANIFEST, {**manifest, "digest": digest_of(manifest)})
        sync(temporary)
        final = root / step_folder(step)
        if final.exists():  # a damaged one: a verified checkpoint is resumed from and never written again
            set_aside(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(root)
    _verified.add((str(final), digest_of(manifest)))
    prune(root, keep, {step, *needed})
    return final


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Raises:
        BadInput: naming the file that is missing, cut or changed.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest is None or manifest.pop("digest", None) != digest_of(manifest) or manifest.get("format") != FORMAT:
        raise BadInput(f"{folder}: {MANIFEST} is missing or damaged")
    known = (str(folder), digest_of(manifest)) in _verified
    for name, facts in manifest["files"].items():
        path = folder / name
        if path.name != name:
            raise BadInput(f"{folder}: {MANIFEST} names a file outside the folder: {name!r}")
        if not path.is_file():
            raise BadInput(f"{folder}: {name} is missing")
        if path.stat().st_size != facts["bytes"] or not (known or digest(path) == facts["sha256"]):
            raise BadInput(f"{folder}: {name} is damaged")
    _verified.add((str(folder), digest_of(manifest)))
    return manifest


def find_checkpoint(root: Path, quiet: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its manifest; damaged ones are named on stderr and set aside."""
    for folder in reversed(list_checkpoints(root)):
        try:
            return folder, read_checkpoint(folder)
        except BadInput as error:
            if not quiet:
                print(f"warning: {error}; using the checkpoint before it", file=sys.stderr)
            set_aside(folder)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders that look like checkpoints, oldest first."""
    return sorted(
        (path for path in root.glob("step-*") if path.name[5:].isdigit()), key=lambda path: int(path.name[5:])
    )


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint so that it is neither resumed from nor counted; the latest can still be looked at."""
    for earlier in folder.parent.glob(".bad-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    os.replace(folder, folder.with_name(f".bad-{folder.name}-{uuid.uuid4().hex[:8]}"))


def prune(root: Path, keep: int, needed: Iterable[int | None] = ()) -> None:
    """Delete old checkpoints but the newest ``keep`` whole ones and the needed; a damaged one counts for nothing."""
    stay = {step_folder(step) for step in needed if step is not None}
    whole = []
    for folder in list_checkpoints(root):
        try:
            read_checkpoint(folder)
            whole.append(folder)
        except BadInput:
            continue
    for old in whole[: -max(2, keep)]:
        if old.name not in stay:
            os.replace(old, root / f".trash-{old.name}-{uuid.uuid4().hex[:8]}")  # a kill leaves no half of a step-N
    for hidden in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
        shutil.rmtree(hidden, ignore_errors=True)


def _check_space(root: Path) -> None:
    """Raise OSError where the disk has less room than the newest checkpoint took."""
    newest = list_checkpoints(root)[-1:]
    needed = sum(path.stat().st_size for folder in newest for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"a checkpoint takes {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left")


def _whole(tensor: Tensor) -> Tensor:
    """Return the full value of a possibly sharded tensor, on the CPU (all processes call this)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()


def _place(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` on the device and in the sharding of ``like``."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name → full tensor of an unwrapped module's parameters (a tied one once) and saved buffers."""
    return {name: _whole(tensor) for name, tensor in _stored(model).items()}


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors, of the model itself, that a checkpoint holds."""
    saved = model.state_dict(keep_vars=True)
    names = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in saved}
    return {name: part for whole, tensor in names.items() for name, part in stored_tensors(whole, tensor).items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return ``parameter name|state name`` → full tensor of the optimizer's state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": _whole(torch.as_tensor(value))
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def state_writers(model: nn.Module, optimizer: torch.optim.Optimizer) -> Writers:
    """Return the writers of weights and optimizer state; every process calls this, the main one writes."""
    weights, moments = model_tensors(model), optimizer_tensors(model, optimizer)
    return {
        "model.safetensors": lambda path: save_file(weights, path, metadata={"format": "pt"}),
        "optimizer.safetensors": lambda path: save_file(moments, path),
    }


def restore_model(folder: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into an unwrapped module."""
    targets = _stored(model)
    with safe_open(folder / "model.safetensors", "pt") as file, torch.no_grad():
        if set(file.keys()) != set(targets):
            raise BadInput(f"{folder}: its weights are those of another model")
        for name, target in targets.items():
            target.copy_(_place(file.get_tensor(name), target))


def average_models(folders: Sequence[Path], model: nn.Module) -> None:
    """Put the mean of several checkpoints' weights into an unwrapped module."""
    restore_model(folders[0], model)
    for number, folder in enumerate(folders[1:], 2):
        with safe_open(folder / "model.safetensors", "pt") as file, torch.no_grad():
            for name, tensor in _stored(model).items():
                if tensor.is_floating_point():  # the integers of a quantised weight are frozen
                    tensor.lerp_(_place(file.get_tensor(name), tensor), 1 / number)


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's optimizer state."""
    parameters = dict(model.named_parameters())
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        for entry in file.keys():  # noqa: SIM118 (not a dict)
            name, key = entry.rsplit("|", 1)
            value = file.get_tensor(entry)
            like = parameters[name]
            # Step counters are scalars and stay unsharded; fused optimizers want them on the parameter's device.
            optimizer.state[like][key] = _place(value, like) if value.shape == like.shape else value.to(like.device)
