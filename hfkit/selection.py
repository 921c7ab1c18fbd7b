"""Which state of a run becomes its result: the last one, the best on validation, or the mean of the last ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hfkit.checkpoint import average_models, list_checkpoints, restore_model, step_folder
from hfkit.loop import Progressed


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

    def load_best(
        self, checkpoints: Path, model: nn.Module, evaluate: Callable[[], dict[str, float]], average: int
    ) -> dict[str, Any]:
        """Put the best state into ``model``, or the mean of the last ones where that is better; return which it was.

        Args:
            average: How many of the last checkpoints to average; 0 tries no mean.
        """
        last = list_checkpoints(checkpoints)[-average:] if average else []
        if last:
            average_models(last, model)
            if self.improves(mean := evaluate()):
                return {
                    "averaged_steps": [int(path.name[5:]) for path in last],
                    f"best_{self.metric}": mean[self.metric],
                }
        best = checkpoints / step_folder(self.progress.best_step or 0)
        if best.is_dir():
            restore_model(best, model)
        return {"best_step": self.progress.best_step, f"best_{self.metric}": self.progress.best}
