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


def train(tied: bool, name: str, folder: Path | None, sharded: bool, first: int = 0) -> list[list[float]]:
    """Train on this process's share; with ``folder`` save at the end, or go on from it where ``first`` is above 0."""
    accelerator = Accelerator(cpu=True)
    module, config = build(tied, name)
    if sharded:
        assert accelerator.num_processes == 2
        for layer in module.model.model.layers:
            fully_shard(layer)
        fully_shard(module)
        groups = sum(isinstance(part, FSDPModule) for part in module.modules())
        assert groups == SHAPE["num_hidden_layers"] + 1
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
