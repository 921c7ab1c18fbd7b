"""Pretrain a causal language model: text → tokens → model → loop → perplexity → a folder that anyone can load.

python recipes/pretrain.py                                            the built-in corpus, minutes on a CPU
accelerate launch recipes/pretrain.py --config recipes/configs/pretrain/wikitext2.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml recipes/pretrain.py --data.train_files 'corpus/*.jsonl'
"""

from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import DataConfig, GenerationSettings, RunConfig


@dataclass
class PretrainConfig(RunConfig):
    """Pretrain a causal language model from scratch, or go on with one."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which text, and how it is cleaned, deduplicated and packed."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How samples are drawn."""
    output_dir: Path = Path("runs/pretrain")
    """Checkpoints, figures, report and the final model."""


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(PretrainConfig)

from torch import nn

from hfkit.data.batches import packed_rows, plan_steps
from hfkit.data.prepare import prepare_data
from hfkit.evaluation import first_words, score_held_out
from hfkit.facts import Facts
from hfkit.generation import continue_prompts
from hfkit.launch import launch
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm, check_isolation, positions_of, set_length
from hfkit.remote import resolve_model
from hfkit.run import NOTHING_HELD_OUT, Run


def main(config: PretrainConfig) -> None:
    """Run the whole story, on every process that was launched."""
    base = resolve_model(config.model.path, config.model.revision) if config.model.path else None
    data = prepare_data(config.data, config.tokenizer, tokenizer_path=base)
    run = Run(config, Facts.of(data))
    length = config.data.sequence_length
    if data.validation is None:
        run.say(NOTHING_HELD_OUT)

    model = build_causal_lm(config.model, data.tokenizer, config.seed)
    set_length(model.config, length)
    check_isolation(model, length)

    rows = sum(stream.num_rows(length) for stream in data.train)
    plan = plan_steps(config.train, rows, length, run.rank, run.world_size)
    run.set_up(CausalLMLoss(model, z_loss=config.optim.z_loss), config.optim, plan, data.tokenizer)

    def evaluate(module: nn.Module) -> dict[str, float]:
        return score_held_out(run.accelerator, module, data, length)

    def sample(module: nn.Module, step: int) -> None:
        stream = data.validation or data.train[0]
        prompts = first_words(data.tokenizer, stream, positions=positions_of(model.config))
        if not prompts:
            return
        texts = continue_prompts(module.model, data.tokenizer, prompts, config.generation, config.seed)
        run.write_samples(step, prompts, texts)

    run.train(packed_rows(data.train, data.weights, length, plan.split, config.seed, last=plan.last), evaluate, sample)
    run.choose_result(evaluate)
    run.finish(evaluate, sample, extra=None if data.validation else {"evaluated_on": "train"})


if __name__ == "__main__":
    launch(main, config)
