"""Whether a checkpoint is this run's."""

from dataclasses import asdict
from pathlib import Path

import pytest

from hfkit.data.batches import Plan, Split
from hfkit.resume import compare_identity, describe_identity
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
