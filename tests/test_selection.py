"""Which state becomes the result: the best one, the mean of the last ones, or, where the best is lost, the last."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hfkit.checkpoint import average_models, list_checkpoints, save_checkpoint, state_writers
from hfkit.loop import Progressed
from hfkit.selection import Selection, steps_to_average


def save_steps(folder: Path, values: dict[int, float]) -> nn.Linear:
    """Save a model of one weight after some steps, and return it as the last of them left it."""
    model = nn.Linear(1, 1, bias=False)
    for step, value in values.items():
        nn.init.constant_(model.weight, value)
        save_checkpoint(folder, step, state_writers(model, torch.optim.SGD(model.parameters())), {}, keep=9)
    return model


def selection_of(losses: dict[int, float]) -> Selection:
    selection = Selection("eval_loss", Progressed())
    for step, loss in losses.items():
        selection.note(step, {"eval_loss": loss})
    return selection


@pytest.mark.parametrize(
    ("loss_of_mean", "weight", "chosen"),
    [
        (1.5, 6.0, {"averaged_steps": [2, 3], "best_eval_loss": 1.5}),
        (2.5, 2.0, {"best_step": 1, "best_eval_loss": 2.0}),
    ],
)
def test_the_mean_of_the_last_states_is_taken_where_it_is_better(
    loss_of_mean: float, weight: float, chosen: dict[str, float], tmp_path: Path
) -> None:
    model = save_steps(tmp_path, {1: 2.0, 2: 4.0, 3: 8.0})
    tried = []

    def evaluate() -> dict[str, float]:
        tried.append(model.weight.item())
        return {"eval_loss": loss_of_mean}

    found = selection_of({1: 2.0, 2: 3.0, 3: 4.0}).load_best(tmp_path, model, evaluate, [2, 3])
    assert tried == [6.0]
    assert (model.weight.item(), found) == (weight, chosen)


@pytest.mark.parametrize(
    ("step", "save_every", "number", "steps"),
    [
        (60, 10, 2, [50, 60]),
        (57, 10, 2, [40, 50]),
        (65, 10, 3, [50, 60, 65]),  # the last step of the run
        (65, 0, 2, [65]),
        (9, 10, 2, []),
        (60, 10, 0, []),
    ],
)
def test_only_what_is_saved_in_any_case_is_averaged(step: int, save_every: int, number: int, steps: list[int]) -> None:
    assert steps_to_average(step, 65, save_every, number) == steps


def test_a_mean_takes_buffers_along_and_leaves_integers(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("scale", torch.tensor(0.0))
    model.register_buffer("frozen", torch.tensor([7, 9], dtype=torch.int8))
    for step, value in enumerate((1.0, 2.0, 6.0)):
        nn.init.constant_(model.weight, value)
        model.scale.fill_(-value)
        save_checkpoint(tmp_path, step, state_writers(model, torch.optim.SGD(model.parameters())), {}, keep=9)
    average_models(list_checkpoints(tmp_path), model)
    assert (model.weight.item(), model.scale.item(), model.frozen.tolist()) == (3.0, -3.0, [7, 9])


def test_the_best_state_is_restored_without_a_mean(tmp_path: Path) -> None:
    model = save_steps(tmp_path, {1: 2.0, 2: 4.0})
    found = selection_of({1: 2.0, 2: 3.0}).load_best(tmp_path, model, dict, [])
    assert (model.weight.item(), found["best_step"]) == (2.0, 1)


def test_a_best_state_that_is_not_here_is_forgotten_and_not_claimed(tmp_path: Path) -> None:
    model = save_steps(tmp_path, {2: 4.0, 3: 8.0})
    selection = selection_of({1: 2.0, 2: 3.0})
    assert selection.is_lost(tmp_path)
    selection.forget()
    assert not selection.is_lost(tmp_path)
    found = Selection("eval_loss", selection.progress).load_best(tmp_path, model, dict, [2, 3])
    assert (model.weight.item(), found["best_step"]) == (8.0, None)
