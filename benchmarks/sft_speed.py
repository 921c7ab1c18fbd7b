"""Instruction tuning: passes over the same conversations, hfkit against TRL's SFTTrainer.

    pip install trl
    python benchmarks/sft_speed.py [--data conversations.jsonl.gz] [--conversations 256] [--pairs 5] [--packing]

Both train the same Llama of 9.3 M parameters from the same weights on what assistants say, AdamW, eight conversations a
step, none longer than 1,024 tokens (SFTTrainer's defaults, but for gradient checkpointing, which would slow it down).
hfkit packs as many conversations into rows that hold as many tokens; TRL pads each batch to its longest conversation,
which is its default (`--packing` turns its packing on). A step of the figures is a whole pass.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
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
from results import FOLDER, save_result
from train_speed import SMALL

LENGTH, AT_ONCE = 1024, 8  # tokens of a conversation at most; conversations of a step
Source = tuple[str | None, int]


def load(source: Source) -> tuple[Any, list[Any], Any]:
    """Return tokenizer, conversations and model: the same on every side."""
    from hfkit.model import build_causal_lm

    path, count = source
    config = ChatDataConfig(train_files=path, sequence_length=LENGTH)
    texts = load_texts(config, read_conversations, builtin_conversations)
    contents = [message["content"] for conversation in texts.train for message in conversation.messages]
    tokenizer = chat_tokenizer(config, ModelConfig(), TokenizerConfig(vocab_size=SMALL["vocab_size"]), contents)
    model = build_causal_lm(ModelConfig(preset="tiny", config_overrides=SMALL), tokenizer)
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
    tokens_a_step = AT_ONCE * sum(len(each.ids) for each in data.train) / len(data.train)
    length = LENGTH if tokens_a_step > LENGTH else 256
    rows = max(1, round(tokens_a_step / length))
    packed = PackedChat(data.train, length)
    steps = -(-packed.num_rows // rows)
    accelerator = build_accelerator(TrainConfig(precision="fp32"))
    module = CausalLMLoss(model)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, OPTIM))
    hooks = Hooks(advance=lambda step, loss: tick(loss) if step % steps == 0 else None)
    schedule, rhythm = build_schedule(OPTIM, FOREVER), Rhythm(FOREVER)
    a_pass = packed.reader(Split(rows, rows), last=packed.num_rows)
    Loop(accelerator, module, optimizer, lambda n: a_pass(n % steps), schedule, rhythm, Progressed(), hooks).run()


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
            per_device_train_batch_size=AT_ONCE,
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
    path = FOLDER / "sft_speed.json"
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
    data = Path(options.data).parent.name if options.data else "built-in"
    name = f"{data}, TRL {'packs' if options.packing else 'pads'}"
    kept = {key: value for key, value in earlier.items() if ", TRL " in key}
    save_result("sft_speed", {**kept, name: {**about, **figures}})


if __name__ == "__main__":
    main()
