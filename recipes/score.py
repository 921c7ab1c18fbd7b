"""Score a causal model on a text: loss per token, perplexity, and bits per byte, which compares across tokenizers.

    python recipes/score.py --model.path runs/pretrain/model --data.test_files held_out.txt
    python recipes/score.py --model.path gpt2 --data.validation_files 'texts/*.jsonl'

What is scored: the test files, else the validation files, else the part of the training text that pretraining with the
same `data` settings holds out. Every document counts, cut on its own into windows of `data.sequence_length` targets.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import BadInput, DataConfig, ModelConfig, TokenizerConfig, TrainConfig


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
    micro_batch_size: int = 8
    """Windows per forward pass: speed alone."""
    output_dir: Path = Path("runs/score")
    """Where result.json goes."""
    seed: int = 0
    """Decides nothing here; accepted so that every recipe takes it."""

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise BadInput("which model? Give --model.path a folder or a Hub id")
        if self.micro_batch_size < 1:
            raise BadInput(f"micro_batch_size must be at least 1, not {self.micro_batch_size}")


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(ScoreConfig)

from hfkit.data.prepare import prepare_data
from hfkit.evaluation import score_text
from hfkit.files import write_json
from hfkit.launch import build_accelerator, launch
from hfkit.losses import CausalLMLoss
from hfkit.model import find_length, load_causal_lm, set_length
from hfkit.remote import resolve_model
from hfkit.status import describe


def main(config: ScoreConfig) -> None:
    """Load the model, tokenize the text, sum the losses of every window."""
    folder = resolve_model(str(config.model.path), config.model.revision)
    data = prepare_data(config.data, TokenizerConfig(path=str(folder)), only_evaluation=True)
    split = "test" if data.test else "validation"
    stream = data.test or data.validation
    if stream is None:
        raise BadInput("there is no text to score: give --data.test_files or --data.validation_files")
    model = load_causal_lm(config.model)
    length = config.data.sequence_length or find_length(model.config)
    set_length(model.config, length)

    accelerator = build_accelerator(TrainConfig())
    module = CausalLMLoss(model).to(accelerator.device)
    scores = score_text(accelerator, module, [stream], data.bytes[split], length, config.micro_batch_size)
    if accelerator.is_main_process:
        result = {"model": config.model.path, "text": split, "sequence_length": length, **scores}
        write_json(config.output_dir / "result.json", result)
        print(describe(result))


if __name__ == "__main__":
    launch(main, config, exclusive=False)
