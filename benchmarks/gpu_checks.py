"""Whether training on this device is right: what ``gpu.py`` runs before it measures anything.

Each check returns figures with ``ok``. On a CPU the same code compares the CPU with itself, which tests the checks.
"""

import copy
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from hfkit.attention import block_mask, isolation_mask
from hfkit.checkpoint import restore_model, restore_optimizer, save_checkpoint, state_writers
from hfkit.compilation import compile_blocks
from hfkit.data.batches import Batch, Step
from hfkit.launch import build_accelerator
from hfkit.loop import train_step
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm
from hfkit.optim import build_optimizer
from hfkit.settings import ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from hfkit.tokenizer import train_tokenizer

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1024,
}
ROWS, LENGTH = 4, 256
OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=0)


def start_anew() -> None:
    """Forget Accelerate's state and what was compiled, so that the next part may have another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()
    torch._dynamo.reset()


def draw_batch(step: int, documents: bool = False) -> Batch:
    """Return rows in which each token is mostly the one before plus one, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(SHAPE["vocab_size"], (ROWS, 1), generator=generator)
    noise = torch.randint(SHAPE["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
    keep = torch.rand(ROWS, LENGTH + 1, generator=generator) < 0.8
    ids = torch.where(keep, (start + torch.arange(LENGTH + 1)) % SHAPE["vocab_size"], noise)
    batch = {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    if documents:
        batch["position_ids"] = (torch.arange(LENGTH) % 96).expand(ROWS, -1).contiguous()
    return batch


class Trainee:
    """A small model with its optimizer on one device, which takes hfkit's own training steps."""

    def __init__(self, precision: str, compiled: bool, cpu: bool = False) -> None:
        start_anew()
        self.accelerator = Accelerator(cpu=True) if cpu else build_accelerator(TrainConfig(precision=precision))
        tokenizer = train_tokenizer(["the cat sat on the mat"], TokenizerConfig(vocab_size=300))
        module = CausalLMLoss(build_causal_lm(ModelConfig(preset="tiny", config_overrides=SHAPE), tokenizer))
        self.module, self.optimizer = self.accelerator.prepare(module, build_optimizer(module, OPTIM))
        self.module.train()
        if compiled:
            compile_blocks(self.accelerator.unwrap_model(self.module))

    def step(self, number: int, documents: bool = False) -> float:
        """Take one step and return its loss per target."""
        targets = ROWS * LENGTH
        vector = train_step(
            self.accelerator,
            self.module,
            self.optimizer,
            Step([draw_batch(number, documents)], targets, targets),
            number=number,
            seed=0,
            max_grad_norm=1.0,
            parameters=list(self.module.parameters()),
        )
        return vector[0].item() / targets

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that Accelerate wraps."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def check_losses(steps: int = 5) -> dict[str, Any]:
    """Compare fp32 losses of compiled training on this device with those of eager training on the CPU."""
    with full_fp32():
        trainee = Trainee("fp32", compiled=True)
        losses = [trainee.step(number) for number in range(steps)]
        judge = Trainee("fp32", compiled=False, cpu=True)
        expected = [judge.step(number) for number in range(steps)]
    gap = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    return {"relative_gap": gap, "ok": gap <= 1e-4}


def check_precision(precision: str, steps: int = 200) -> dict[str, Any]:
    """Compare the mean loss of the last tenth of a run in ``precision`` with that in fp32."""
    means = []
    for name in ("fp32", precision):
        trainee = Trainee(name, compiled=True)
        losses = [trainee.step(number) for number in range(steps)]
        means.append(sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :]))
    gap = abs(means[1] - means[0]) / means[0]
    return {"fp32_loss": round(means[0], 4), "loss": round(means[1], 4), "relative_gap": gap, "ok": gap <= 0.02}


def check_resume(precision: str, steps: int = 3) -> dict[str, Any]:
    """Save, restore into a fresh model, and see that the steps after it lose the same to the last bit.

    Kernels must be deterministic for that, which flash attention's backward pass is only when asked.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return _compare_resumed(precision, steps)
    finally:
        torch.use_deterministic_algorithms(False)


def _compare_resumed(precision: str, steps: int) -> dict[str, Any]:
    first = Trainee(precision, compiled=True)
    for number in range(steps):
        first.step(number)
    with tempfile.TemporaryDirectory() as folder:
        model = first.accelerator.unwrap_model(first.module).model
        saved = save_checkpoint(Path(folder), steps, state_writers(model, first.inner_optimizer), {})
        scaler = copy.deepcopy(first.accelerator.scaler.state_dict()) if first.accelerator.scaler else None
        expected = [first.step(number) for number in range(steps, 2 * steps)]
        second = Trainee(precision, compiled=True)
        model = second.accelerator.unwrap_model(second.module).model
        restore_model(saved, model)
        restore_optimizer(saved, model, second.inner_optimizer)
        if scaler:
            second.accelerator.scaler.load_state_dict(scaler)
    losses = [second.step(number) for number in range(steps, 2 * steps)]
    return {"losses": losses, "expected": expected, "ok": losses == expected}


def check_graph() -> dict[str, Any]:
    """Capture the compiled graphs and count attention calls, and those of them that are given a mask."""
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_with = torch.compile
    torch.compile = functools.partial(compile_with, backend=capture, fullgraph=True)  # type: ignore[assignment]
    try:
        trainee = Trainee("auto", compiled=True)
        trainee.step(0)
    finally:
        torch.compile = compile_with
    calls = [n for g in graphs for n in g.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    masked = [n for n in calls if n.kwargs.get("attn_mask") is not None or not n.kwargs.get("is_causal")]
    rotary: Any = trainee.accelerator.unwrap_model(trainee.module).model.model.rotary_emb
    fine = len(calls) == 1 and not masked and rotary.inv_freq.dtype == torch.float32
    return {"graphs": len(graphs), "attention_calls": len(calls), "masked": len(masked), "ok": fine}


def check_isolation() -> dict[str, Any]:
    """Compare the loss and gradients of packed documents under the device's isolation with those under a dense mask."""
    trainee = Trainee("fp32", compiled=False)
    module: nn.Module = trainee.accelerator.unwrap_model(trainee.module)
    device = trainee.accelerator.device
    batch = {name: value.to(device) for name, value in draw_batch(0, documents=True).items()}
    positions = batch.pop("position_ids")
    results = []
    with full_fp32():
        for mask in (isolation_mask(positions, module.model.config._attn_implementation), _dense(positions)):
            module.zero_grad()
            hidden = module.model.base_model(
                input_ids=batch["input_ids"], position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            # Their own squares would not do: the last norm makes their sum a constant, and the gradients rounding.
            factors = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(device)
            (hidden * factors).sum().backward()
            results.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    gap = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    blocks = block_mask((positions == 0).cumsum(-1), compiled=device.type == "cuda")
    return {"relative_gap": gap, "share_of_blocks_skipped": round(blocks.sparsity() / 100, 3), "ok": gap <= 1e-3}


def _dense(positions: Tensor) -> Tensor:
    mask = isolation_mask(positions, "sdpa")
    assert isinstance(mask, Tensor)
    return mask


def name_kernels(documents: bool) -> dict[str, Any]:
    """Profile one step and name the kernels that attention ran."""
    trainee = Trainee("auto", compiled=True)
    cuda = trainee.accelerator.device.type == "cuda"
    for number in range(2):
        trainee.step(number, documents)
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        trainee.step(2, documents)
    words = ("flash", "fmha", "cudnn", "flex", "attention", "sdpa")
    names = {event.key for event in profile.key_averages() if any(word in event.key.lower() for word in words)}
    return {"kernels": sorted(name[:80] for name in names), "ok": bool(names)}
