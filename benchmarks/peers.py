"""The same training written for hfkit, transformers' Trainer, Accelerate (as its examples do it) and bare PyTorch.

Each function builds its model and takes steps until the metronome stops it. All get the same weights, rows, batch,
AdamW settings, clipping and precision, and log every ten steps.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from hfkit.model import build_causal_lm
from hfkit.settings import ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from hfkit.tokenizer import train_tokenizer
from pairs import Tick

FOREVER = 1_000_000  # steps; the metronome ends every loop
OPTIM = OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.1)


@dataclass
class Task:
    """What is trained: a Llama of this shape on rows of random tokens, the same for every side."""

    shape: dict[str, Any]
    rows: int
    length: int
    compiled: bool = False
    precision: str = "fp32"
    device: str = "cpu"
    document: int | None = None
    """hfkit only: tokens of a document, which attention then does not leave; None packs none."""
    recompute: bool = False
    """hfkit only: activation checkpointing."""
    liger: bool = False
    """Trainer only: its use_liger_kernel."""
    kept: int = field(default=64, repr=False)
    """Batches that are drawn, and then repeated."""

    def build_model(self) -> PreTrainedModel:
        """Build the model on its device, with the same weights every time."""
        tokenizer = train_tokenizer(["the cat sat on the mat"], TokenizerConfig(vocab_size=300))
        with torch.device(self.device):
            return build_causal_lm(ModelConfig(preset="tiny", config_overrides=self.shape), tokenizer)

    @cached_property
    def tokens(self) -> np.ndarray:
        """(kept · rows · length + 1,) ids."""
        generator = np.random.default_rng(0)
        return generator.integers(6, self.shape["vocab_size"], self.kept * self.rows * self.length + 1)

    @property
    def documents(self) -> np.ndarray:
        """Lengths of the documents that the tokens are."""
        size = self.document or len(self.tokens)
        whole, rest = divmod(len(self.tokens), size)
        return np.array([size] * whole + [rest] * bool(rest))


class Rows(Dataset[dict[str, Tensor]]):
    """A task's rows, in order and again and again, as a data set with labels that the model shifts."""

    def __init__(self, task: Task) -> None:
        self.rows = torch.from_numpy(task.tokens[:-1].reshape(-1, task.length))
        self.size = FOREVER * task.rows

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index % len(self.rows)]
        return {"input_ids": row, "labels": row}


def run_hfkit(task: Task, tick: Tick) -> None:
    """hfkit's loop on its own shards, with progress bar, metrics file and trackers' line."""
    from hfkit.compilation import checkpoint_blocks, compile_blocks
    from hfkit.data.batches import Split, packed_rows
    from hfkit.data.shards import StreamWriter, TokenStream
    from hfkit.launch import build_accelerator, tune_process
    from hfkit.loop import Hooks, Loop, Progressed, Rhythm
    from hfkit.losses import CausalLMLoss
    from hfkit.optim import build_optimizer, build_schedule
    from hfkit.progress import Progress
    from hfkit.tracking import MetricsLog, Throughput

    tune_process()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = StreamWriter(folder, "train-0", task.shape["vocab_size"])
        writer.append(task.tokens, task.documents)
        writer.close()
        read = packed_rows(
            [TokenStream(folder, "train-0", task.shape["vocab_size"])],
            [1.0],
            task.length,
            Split(task.rows, task.rows),
            seed=0,
        )
        accelerator = build_accelerator(TrainConfig(precision=task.precision))
        module = CausalLMLoss(task.build_model())
        if task.recompute:
            checkpoint_blocks(module)
        module, optimizer = accelerator.prepare(module, build_optimizer(module, OPTIM))
        if task.compiled:
            compile_blocks(accelerator.unwrap_model(module))
        log, throughput, bar = MetricsLog(folder / "metrics.jsonl"), Throughput(), Progress(FOREVER, "train", "step")

        def advance(step: int, loss: float) -> None:
            bar.update(1, loss=loss)
            tick(loss)

        hooks = Hooks(log=lambda figures: log.write({**figures, "speed": throughput.read()}), advance=advance)
        schedule = build_schedule(OPTIM, FOREVER)
        Loop(accelerator, module, optimizer, read, schedule, Rhythm(FOREVER), Progressed(), hooks).run()


def run_bare(task: Task, tick: Tick) -> None:
    """The shortest loop in plain PyTorch."""
    model = task.build_model().train()
    forward = torch.compile(model) if task.compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, betas=(0.9, 0.95), fused=True)
    for batch in batches(task):
        with torch.autocast(task.device, torch.bfloat16, enabled=task.precision == "bf16"):
            loss = forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tick(loss)


def batches(task: Task) -> Iterator[dict[str, Tensor]]:
    """Yield the task's batches for ever."""
    rows = Rows(task).rows
    while True:
        for part in rows.split(task.rows):
            ids = part.to(task.device)
            yield {"input_ids": ids, "labels": ids}


def run_accelerate(task: Task, tick: Tick) -> None:
    """The loop of transformers' examples/pytorch/language-modeling/run_clm_no_trainer.py."""
    from accelerate import Accelerator
    from tqdm.auto import tqdm
    from transformers import default_data_collator, get_scheduler

    accelerator = Accelerator(
        cpu=task.device == "cpu", mixed_precision="no" if task.precision == "fp32" else task.precision
    )
    model = task.build_model()
    loader: Any = DataLoader(Rows(task), collate_fn=default_data_collator, batch_size=task.rows)
    no_decay = ["bias", "layer_norm.weight"]
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if any(word in n for word in no_decay) is bare],
            "weight_decay": 0.0 if bare else OPTIM.weight_decay,
        }
        for bare in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.learning_rate)
    scheduler = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=FOREVER)
    if task.compiled:
        model = torch.compile(model)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    bar = tqdm(range(FOREVER))
    total = torch.zeros((), device=task.device)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, use_cache=False).loss
            total += loss.detach().float()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        bar.update(1)
        tick(loss)


def run_trainer(task: Task, tick: Tick) -> None:
    """transformers' Trainer as its documentation sets it up."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class StepEnd(TrainerCallback):
        """Calls the metronome after each step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Count the step."""
            logged = [line["loss"] for line in state.log_history[-1:] if "loss" in line]
            tick(logged[0] if logged else None)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=FOREVER,
            per_device_train_batch_size=task.rows,
            learning_rate=OPTIM.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=OPTIM.weight_decay,
            adam_beta2=OPTIM.beta2,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=task.device == "cpu",
            bf16=task.precision == "bf16",
            torch_compile=task.compiled,
            use_liger_kernel=task.liger,
        )
        Trainer(task.build_model(), settings, train_dataset=Rows(task), callbacks=[StepEnd()]).train()


def run_litgpt(task: Task, tick: Tick) -> None:
    """The steps of litgpt's `pretrain.fit` on its own model code (pip install --no-deps litgpt lightning)."""
    import lightning
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    fabric = lightning.Fabric(
        accelerator=task.device, devices=1, precision="32-true" if task.precision == "fp32" else "bf16-mixed"
    )
    shape = Config(
        block_size=task.length,
        padded_vocab_size=task.shape["vocab_size"],
        n_layer=task.shape["num_hidden_layers"],
        n_head=task.shape["num_attention_heads"],
        n_query_groups=task.shape["num_key_value_heads"],
        n_embd=task.shape["hidden_size"],
        intermediate_size=task.shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model: Any = GPT(shape)  # its input and output embeddings are two matrices
    model = fabric.setup(torch.compile(model) if task.compiled else model)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.learning_rate, betas=(0.9, OPTIM.beta2), weight_decay=OPTIM.weight_decay
    )
    optimizer = fabric.setup_optimizers(optimizer)
    for number, batch in enumerate(batches(task), 1):
        ids = batch["input_ids"]
        loss = chunked_cross_entropy(model(ids[:, :-1].contiguous()), ids[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        tick(loss.item() if number % 10 == 0 else None)


def run_eager_trainer(task: Task, tick: Tick) -> None:
    """The Trainer without compile, beside sides that have it."""
    run_trainer(replace(task, compiled=False), tick)


PEERS = {
    "hfkit": run_hfkit,
    "trainer": run_trainer,
    "trainer-eager": run_eager_trainer,
    "accelerate": run_accelerate,
    "litgpt": run_litgpt,
    "bare": run_bare,
}
