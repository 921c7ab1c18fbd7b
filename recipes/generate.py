"""Continue prompts with any causal model.

python recipes/generate.py --model.path runs/pretrain/model --prompt "Once upon a time"
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import BadInput, GenerationSettings, ModelConfig


@dataclass
class GenerateConfig:
    """Continue prompts with a causal model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """`model.path`: a folder or Hub id."""
    prompt: str | None = None
    """What to continue; null reads standard input, one prompt a line."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How to sample."""
    output_dir: Path = Path("runs/generate")
    """Where status.json goes."""
    seed: int = 0
    """Decides what is sampled."""

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise BadInput("which model? Give --model.path a folder or a Hub id")


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(GenerateConfig)

from hfkit.generation import continue_prompts
from hfkit.launch import launch
from hfkit.model import load_causal_lm
from hfkit.tokenizer import load_tokenizer


def main(config: GenerateConfig) -> None:
    """Load, continue, print."""
    tokenizer = load_tokenizer(config.model.path)
    model = load_causal_lm(config.model)
    prompts = [config.prompt] if config.prompt is not None else [line.rstrip("\n") for line in sys.stdin]
    for prompt, text in zip(
        prompts, continue_prompts(model, tokenizer, prompts, config.generation, config.seed), strict=True
    ):
        print(prompt + text)


if __name__ == "__main__":
    launch(main, config)
