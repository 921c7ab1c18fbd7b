"""Whether a checkpoint is this run's."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfkit.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from hfkit.data.batches import Plan, Split
from hfkit.files import digest_of
from hfkit.resume import Found, choose_checkpoint, compare_identity, describe_identity, make_way, warmed_up
from hfkit.settings import AdapterConfig, BadInput, OptimConfig, RunConfig


def identity(**optim: float) -> dict[str, object]:
    return describe_identity(RunConfig(), OptimConfig(**optim), Plan(10, Split(4, 2), None), {}, "data", "tokenizer")


def test_a_setting_that_came_later_was_at_its_default(tmp_path: Path) -> None:
    earlier = identity()
    del earlier["optim.z_loss"]
    compare_identity(earlier, identity(), [], tmp_path)
    with pytest.raises(BadInput, match=r"optim\.z_loss was 0\.0, now 0\.0001"):
        compare_identity(earlier, identity(z_loss=1e-4), [], tmp_path)


def test_an_adapter_that_was_called_lora_rank_is_the_same_run(tmp_path: Path) -> None:
    now = {**identity(), **{f"adapter.{name}": value for name, value in asdict(AdapterConfig()).items()}}
    compare_identity({**identity(), "model.lora_rank": 0}, now, [], tmp_path)
    with pytest.raises(BadInput, match=r"adapter\.rank was 4, now 0"):
        compare_identity({**identity(), "model.lora_rank": 4}, now, [], tmp_path)


def test_the_size_of_every_step_is_the_runs(tmp_path: Path) -> None:
    plan = Plan(10, Split(4, 2, stages=((2, 2),)), None)
    staged = describe_identity(RunConfig(), OptimConfig(), plan, {}, "data", "tokenizer")
    compare_identity(staged, dict(staged), [], tmp_path)
    with pytest.raises(BadInput, match=r"train\.batch_stages was \[\[2, 2\]\], now None"):
        compare_identity(staged, identity(), [], tmp_path)


def test_what_changes_the_gradient_changes_the_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"optim\.z_loss was 0\.001, now 0\.0"):
        compare_identity(identity(z_loss=1e-3), identity(), [], tmp_path)


def test_a_shape_that_holds_an_infinity_is_the_same_run_read_back(tmp_path: Path) -> None:
    """Mamba's kind of model has ``time_step_limit`` (0.0, inf), which JSON has no word for."""
    plan, shape = Plan(10, Split(4, 2), None), {"time_step_limit": (0.0, float("inf"))}
    now = describe_identity(RunConfig(), OptimConfig(), plan, shape, "data", "tokenizer")
    saved = save_checkpoint(tmp_path / "checkpoints", 1, {}, {"identity": now})
    assert "Infinity" not in (saved / "manifest.json").read_text()
    compare_identity(read_checkpoint(saved)["identity"], now, [], tmp_path)
    earlier = {"format": 1, "step": 2, "identity": {**now, "model.time_step_limit": [0.0, float("inf")]}, "files": {}}
    folder = tmp_path / "checkpoints" / "step-00000002"  # as they were written before
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({**earlier, "digest": digest_of(earlier)}))
    compare_identity(read_checkpoint(folder)["identity"], now, [], tmp_path)


def save(checkpoints: Path, *steps: int, **facts: object) -> dict[int, Path]:
    """Save a checkpoint without tensors after each of these steps."""
    return {step: save_checkpoint(checkpoints, step, {}, {"identity": {}, **facts}, keep=9) for step in steps}


def resumed(output_dir: Path, start: Path, identity: dict[str, object]) -> Found:
    """Return what a run with ``--resume start`` goes on from, after it made way for itself."""
    found = choose_checkpoint(SimpleNamespace(resume=str(start)), output_dir, identity)
    assert found is not None
    make_way(output_dir, found)
    return found


def left(folder: Path) -> list[int]:
    """Steps of the checkpoints below a folder."""
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("inside", [True, False])
def test_a_run_that_began_at_a_path_goes_on_where_it_was_stopped(tmp_path: Path, inside: bool) -> None:
    output_dir = tmp_path / "run"
    start = save(output_dir / "checkpoints" if inside else tmp_path / "elsewhere", 10)[10]
    save(output_dir / "checkpoints", 20, 30)  # of an earlier run
    (output_dir / "metrics.jsonl").write_text("figures\n")
    folder, manifest = resumed(output_dir, start, {})
    assert folder == start and left(output_dir / "previous-1") == [20, 30]
    assert (output_dir / "previous-1" / "metrics.jsonl").exists()
    assert (output_dir / "metrics.jsonl").exists() == inside  # they are this run's, too, up to step 10

    save(output_dir / "checkpoints", 15, began=manifest["began"])
    assert resumed(output_dir, start, {})[0].name == "step-00000015"
    again, _ = resumed(output_dir, start, {"train.max_steps": 99})  # another run, which begins there as well
    assert again == start and left(output_dir / "previous-2") == [15] and left(output_dir) == [10] * inside


@pytest.mark.parametrize("kept", [{"warmup_steps": 4}, {}])
def test_a_longer_run_keeps_the_warm_up_that_it_began_with(kept: dict[str, int]) -> None:
    manifest = {"identity": {"train.max_steps": 200}, **kept}
    assert warmed_up(OptimConfig(), 5000, manifest) == 4
    assert warmed_up(OptimConfig(warmup_steps=30), 5000, manifest) == 30
    assert warmed_up(OptimConfig(), 3, manifest) == 3  # shorter, where that is accepted
    given = {"identity": {"train.max_steps": 200, "optim.warmup_steps": 50}, "warmup_steps": 50}
    assert warmed_up(OptimConfig(), 200, given) == 4  # 50 were asked for then, and 2 % now
