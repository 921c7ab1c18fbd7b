"""The commit protocol: a checkpoint is whole and verified or does not exist, whatever happens while it is written."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hfkit.checkpoint as checkpoint
from hfkit.checkpoint import (
    Writers,
    find_checkpoint,
    list_checkpoints,
    prune,
    read_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    state_writers,
    step_folder,
)
from hfkit.files import digest_of
from hfkit.settings import BadInput

FACTS = {"world_size": 1, "progress": {"step": 0}}


@pytest.fixture(autouse=True)
def forget_what_was_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test reads checkpoints like a new process: nothing on disk is known yet."""
    monkeypatch.setattr(checkpoint, "_verified", set())


def writers(step: int) -> Writers:
    """Two files whose content tells the step."""
    tensors = {"weight": torch.full((64,), float(step))}
    return {
        "model.safetensors": lambda path: save_file(tensors, path),
        "optimizer.safetensors": lambda path: save_file({"moment": -tensors["weight"]}, path),
    }


def save(root: Path, *steps: int, keep: int = 2, best: int | None = None) -> None:
    """Save a checkpoint after each of these steps."""
    for step in steps:
        save_checkpoint(root, step, writers(step), FACTS, keep, [best])


def steps(root: Path) -> list[int]:
    """Steps of the folders that look like checkpoints."""
    return [int(path.name[5:]) for path in list_checkpoints(root)]


def found_step(root: Path) -> int | None:
    """The step that a new process would resume from, after reading the weights that come with it."""
    checkpoint._verified.clear()
    found = find_checkpoint(root, quiet=True)
    if found is None:
        return None
    folder, manifest = found
    assert load_file(folder / "model.safetensors")["weight"].eq(manifest["step"]).all()
    assert load_file(folder / "optimizer.safetensors")["moment"].eq(-manifest["step"]).all()
    return int(manifest["step"])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


def blank(path: Path) -> None:
    """What a power loss leaves of a file whose size reached the disk before its content."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, blank, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_damaged_file_is_named_and_the_older_checkpoint_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    checkpoint._verified.clear()
    found = find_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000002" in line and name in line and "the checkpoint before it" in line
    assert steps(tmp_path) == [1]  # set aside: it is neither found nor counted again


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nothing") is None
    save(tmp_path, 1)
    truncate(tmp_path / "step-00000001" / "model.safetensors")
    assert found_step(tmp_path) is None


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    content = json.loads(manifest.read_text())
    content.pop("digest")
    content["files"][name] = content["files"].pop("model.safetensors")
    manifest.write_text(json.dumps({**content, "digest": digest_of(content)}))
    with pytest.raises(BadInput, match="outside the folder"):
        read_checkpoint(manifest.parent)


def test_another_steps_file_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    shutil.copy(tmp_path / "step-00000001/model.safetensors", tmp_path / "step-00000002/model.safetensors")
    assert found_step(tmp_path) == 1


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=3)
    assert steps(tmp_path) == [3, 4, 5]
    save(tmp_path, 6, 7, best=3)
    assert steps(tmp_path) == [3, 6, 7]
    save(tmp_path, 8, 9, keep=1)  # the newest one and the one before it, at least
    assert steps(tmp_path) == [8, 9]


def test_what_was_just_saved_stays_whatever_steps_are_there(tmp_path: Path) -> None:
    save(tmp_path, 30, 40)
    save(tmp_path, 20)
    assert steps(tmp_path) == [20, 30, 40]


def test_order_is_that_of_the_steps(tmp_path: Path) -> None:
    names = [step_folder(step) for step in (9, 99_999_999, 100_000_000)]  # the last has a digit more
    for name in names[::-1]:
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == names


def test_a_damaged_checkpoint_counts_for_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    truncate(tmp_path / "step-00000003" / "model.safetensors")
    checkpoint._verified.clear()
    prune(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 3] or steps(tmp_path) == [1, 2, 3]
    assert found_step(tmp_path) == 2


def test_pruning_leaves_foreign_folders_and_clears_away_leavings(tmp_path: Path) -> None:
    for name in ("best", "step-notes", "mine.txt", ".tmp-7-dead", ".trash-step-00000001-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("here")
    (tmp_path / "step-latest").symlink_to(tmp_path / "best")
    save(tmp_path, 1, 2, 3)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"best", "step-notes", "mine.txt", "step-latest", "step-00000002", "step-00000003"}


def test_a_damaged_folder_at_the_steps_own_name_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    empty(tmp_path / "step-00000002" / "manifest.json")
    save(tmp_path, 2)
    assert found_step(tmp_path) == 2


def test_failing_at_any_call_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    calls = 0
    while True:
        with monkeypatch.context() as patch:
            hits = break_system(patch, after=calls, action=fail_with_a_full_disk)
            try:
                save(tmp_path, 3)
            except OSError:
                pass
            else:
                break
        assert hits == [calls]
        assert found_step(tmp_path) in (2, 3)
        assert len(steps(tmp_path)) >= 2 and not list(tmp_path.glob(".tmp-*"))
        calls += 1
    assert calls > 10  # each file written, synced, hashed; manifest; renames; folders synced
    assert found_step(tmp_path) == 3


def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survived = False
    calls = 0
    while not survived:
        root = tmp_path / str(calls)
        save(root, 1, 2)
        survived = in_child(lambda root=root, calls=calls: kill_at(root, calls)) == 0
        for folder in list_checkpoints(root):
            read_checkpoint(folder)  # nothing is half-written, nor half-deleted
        found = found_step(root)
        assert found in (2, 3) and len(steps(root)) >= 2
        assert survived <= (found == 3)
        save(root, 4)  # the next process goes on and tidies up
        assert found_step(root) == 4 and not list(root.glob(".t*"))
        calls += 1
    assert calls > 10


def kill_at(root: Path, calls: int) -> None:
    """Save step 3, killed at a call to the system."""
    break_system(pytest.MonkeyPatch(), after=calls, action=lambda: os.kill(os.getpid(), signal.SIGKILL))
    save(root, 3)


def fail_with_a_full_disk() -> None:
    raise OSError(28, "No space left on device")


def break_system(patch: pytest.MonkeyPatch, after: int, action: Callable[[], None]) -> list[int]:
    """Call ``action`` in place of the ``after``-th call that syncs, renames, hashes or removes; return where it was."""
    count, hits = 0, []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == after:
                hits.append(after)
                action()
            return function(*arguments, **named)

        return counted

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (checkpoint, "digest")):
        patch.setattr(owner, name, wrap(getattr(owner, name)))
    return hits


def fork(function: Callable[[], None]) -> int:
    """Call a function in a forked child, which ends with it; return the child's process id."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def in_child(function: Callable[[], None]) -> int:
    """Return the exit status of a forked child that calls a function."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(function), 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("room", [0, 200, 400])  # bytes: nothing fits, part of the tensors, all but the manifest
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, room: int) -> None:
    save(tmp_path, 1, 2)

    def fill() -> None:
        limit_file_size(room)
        try:
            save(tmp_path, 3)
        except Exception:
            return
        os._exit(9)  # nothing was hit

    assert in_child(fill) == 0
    assert found_step(tmp_path) == 2 and not list(tmp_path.glob(".tmp-*"))


def limit_file_size(room: int) -> None:
    """Let every file end at ``room`` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10))
    with pytest.raises(OSError, match="the disk has"):
        save(tmp_path, 2)
    assert steps(tmp_path) == [1]


class Tied(nn.Module):
    """A module whose output matrix is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(ids)) * self.scale)


def trained(seed: int, num_steps: int) -> tuple[Tied, torch.optim.Optimizer]:
    """A module after some optimizer steps."""
    torch.manual_seed(seed)
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(num_steps):
        take_step(module, optimizer)
    return module, optimizer


def take_step(module: Tied, optimizer: torch.optim.Optimizer) -> None:
    module(torch.arange(11)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weights_and_optimizer_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    module, optimizer = trained(seed=0, num_steps=3)
    folder = save_checkpoint(tmp_path, 3, state_writers(module, optimizer), FACTS)
    other, other_optimizer = trained(seed=1, num_steps=0)
    restore_model(folder, other)
    restore_optimizer(folder, other, other_optimizer)
    for _ in range(2):
        take_step(module, optimizer)
        take_step(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        state, restored = optimizer.state[mine], other_optimizer.state[theirs]
        assert all(torch.equal(state[key], restored[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    module, optimizer = trained(seed=0, num_steps=1)
    folder = save_checkpoint(tmp_path, 1, state_writers(module, optimizer), FACTS)
    names = set(load_file(folder / "model.safetensors"))
    assert names == {"embedding.weight", "inner.weight", "inner.bias", "scale"}
    other, _ = trained(seed=1, num_steps=0)
    restore_model(folder, other)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, module.head.weight)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    module, optimizer = trained(seed=0, num_steps=1)
    folder = save_checkpoint(tmp_path, 1, state_writers(module, optimizer), FACTS)
    with pytest.raises(BadInput, match="another model"):
        restore_model(folder, nn.Linear(4, 4))
