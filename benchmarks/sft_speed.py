"""Instruction tuning: passes over the same conversations, hfkit against TRL's SFTTrainer.

    pip install trl
    python benchmarks/sft_speed.py [--data conversations.jsonl.gz] [--conversations 256] [--pairs 5]

Both train the same small Llama from the same weights on what assistants say, AdamW, batches of eight. hfkit packs
conversations into rows of 256 tokens that do not see each other; TRL pads each batch to its longest conversation, which
is its default (`--packing` turns its packing on). A step of the figures is a whole pass.
"""

import argparse
import os
import tempfile
from functools import partial
from typing import Any

from hfkit.chat import ChatFormat
from hfkit.data.builtin_chat import builtin_conversations
from hfkit.data.conversations import (
    PackedChat,
    Texts,
    chat_tokenizer,
    load_conversations,
    load_texts,
    read_conversations,
)
from hfkit.settings import ChatDataConfig, ModelConfig, TokenizerConfig
from pairs import Tick, alternate, summarise
from peers import FOREVER, OPTIM
from results import save_result

LENGTH, ROWS, VOCABULARY = 256, 8, 4096
Source = tuple[str | None, int]


def load(source: Source) -> tuple[Any, list[Any], Any]:
    """Return tokenizer, conversations and model: the same on every side."""
    from hfkit.model import build_causal_lm

    path, count = source
    config = ChatDataConfig(train_files=path, sequence_length=LENGTH)
    texts = load_texts(config, read_conversations, builtin_conversations)
    contents = [message["content"] for conversation in texts.train for message in conversation.messages]
    tokenizer = chat_tokenizer(config, ModelConfig(), TokenizerConfig(vocab_size=VOCABULARY), contents)
    model = build_causal_lm(ModelConfig(preset="mini"), tokenizer)
    return tokenizer, texts.train[:count], model


def run_hfkit(source: Source, tick: Tick) -> None:
    """Packed rows through hfkit's loop."""
    from hfkit.data.batches import Split
    from hfkit.launch import build_accelerator, tune_process
    from hfkit.loop import Hooks, Loop, Progressed, Rhythm
    from hfkit.losses import CausalLMLoss
    from hfkit.optim import build_optimizer, build_schedule
    from hfkit.settings import TrainConfig

    tune_process()
    tokenizer, conversations, model = load(source)
    texts = Texts(conversations, [], 0)
    data = load_conversations(ChatDataConfig(sequence_length=LENGTH), ChatFormat(tokenizer), texts)
    packed = PackedChat(data.train, LENGTH)
    steps = -(-packed.num_rows // ROWS)
    accelerator = build_accelerator(TrainConfig(precision="fp32"))
    module = CausalLMLoss(model)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, OPTIM))
    hooks = Hooks(advance=lambda step, loss: tick(loss) if step % steps == 0 else None)
    read, schedule = packed.reader(Split(ROWS, ROWS)), build_schedule(OPTIM, FOREVER)
    Loop(accelerator, module, optimizer, read, schedule, Rhythm(FOREVER), Progressed(), hooks).run()


def run_trl(source: Source, packing: bool, tick: Tick) -> None:
    """SFTTrainer as its documentation sets it up, with the loss on assistants' tokens."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class PassEnd(TrainerCallback):
        """Calls the metronome after each pass over the data."""

        def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Count the pass."""
            logged = [line["loss"] for line in state.log_history[-1:] if "loss" in line]
            tick(logged[0] if logged else None)

    tokenizer, conversations, model = load(source)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=10_000,
            per_device_train_batch_size=ROWS,
            learning_rate=OPTIM.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=OPTIM.weight_decay,
            max_grad_norm=1.0,
            max_length=LENGTH,
            packing=packing,
            assistant_only_loss=True,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        rows = Dataset.from_list([{"messages": conversation.messages} for conversation in conversations])
        SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[PassEnd()]).train()


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--packing", action="store_true")
    options = parser.parse_args()
    source = (options.data, options.conversations)
    sides = {"hfkit": partial(run_hfkit, source), "trl": partial(run_trl, source, options.packing)}
    load_before = round(os.getloadavg()[0], 1)
    figures = summarise(alternate(sides, options.pairs, 1, warm_up=1), 1)
    about = {"pairs": options.pairs, "conversations": options.conversations, "load_before": load_before}
    save_result("sft_speed", {**about, "trl_packs": options.packing, **figures})


if __name__ == "__main__":
    main()
