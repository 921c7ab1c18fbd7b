"""Optimizers and learning-rate schedules.

The learning rate is a pure function of the step: nothing is saved, and a resumed run, or one on another number of
processes, cannot disagree with the first.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hfkit.muon import MuonAdamW
from hfkit.settings import OptimConfig

Schedule = Callable[[int], float]


def build_schedule(config: OptimConfig, max_steps: int) -> Schedule:
    """Return step (0 … max_steps−1) → share of the peak learning rate.

    Example:
        >>> share = build_schedule(OptimConfig(schedule="linear", warmup_steps=2, min_learning_rate_share=0.0), 6)
        >>> [round(share(step), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = config.warmup_of(max_steps)
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


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (decayed, not decayed): matrices decay; biases, norms and embeddings do not.

    A tied embedding is one parameter and counts as an embedding.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    return decayed, [p for p in trained if id(p) not in kept]


def build_optimizer(model: nn.Module, config: OptimConfig, bf16: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer; each group's ``peak`` is the learning rate that the schedule scales.

    Args:
        bf16: Whether the run is in bf16: Muon's products may then be, too.
    """
    decayed, others = split_parameters(model)
    adamw: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.epsilon}
    if config.name == "adamw":
        groups = [_group(decayed, config.learning_rate, config.weight_decay), _group(others, config.learning_rate, 0.0)]
        return torch.optim.AdamW(_with_own_rates(groups, model), lr=config.learning_rate, fused=True, **adamw)
    head = output_head(model)
    matrices = [p for p in decayed if p.ndim == 2 and p is not head]
    rest = [p for p in decayed if p.ndim != 2 or p is head]
    groups = [
        {**_group(matrices, config.muon_learning_rate, config.weight_decay), "muon": True},
        _group(rest, config.learning_rate, config.weight_decay),
        _group(others, config.learning_rate, 0.0),
    ]
    return MuonAdamW(_with_own_rates(groups, model), lr=config.learning_rate, bf16=bf16, **adamw)


def _group(parameters: list[nn.Parameter], peak: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": weight_decay, "lr": peak, "peak": peak}


def _with_own_rates(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups that hold something; parameters with a peak rate of their own get AdamW groups of their own."""
    rates = {id(p): peak for parameters, peak in getattr(model, "own_rates", []) for p in parameters}
    divided = []
    for group in groups:
        divided.append({**group, "params": [p for p in group["params"] if id(p) not in rates]})
        for peak in sorted({rates[id(p)] for p in group["params"] if id(p) in rates}):
            apart = [p for p in group["params"] if rates.get(id(p)) == peak]
            divided.append(_group(apart, peak, group["weight_decay"]))
    return [group for group in divided if group["params"]]


def output_head(model: nn.Module) -> nn.Parameter | None:
    """Return the weight of the (untied) output embedding or classification head inside a loss module."""
    inner: Any = getattr(model, "model", model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    head = head or getattr(inner, "score", None) or getattr(inner, "classifier", None)  # decoders, encoders
    return getattr(head, "weight", None)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Set every group's rate to ``share`` of its peak; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return optimizer.param_groups[0]["lr"]
