"""Benchmarks: the tasks of EleutherAI's evaluation harness (lm-eval), its own or described by a YAML file of yours."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkit.settings import BadInput

YAML = (".yaml", ".yml")


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return each task's metrics, their standard errors and the number of examples, as the harness computes them.

    Args:
        tasks: Names of the harness's tasks, which fetch their data from the Hub, or paths of YAML files.
        length: Tokens of context and answer at most; None is all of the model's positions.

    Raises:
        BadInput: if a task is unknown or cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if missing := [task for task in tasks if task.endswith(YAML) and not Path(task).is_file()]:
        raise BadInput(f"tasks: {missing[0]} does not exist")
    # Reading the harness's thousands of task files takes seconds, and tasks of one's own do not need it.
    manager = TaskManager(include_defaults=not all(task.endswith(YAML) for task in tasks))
    reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        manager.load(list(tasks))  # before anything is computed
    except Exception as error:  # whatever a task's YAML, its data set or its own code may raise
        raise BadInput(f"tasks: {' '.join(str(error).split())[:300]}") from None
    judged: Any = simple_evaluate(reader, tasks=list(tasks), task_manager=manager, log_samples=False, **seeds)
    return {name: _figures(judged, name) for name in judged["results"]}


def _figures(judged: dict[str, Any], name: str) -> dict[str, float]:
    """Return the numbers among a task's results; `acc,none` is acc through no filter of the answers."""
    found = {key.removesuffix(",none"): value for key, value in judged["results"][name].items() if "," in key}
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    samples = judged["n-samples"].get(name)
    return numbers | ({"examples": samples["effective"]} if samples else {})
