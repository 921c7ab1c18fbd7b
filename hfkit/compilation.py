"""What a training step does with a model's blocks: compile them, or compute them again instead of keeping them."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from hfkit.losses import LossModule, score_rows
from hfkit.settings import BadInput


def compile_blocks(module: LossModule) -> None:
    """Compile what a training step spends its time in; evaluation and generation, whose shapes vary, stay as they are.

    The blocks of a model are alike, so one graph serves all of them and the first step waits for one block, however
    deep the model; parameters keep their names, and hooks of DDP and FSDP stay outside the graphs. A model whose blocks
    are not known is compiled whole.
    """
    names = set(module._no_split_modules or ())
    blocks = [part for part in module.model.modules() if names & {kind.__name__ for kind in type(part).__mro__}]
    if not blocks:
        module.compile()
        return
    steps = {kind: _compiled_in_training(kind.forward) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.forward = MethodType(steps[type(block)], block)  # a method, so that a copied block calls itself
    module.score_rows = torch.compile(score_rows)


def _compiled_in_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a block's forward that runs compiled where the block is in training mode."""
    compiled = torch.compile(forward)

    def step(block: nn.Module, *inputs: Any, **options: Any) -> Any:
        return (compiled if block.training else forward)(block, *inputs, **options)

    return step


def checkpoint_blocks(module: LossModule) -> None:
    """Keep only what enters each block, and compute the rest again in the backward pass.

    Raises:
        BadInput: for a model whose class cannot.
    """
    model: Any = module.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise BadInput(f"train.activation_checkpointing: {' '.join(str(error).split())}; leave it off") from None
