"""Which state of a run becomes its result: the last one, the best on validation, or the mean of the last ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hfkit.checkpoint import average_models, restore_model, step_folder
from hfkit.loop import Progressed


def steps_to_average(step: int, max_steps: int, save_every: int, number: int) -> list[int]:
    """Return the last ``number`` steps up to ``step`` that may be averaged: those that are saved in any case.

    A checkpoint more, where a run was stopped or pushed, would make it another mean than that of an undisturbed run.

    Example:
        >>> steps_to_average(57, 65, save_every=10, number=2), steps_to_average(65, 65, save_every=10, number=2)
        ([40, 50], [60, 65])
    """
    last = [step] if step == max_steps else []
    earlier = range((step - len(last)) // save_every * save_every, 0, -save_every) if save_every else range(0)
    return sorted([*last, *earlier[:number]][:number])


class Selection:
    """Remembers the best evaluation in ``progress``, which is saved with every checkpoint.

    Args:
        metric: The figure that decides, the lower the better where its name ends in `loss`.
        progress: The run's.
    """

    def __init__(self, metric: str, progress: Progressed) -> None:
        self.metric, self.progress = metric, progress

    def improves(self, figures: dict[str, Any]) -> bool:
        """Whether these figures are better than the best so far; figures without the metric are not."""
        value, best = figures.get(self.metric), self.progress.best
        if value is None or best is None:
            return value is not None
        return value < best if self.metric.endswith("loss") else value > best

    def note(self, step: int, figures: dict[str, Any]) -> bool:
        """Remember ``step`` if it is the best so far; return whether it is."""
        if better := self.improves(figures):
            self.progress.best, self.progress.best_step = figures[self.metric], step
        return better

    def is_lost(self, checkpoints: Path) -> bool:
        """Whether the best step's checkpoint is not here: the run went on elsewhere, or could not save it."""
        step = self.progress.best_step
        return step is not None and not (checkpoints / step_folder(step)).is_dir()

    def forget(self) -> None:
        """Take the next evaluation as the best so far."""
        self.progress.best = self.progress.best_step = None

    def load_best(
        self, checkpoints: Path, model: nn.Module, evaluate: Callable[[], dict[str, float]], averaged: Sequence[int]
    ) -> dict[str, Any]:
        """Put the best state into ``model``, or the mean of the last ones where that is better; return which it was.

        Args:
            averaged: Steps whose checkpoints, all of them here, to average; fewer than two try no mean.
        """
        last = [checkpoints / step_folder(step) for step in averaged]
        if len(last) > 1:
            average_models(last, model)
            if self.improves(mean := evaluate()):
                return {"averaged_steps": list(averaged), f"best_{self.metric}": mean[self.metric]}
        step = self.progress.best_step
        if step is not None:
            restore_model(checkpoints / step_folder(step), model)
        elif last:  # nothing is known to be better than the last state, and the mean is not
            restore_model(last[-1], model)
        return {"best_step": step, f"best_{self.metric}": self.progress.best}
