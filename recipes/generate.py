"""Continue prompts with any causal model.

    python recipes/generate.py --model.path runs/pretrain/model --prompt "Once upon a time"
    python recipes/generate.py --model.path gpt2 --prompt_file prompts.txt --output_file continued.jsonl
    echo "Once upon a time" | python recipes/generate.py --model.path gpt2 --generation.temperature 0

One prompt with one sample is printed as it is made; more are generated in batches. Speed goes to stderr.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import SEEDS, BadInput, GenerationSettings, ModelConfig, check_bounds


@dataclass
class GenerateConfig:
    """Continue prompts with a causal model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """`model.path`: a folder or Hub id."""
    prompt: str | None = None
    """What to continue; null reads prompt_file, else standard input, one prompt a line."""
    prompt_file: Path | None = None
    """Prompts: a text file with one a line, or .jsonl, .csv or .parquet with a column `prompt`."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How to sample."""
    batch_size: int = 32
    """Prompts generated from at once: 32 take twice the time of 8, on a CPU less (`docs/log.md`). Which texts the seed
    draws depends on it; greedy ones do not."""
    output_file: Path | None = None
    """Write JSON lines (prompt, text, tokens, finish) here instead of text to standard output; - is standard output."""
    output_dir: Path = Path("runs/generate")
    """Where status.json goes."""
    seed: int = 0
    """Decides what is sampled."""

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise BadInput("which model? Give --model.path a folder or a Hub id")
        if self.prompt is not None and self.prompt_file is not None:
            raise BadInput("give --prompt or --prompt_file, not both")
        check_bounds("", self, batch_size="[1, inf)", seed=SEEDS)


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(GenerateConfig)

from hfkit.data.listing import list_files
from hfkit.data.readers import ROW_FORMATS, read_rows, split_name, text_lines, text_of
from hfkit.files import make_parent, write_atomic
from hfkit.generation import Completion, complete, encode_prompts, room_after, stream, tokens_per_second
from hfkit.launch import launch
from hfkit.model import load_causal_lm
from hfkit.tokenizer import load_tokenizer


def main(config: GenerateConfig) -> None:
    """Load, continue, print."""
    if config.output_file is not None and str(config.output_file) != "-":
        make_parent(config.output_file, "output_file")
    prompts = read_prompts(config)
    tokenizer = load_tokenizer(str(config.model.path), config.model.revision)
    model = load_causal_lm(config.model)
    encoded = encode_prompts(tokenizer, prompts)
    for number, ids in enumerate(encoded, 1):  # before the first batch, not after it
        room_after(model, len(ids), f"prompt {number}")
    begin = time.perf_counter()
    if len(prompts) == config.generation.num_samples == 1 and config.output_file is None:
        print(prompts[0], end="")
        completions = [stream(model, tokenizer, encoded[0], config.generation, config.seed, show)]
        print()
    else:
        completions = []
        for start in range(0, len(prompts), config.batch_size):
            part = encoded[start : start + config.batch_size]
            completions += complete(model, tokenizer, part, config.generation, config.seed + start)
        write_out(config.output_file, prompts, completions)
    print(tokens_per_second(completions, begin), file=sys.stderr)


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts from the flag, the file or standard input."""
    if config.prompt is not None:
        return [config.prompt]
    if config.prompt_file is None:
        prompts = list(text_lines(None))
    elif split_name(config.prompt_file)[0] in ROW_FORMATS:
        paths = list_files(str(config.prompt_file), "prompt_file", ROW_FORMATS)
        prompts = [text_of(row, "prompt", flag="") for path in paths for row in read_rows(path)]
    elif config.prompt_file.is_file():
        prompts = list(text_lines(config.prompt_file))
    else:
        raise BadInput(f"prompt_file {config.prompt_file} does not exist")
    if not prompts:
        raise BadInput("there is no prompt; give --prompt, --prompt_file or lines on standard input")
    return prompts


def show(piece: str) -> None:
    """Print a piece of text at once."""
    print(piece, end="", flush=True)


def write_out(path: Path | None, prompts: list[str], completions: list[Completion]) -> None:
    """Print the texts, or write them with their figures as JSON lines."""
    samples = len(completions) // len(prompts)
    pairs = [(prompts[number // samples], completion) for number, completion in enumerate(completions)]
    if path is None:
        print("\n".join(prompt + completion.text for prompt, completion in pairs))
        return
    lines = (json.dumps({"prompt": p, **asdict(c)}, ensure_ascii=False) + "\n" for p, c in pairs)
    if str(path) == "-":
        sys.stdout.writelines(lines)
    else:
        write_atomic(path, "".join(lines))


if __name__ == "__main__":
    launch(main, config, exclusive=False)
