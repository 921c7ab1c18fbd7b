"""Optimizers and learning-rate schedules.

The learning rate is a pure function of the step: nothing is saved, and a resumed run, or one on another number of
processes, cannot disagree with the first.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from hfkit.settings import BadInput, OptimConfig

Schedule = Callable[[int], float]


def build_schedule(config: OptimConfig, max_steps: int) -> Schedule:
    """Return step (0 … max_steps−1) → share of the peak learning rate.

    Example:
        >>> share = build_schedule(OptimConfig(schedule="linear", warmup_steps=2, min_learning_rate_share=0.0), 6)
        >>> [round(share(step), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = warmup_steps(config, max_steps)
    decay = max(1, round(config.decay_share * max_steps))
    floor = config.min_learning_rate_share

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "inverse_sqrt":
            return math.sqrt(max(warmup, 1) / (step + 1)) if warmup else 1 / math.sqrt(step + 1)
        if config.schedule == "wsd":  # warm-up, stable, decay (Hu et al., 2024, MiniCPM, arXiv:2404.06395)
            return min(1.0, (max_steps - step) / decay)
        progress = (step - warmup) / max(1, max_steps - warmup)
        shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return floor + (1 - floor) * shape

    return share


def warmup_steps(config: OptimConfig, max_steps: int) -> int:
    """Return the warm-up of a run of ``max_steps``: as given, or 2 % of it."""
    if config.warmup_steps is None:
        return round(0.02 * max_steps)
    if config.warmup_steps > max_steps:
        raise BadInput(f"optim.warmup_steps {config.warmup_steps} is over the run's {max_steps} steps")
    return config.warmup_steps


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (decayed, not decayed): matrices decay; biases, norms and embeddings do not.

    A tied embedding is one parameter and counts as an embedding.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    return decayed, [p for p in trained if id(p) not in kept]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer; each group's ``peak`` is the learning rate that the schedule scales."""
    decayed, others = split_parameters(model)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "peak": config.learning_rate},
        {"params": others, "weight_decay": 0.0, "peak": config.learning_rate},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Set every group's rate to ``share`` of its peak; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return optimizer.param_groups[0]["lr"]
