"""Fine-tune a causal model on instructions or conversations: it learns what the assistant says, and to stop.

    python recipes/sft.py                                         the built-in conversations, a tiny model from scratch
    python recipes/sft.py --model.path runs/pretrain/model --data.train_files 'chats/*.jsonl'
    python recipes/sft.py --model.path runs/pretrain/model --data.train_files instructions.jsonl --adapter.rank 16

Exactly the assistant's tokens and the token that ends its turn carry loss. Whole conversations share a row and do not
see each other. `model/` ends its answers by itself and carries the chat template: `recipes/chat.py` talks to it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import (
    AdapterConfig,
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
class SftConfig(RunConfig):
    """Fine-tune a causal model on instructions or conversations."""

    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    """Which conversations."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="tiny"))
    """`model.path`: what to go on from; without it a preset from scratch."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocab_size=4096))
    """The one named by `path`, else that of the model to go on from, else one trained on the texts."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA instead of training every weight; merged into model/, and kept beside it in adapter/."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    """Optimizer and learning-rate schedule."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_steps=200, global_batch_size=8, eval_every=100))
    """Steps, batch sizes, evaluation, checkpoints."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training (NEFTune; 5 is usual); 0 is none."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary while training."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How answers are drawn; temperature, top_k, top_p, min_p and repetition_penalty are saved in `model/` too."""
    output_dir: Path = Path("runs/sft")
    """Checkpoints, figures, report and the final model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, label_smoothing="[0, 1)", neftune_alpha="[0, inf)")


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(SftConfig)

from torch import nn

from hfkit.adapters import add_embedding_noise, attach_adapter, save_adapter
from hfkit.chat import ChatFormat
from hfkit.data.batches import plan_steps
from hfkit.data.builtin_chat import builtin_conversations
from hfkit.data.conversations import PackedChat, chat_tokenizer, load_conversations, load_texts, read_conversations
from hfkit.facts import Facts
from hfkit.launch import launch
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm, check_isolation, set_length
from hfkit.replies import answer, answer_by_default, end_turns_at, ended_share, questions, score_replies
from hfkit.run import NOTHING_HELD_OUT, Run
from hfkit.tokenizer import tokenizer_hash

NUM_ANSWERS, NUM_SHOWN = 48, 3  # answers drawn at the end to see whether they end; those shown each time


def main(config: SftConfig) -> None:
    """Run the whole story, on every process that was launched."""
    texts = load_texts(config.data, read_conversations, builtin_conversations)
    contents = (message["content"] for conversation in texts.train for message in conversation.messages)
    tokenizer = chat_tokenizer(config.data, config.model, config.tokenizer, contents)
    chat = ChatFormat(tokenizer)
    data = load_conversations(config.data, chat, texts)
    identity = {"label_smoothing": config.label_smoothing, "neftune_alpha": config.neftune_alpha}
    hashed = tokenizer_hash(tokenizer)
    facts = {"key": data.key, **data.facts}
    run = Run(config, Facts(data.key, hashed, identity, facts, {"sha256": hashed}, audit=facts))

    length = config.data.sequence_length
    model = build_causal_lm(config.model, tokenizer, config.seed)
    end_turns_at(model, chat.end_id)
    answer_by_default(model, config.generation)
    set_length(model.config, length)
    check_isolation(model, length)
    attach_adapter(model, config.adapter)
    if config.neftune_alpha:
        add_embedding_noise(model, config.neftune_alpha)

    packed = PackedChat(data.train, length, config.seed)
    held_out = PackedChat(data.validation or data.train, length)
    left_out = sum(data.facts["removed"].values())
    run.say(
        f"{len(data.train)} conversations in {packed.num_rows} rows of {length} tokens, {packed.useful_share:.1%} of "
        f"them in use; {data.facts['cut_at_a_turn']} cut after a turn, {left_out} left out."
    )
    if not data.validation:
        run.say(NOTHING_HELD_OUT)
    plan = plan_steps(config.train, packed.num_rows, length, run.rank, run.world_size)
    loss = CausalLMLoss(model, config.label_smoothing, config.optim.z_loss)
    run.set_up(loss, config.optim, plan, tokenizer)
    asked = [talk for talk in questions(data.held_out or texts.train, NUM_ANSWERS) if len(chat.prompt(talk)) < length]

    def evaluate(module: nn.Module) -> dict[str, float]:
        scores = score_replies(run.accelerator, module, held_out, chat.end_id)
        if run.progress.step == plan.max_steps and asked:
            scores["ended_share"] = ended_share(answer(model, chat, asked, config.generation, config.seed))
        return scores

    def sample(module: nn.Module, step: int) -> None:
        shown = asked[:NUM_SHOWN]
        answers = answer(model, chat, shown, config.generation, config.seed)
        run.write_samples(step, [messages[-1]["content"] for messages in shown], [each.text for each in answers])

    run.train(packed.reader(plan.split, plan.last), evaluate, sample, evaluate_first=True)
    run.choose_result(evaluate)
    if config.adapter.rank and run.is_main:
        save_adapter(model, config.output_dir / "adapter")
    run.finish(evaluate, sample)


if __name__ == "__main__":
    launch(main, config)
