"""Sharded training (FSDP2) on two real processes: one process's losses, and checkpoints that fit any number of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, fully_shard

from hfkit.checkpoint import read_checkpoint, restore_model, restore_optimizer, save_checkpoint, state_writers
from hfkit.data.batches import Step
from hfkit.loop import train_step
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm
from hfkit.optim import build_optimizer
from hfkit.settings import ModelConfig, OptimConfig, TokenizerConfig
from hfkit.sharding import gathered
from hfkit.tokenizer import train_tokenizer
from processes import run_in_processes

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
STEPS = 3


def build(tied: bool, name: str) -> tuple[CausalLMLoss, OptimConfig]:
    tokenizer = train_tokenizer(["a small text"], TokenizerConfig(vocab_size=270))
    overrides = {**SHAPE, "intermediate_size": 64, "tie_word_embeddings": tied}
    module = CausalLMLoss(build_causal_lm(ModelConfig(preset="tiny", config_overrides=overrides), tokenizer))
    return module, OptimConfig(name=name, learning_rate=1e-2)  # type: ignore[arg-type]


def step_of(number: int, rank: int, world: int) -> Step:
    ids = torch.randint(6, 262, (4, 9), generator=torch.Generator().manual_seed(number))
    mine = ids[rank * 4 // world : (rank + 1) * 4 // world]
    return Step([{"input_ids": mine[:, :-1], "targets": mine[:, 1:]}], targets=32, tokens=32)


def shard(module: CausalLMLoss) -> None:
    """Shard as Accelerate does: every layer, and the root, whose weights are scattered again after each pass."""
    for layer in module.model.model.layers:
        fully_shard(layer)
    fully_shard(module, reshard_after_forward=True)
    groups = sum(isinstance(part, FSDPModule) for part in module.modules())
    assert groups == SHAPE["num_hidden_layers"] + 1


def train(tied: bool, name: str, folder: Path | None, sharded: bool, first: int = 0) -> list[list[float]]:
    """Train on this process's share; with ``folder`` save at the end, or go on from it where ``first`` is above 0."""
    accelerator = Accelerator(cpu=True)
    module, config = build(tied, name)
    if sharded:
        assert accelerator.num_processes == 2
        shard(module)
    optimizer: Any = build_optimizer(module, config)
    if first and folder:
        restore_model(folder, module.model)
        restore_optimizer(folder, module.model, optimizer)
    figures = []
    for number in range(first, first + STEPS):
        step = step_of(number, accelerator.process_index, accelerator.num_processes)
        vector = train_step(
            accelerator, module, optimizer, step, number=number, seed=0, max_grad_norm=1.0,
            parameters=list(module.parameters()),
        )  # fmt: skip
        figures.append(vector[:2].tolist())
    if folder and not first:
        writers = state_writers(module.model, optimizer)
        if accelerator.is_main_process:
            save_checkpoint(folder.parent, STEPS, writers, {"world_size": accelerator.num_processes})
    return figures


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_run_equals_one_process_and_its_checkpoint_goes_on_anywhere(
    tied: bool, name: str, tmp_path: Path
) -> None:
    alone = run_in_processes(1, lambda: train(tied, name, None, sharded=False))[0]
    folder = tmp_path / f"step-{STEPS:08d}"
    both = run_in_processes(2, lambda: train(tied, name, folder, sharded=True))
    assert both[0] == both[1]
    assert torch.allclose(torch.tensor(both[0]), torch.tensor(alone), rtol=2e-5)
    assert read_checkpoint(folder)["world_size"] == 2
    single = run_in_processes(1, lambda: train(tied, name, folder, sharded=False, first=STEPS))[0]
    again = run_in_processes(2, lambda: train(tied, name, folder, sharded=True, first=STEPS))
    assert torch.allclose(torch.tensor(again[0]), torch.tensor(single), rtol=2e-5)


def logits_inside(sharded: bool) -> list[float]:
    """Return logits of the model inside the loss module: before any step, after a pass through the module, after it."""
    accelerator = Accelerator(cpu=True)
    module, config = build(True, "adamw")
    if sharded:
        shard(module)
    optimizer = build_optimizer(module, config)
    step, found = step_of(0, 0, 1), []
    batch = step.micro_batches[0]
    with torch.no_grad(), gathered(module):
        found.append(module.model(batch["input_ids"]).logits.sum().item())
        module(**batch)
        found.append(module.model(batch["input_ids"]).logits.sum().item())
    train_step(
        accelerator, module, optimizer, step, number=0, seed=0, max_grad_norm=1.0,
        parameters=list(module.parameters()),
    )  # fmt: skip
    with torch.no_grad(), gathered(module):
        found.append(module.model(batch["input_ids"]).logits.sum().item())
    return found


def test_the_model_inside_a_sharded_module_can_be_called() -> None:
    alone = run_in_processes(1, lambda: logits_inside(sharded=False))[0]
    both = run_in_processes(2, lambda: logits_inside(sharded=True))
    assert both[0] == both[1]
    assert torch.allclose(torch.tensor(both[0][:2]), torch.tensor(alone[:2]), rtol=1e-4)
    assert both[0][2] != both[0][1]
