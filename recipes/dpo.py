"""Teach a chat model which of two answers is the better one (DPO), without a reward model.

    python recipes/dpo.py --model.path runs/sft/model                             the built-in pairs
    python recipes/dpo.py --model.path runs/sft/model --data.train_files pairs.jsonl --beta 0.1

Rows hold `prompt`, `chosen` and `rejected`. The model before training is the reference: how probable it finds every
answer is computed once, at the start.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import (
    AdapterConfig,
    BadInput,
    ChatDataConfig,
    GenerationSettings,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
    check_bounds,
)


@dataclass
class DpoConfig(RunConfig):
    """Teach a chat model which of two answers is the better one."""

    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    """Which pairs."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="tiny"))
    """`model.path`: a model fine-tuned by `sft.py`, which is the reference too."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocab_size=4096))
    """The one named by `path`, else that of the model to go on from, else one trained on the texts."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA instead of training every weight; merged into model/, and kept beside it in adapter/."""
    beta: float = 0.1
    """How closely the model stays to the reference (the larger the closer; at 0 nothing is learnt)."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-4, weight_decay=0.0))
    """Optimizer and learning-rate schedule."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_steps=100, global_batch_size=8, eval_every=50))
    """Steps, batch sizes (in pairs), evaluation, checkpoints."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How answers are drawn; temperature, top_k, top_p, min_p and repetition_penalty are saved in `model/` too."""
    output_dir: Path = Path("runs/dpo")
    """Checkpoints, figures, report and the final model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, beta="[0, inf)")
        if self.optim.z_loss:
            raise BadInput("optim.z_loss is for losses over the vocabulary, and DPO's is not one; leave it out")


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(DpoConfig)

from itertools import islice

from torch import nn

from hfkit.adapters import attach_adapter, save_adapter
from hfkit.chat import ChatFormat
from hfkit.data.batches import plan_steps
from hfkit.data.builtin_chat import builtin_preferences
from hfkit.data.conversations import chat_tokenizer, load_texts
from hfkit.data.preferences import encode_pairs, read_pairs
from hfkit.facts import Facts
from hfkit.files import digest_of
from hfkit.launch import launch
from hfkit.model import build_causal_lm, set_length
from hfkit.preference import PreferenceLoss, PreferencePairs, score_preferences
from hfkit.replies import answer, answer_by_default, end_turns_at
from hfkit.run import NOTHING_HELD_OUT, Run
from hfkit.tokenizer import tokenizer_hash

NUM_SHOWN = 3  # answers shown after training


def main(config: DpoConfig) -> None:
    """Run the whole story, on every process that was launched."""
    texts = load_texts(config.data, read_pairs, builtin_preferences)
    contents = (text for pair in texts.train for text in (pair.asked[-1]["content"], pair.chosen, pair.rejected))
    tokenizer = chat_tokenizer(config.data, config.model, config.tokenizer, contents)
    chat, length = ChatFormat(tokenizer), config.data.sequence_length
    pairs = PreferencePairs(encode_pairs(chat, texts.train, length + 1))
    held_out = PreferencePairs(encode_pairs(chat, texts.validation or texts.train, length + 1))
    if not pairs.pairs or not held_out.pairs:
        raise BadInput(f"no pair fits data.sequence_length {length}; raise it")
    key = digest_of([pairs.digest(), held_out.digest()])
    validation = len(held_out.pairs) if texts.validation else 0
    facts = {"key": key, "splits": {"train": len(pairs.pairs), "validation": validation}}
    hashed = tokenizer_hash(tokenizer)
    run = Run(config, Facts(key, hashed, {"beta": config.beta}, facts, {"sha256": hashed}))
    run.say(f"{len(pairs.pairs)} pairs to train on, {validation} held out." if validation else NOTHING_HELD_OUT)

    model = build_causal_lm(config.model, tokenizer, config.seed)
    end_turns_at(model, chat.end_id)
    answer_by_default(model, config.generation)
    set_length(model.config, length)
    attach_adapter(model, config.adapter)  # before the reference speaks: quantised weights are its weights too
    for part in (pairs, held_out):
        part.compute_reference(run.accelerator, model)

    plan = plan_steps(config.train, len(pairs.pairs), length, run.rank, run.world_size)
    run.set_up(PreferenceLoss(model, config.beta), config.optim, plan, tokenizer)

    def evaluate(module: nn.Module) -> dict[str, float]:
        return score_preferences(run.accelerator, module, held_out)

    def sample(module: nn.Module, step: int) -> None:
        fitting = (pair.asked for pair in texts.validation or texts.train if len(chat.prompt(pair.asked)) < length)
        asked = list(islice(fitting, NUM_SHOWN))
        answers = answer(model, chat, asked, config.generation, config.seed)
        run.write_samples(step, [messages[-1]["content"] for messages in asked], [each.text for each in answers])

    run.train(pairs.reader(plan.split, config.seed, plan.last), evaluate, sample, evaluate_first=True)
    run.choose_result(evaluate)
    if config.adapter.rank and run.is_main:
        save_adapter(model, config.output_dir / "adapter")
    run.finish(evaluate, sample)


if __name__ == "__main__":
    launch(main, config)
