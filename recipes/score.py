"""Score a causal model on a text: loss per token, perplexity, and bits per byte, which compares across tokenizers.

    python recipes/score.py --model.path runs/pretrain/model --data.test_files held_out.txt
    python recipes/score.py --model.path gpt2 --data.validation_files 'texts/*.jsonl'
    python recipes/score.py --model.path runs/pretrain/model --tasks '[arc_easy, my_task.yaml]'

What is scored: the test files, else the validation files, else the part of the training text that pretraining with the
same `data` settings holds out. Every document counts, cut on its own into windows of `data.sequence_length` targets.
With `tasks`, benchmarks of lm-eval are scored instead, or too, where `data` names a text.
"""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfkit.config import parse_config
from hfkit.settings import (
    SEEDS,
    BadInput,
    DataConfig,
    Files,
    ModelConfig,
    TokenizerConfig,
    TrainConfig,
    check_bounds,
)


@dataclass
class ScoreDataConfig(DataConfig):
    """Which text."""

    sequence_length: int | None = None  # type: ignore[assignment]
    """Targets per window (tokens); null is what the model was trained with."""


@dataclass
class ScoreConfig:
    """Perplexity and bits per byte of any causal model on any text."""

    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)
    """Which text; it is scored as it is, never cleaned."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """`model.path`: a folder or Hub id."""
    tasks: Files = None
    """Benchmarks of lm-eval: names, or YAML files that describe your own (needs hfkit[eval])."""
    micro_batch_size: int = 8
    """Windows, or answers to a task, per forward pass: speed alone."""
    output_dir: Path = Path("runs/score")
    """Where result.json goes."""
    seed: int = 0
    """Decides which examples a task with several shots shows; a text's score has no chance in it."""

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise BadInput("which model? Give --model.path a folder or a Hub id")
        check_bounds("", self, micro_batch_size="[1, inf)", seed=SEEDS)
        if self.tasks and find_spec("lm_eval") is None:
            raise BadInput("tasks needs lm-eval: pip install 'hfkit[eval]'")
        if self.tasks and os.environ.get("WORLD_SIZE", "1") != "1":
            raise BadInput("tasks are scored by one process: run this with python instead of accelerate launch")


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(ScoreConfig)

from accelerate import Accelerator
from transformers import PreTrainedModel

from hfkit.data.prepare import Prepared, prepare_data
from hfkit.evaluation import score_text
from hfkit.files import write_json
from hfkit.harness import score_tasks
from hfkit.launch import build_accelerator, launch
from hfkit.losses import CausalLMLoss
from hfkit.model import find_length, load_causal_lm, set_length
from hfkit.remote import resolve_model
from hfkit.status import as_text
from hfkit.tokenizer import load_tokenizer


def main(config: ScoreConfig) -> None:
    """Load text and model, score the tasks, the text or both, and write down how."""
    data = None
    if not config.tasks or not config.data.is_builtin:
        folder = resolve_model(str(config.model.path), config.model.revision)
        data = prepare_data(config.data, TokenizerConfig(path=str(folder)), only_evaluation=True)
        if data.test is None and data.validation is None:
            raise BadInput("there is no text to score: give --data.test_files or --data.validation_files")
    model = load_causal_lm(config.model)
    accelerator = build_accelerator(TrainConfig())
    model.to(accelerator.device)
    result: dict[str, Any] = {"model": config.model.path}
    if config.tasks:
        tokenizer = load_tokenizer(str(config.model.path), config.model.revision)
        tasks = [config.tasks] if isinstance(config.tasks, str) else config.tasks
        length, batch_size = config.data.sequence_length, config.micro_batch_size
        result["tasks"] = score_tasks(model, tokenizer, tasks, length=length, batch_size=batch_size, seed=config.seed)
    if data is not None:
        result |= score_passages(config, accelerator, model, data)
    if accelerator.is_main_process:
        write_json(config.output_dir / "result.json", result)
        print(as_text(result))


def score_passages(
    config: ScoreConfig, accelerator: Accelerator, model: PreTrainedModel, data: Prepared
) -> dict[str, Any]:
    """Sum the losses of every window of the text."""
    split, stream = ("test", data.test) if data.test else ("validation", data.validation)
    assert stream is not None
    length = config.data.sequence_length or find_length(model.config)
    set_length(model.config, length)
    module = CausalLMLoss(model)
    scores = score_text(accelerator, module, [stream], data.bytes[split], length, config.micro_batch_size)
    return {"text": split, "sequence_length": length, **scores}


if __name__ == "__main__":
    launch(main, config, exclusive=False)
