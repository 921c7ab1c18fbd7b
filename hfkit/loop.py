"""The training loop: optimizer steps, with evaluation and checkpoints between them.

The loop knows nothing of tasks. What to read at a step, how to score it, the learning rate, evaluation and saving
arrive as functions, so that pretraining, instruction tuning, sentiment and translation share it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfkit.data.batches import Batch, Reader, Step
from hfkit.optim import Schedule, set_learning_rate

MAX_SCALER_SKIPS = 20  # fp16 steps retried in a row before overflow counts as divergence


class Diverged(Exception):
    """Loss or gradient is not finite: the update was suppressed and the last checkpoint is good."""


class Preempted(BaseException):
    """Asked to stop by a signal; the state is saved. Not an Exception: no library's broad ``except`` may swallow it."""


@dataclass
class Window:
    """Sums since the last training line of metrics.jsonl."""

    loss: float = 0.0
    targets: float = 0.0
    tokens: int = 0

    def add(self, loss: float, step: Step) -> None:
        """Add one step's summed loss."""
        self.loss += loss
        self.targets += step.targets
        self.tokens += step.tokens


@dataclass
class Progressed:
    """What a run has done: saved with a checkpoint, so that counts go on over resumes."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None
    logged_at: float = 0.0
    """Training seconds at the last training line of metrics.jsonl."""
    joules: float = 0.0
    """Energy, as far as the devices report it."""
    window: Window = field(default_factory=Window)

    def __post_init__(self) -> None:
        if isinstance(self.window, dict):  # as a manifest's JSON gives it back
            self.window = Window(**self.window)


@dataclass
class Measured:
    """One step's figures, still on the device: reading them waits for it."""

    step: Step
    vector: Tensor  # (3,) summed loss over all processes, gradient norm, processes that were asked to stop
    learning_rate: float
    event: torch.cuda.Event | None = None

    def read(self) -> tuple[float, float, bool]:
        """Return (summed loss, gradient norm, whether to stop)."""
        if self.event is not None:
            self.event.synchronize()
        loss, norm, stop = self.vector.tolist()
        return loss, norm, stop > 0


def seed_step(seed: int, rank: int, step: int, micro_batch: int) -> None:
    """Set the random numbers of one forward pass, so that dropout needs no saved state.

    The four numbers are spread over 64 bits by SplitMix64's increment and finaliser.
    """
    word = 0
    for number in (seed, rank, step, micro_batch):
        word = (word + number + 1) * 0x9E3779B97F4A7C15 % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word ^= word >> 31
    torch.default_generator.manual_seed(word)  # torch.manual_seed also asks for every absent device: 0.5 ms a call
    if torch.cuda.is_available():
        torch.cuda.manual_seed(word)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    *,
    number: int,
    seed: int,
    max_grad_norm: float,
    parameters: Sequence[nn.Parameter],
    stop: bool = False,
) -> Tensor:
    """Take one optimizer step on the mean loss per target over every process and micro-batch.

    Forward, loss, backward, clip, update: the six steps of training end here. An update with a non-finite gradient is
    suppressed.

    Args:
        model: Returns (summed loss in nats, number of targets) for a micro-batch; may be wrapped by DDP or FSDP.
        step: This process's micro-batches, and the number of targets over all processes.
        parameters: The model's, listed once.

    Returns:
        (3,) on the device: summed loss over all processes, gradient norm before clipping, processes asked to stop.
    """
    # DDP and FSDP average gradients over processes; multiplying by their number turns that mean into the sum we want.
    scale = accelerator.num_processes / max(step.targets, 1e-9)
    inner: Any = getattr(model, "module", model)  # inside DDP
    inner.upstream = scale * loss_scale(accelerator)

    summed = torch.zeros((), device=accelerator.device)
    last = len(step.micro_batches) - 1
    for index, batch in enumerate(step.micro_batches):
        seed_step(seed, accelerator.process_index, number, index)
        with nullcontext() if index == last else accelerator.no_sync(model):  # one all-reduce a step
            loss, _ = model(**to_device(batch, accelerator.device))
            # A loss that is not finite makes every gradient NaN (0 · inf), so that the update is suppressed with it.
            scaled = loss * (scale + 0 * loss.detach())
            # Accelerate's backward looks for every optional engine first: 0.5 ms a call that only a scaler is worth.
            accelerator.backward(scaled) if accelerator.scaler else scaled.backward()
        summed += loss.detach()

    if accelerator.scaler:
        accelerator.unscale_gradients(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    _update(accelerator, optimizer, grad_norm)
    _inside(optimizer).zero_grad(set_to_none=True)
    vector = torch.stack([summed, grad_norm.float(), summed.new_full((), float(stop))])  # a fill: no copy to wait for
    if accelerator.num_processes > 1:
        vector[1] /= accelerator.num_processes  # the norm is the same everywhere: it is summed with the rest
        vector = accelerator.reduce(vector, "sum")
    return vector


def loss_scale(accelerator: Accelerator) -> float:
    """Return what fp16 multiplies the loss by; 1 in other precisions."""
    return accelerator.scaler.get_scale() if accelerator.scaler else 1.0


def _update(accelerator: Accelerator, optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Apply the gradients unless they are not finite, which is the same on every process since they were reduced."""
    if accelerator.scaler is not None:
        optimizer.step()  # a GradScaler decides for itself and must see every step
    elif accelerator.device.type == "cuda":
        # Fused optimizers skip the update on the device where this is 1, so the host need not wait for the norm.
        inner: Any = _inside(optimizer)
        inner.found_inf = (~torch.isfinite(grad_norm)).float()
        inner.step()
    elif torch.isfinite(grad_norm):
        _inside(optimizer).step()


def _inside(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that Accelerate wraps; each call of its wrapper searches for packages, about 0.5 ms."""
    return getattr(optimizer, "optimizer", optimizer)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, from pinned memory on CUDA so that the copy overlaps the step before."""
    if device.type != "cuda":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


@dataclass
class Hooks:
    """What the loop calls; every function may be left out."""

    log: Callable[[dict[str, Any]], None] = lambda figures: None
    """A training line is due: loss, learning_rate, grad_norm, tokens of the window, step."""
    advance: Callable[[int, float], None] = lambda step, loss: None
    """After every step: its number and its loss per target."""
    evaluate: Callable[[int], None] = lambda step: None
    save: Callable[[int], None] = lambda step: None
    sample: Callable[[int], None] = lambda step: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class Rhythm:
    """When the loop looks up from training; 0 is never before the end."""

    max_steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    push_every: int = 0
    sample_every: int = 0
    max_skipped_steps: int = 0

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens every ``every`` steps and at the end happens after ``done`` steps."""
        return done == self.max_steps or (every > 0 and done % every == 0)


@dataclass
class Loop:
    """One run of the loop over its steps."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    read: Reader
    schedule: Schedule
    rhythm: Rhythm
    progress: Progressed
    hooks: Hooks
    seed: int = 0
    max_grad_norm: float = 1.0
    retries: int = 0

    def run(self) -> None:
        """Train from ``progress.step`` to the last step.

        Raises:
            Diverged: after a step with non-finite loss or gradient, once the allowed ones are used up.
            Preempted: when asked to stop; the checkpoint of the step is written.
        """
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        late = self.accelerator.device.type == "cuda" and self.accelerator.scaler is None
        pending: Measured | None = None
        number = self.progress.step
        while number < self.rhythm.max_steps:
            rate = set_learning_rate(self.optimizer, self.schedule(number))
            step = self.read(number)
            scale = loss_scale(self.accelerator)
            vector = train_step(
                self.accelerator,
                self.model,
                self.optimizer,
                step,
                number=number,
                seed=self.seed,
                max_grad_norm=self.max_grad_norm,
                parameters=parameters,
                stop=self.hooks.should_stop(),
            )
            current = _measure(step, vector, rate, late)
            if self._overflowed(scale):
                continue  # the same step again, on the same data, with a smaller scale
            number += 1
            stop = self._account(pending) if pending else False
            pending = current
            if not late or stop or self._must_read(number):
                stop |= self._account(pending)
                pending = None
            self._look_up(number, stop)

    def _must_read(self, done: int) -> bool:
        rhythm = self.rhythm
        times = (rhythm.log_every, rhythm.eval_every, rhythm.save_every, rhythm.push_every, rhythm.sample_every)
        return any(rhythm.due(every, done) for every in times)

    def _overflowed(self, scale: float) -> bool:
        """Whether the GradScaler skipped this update; an fp16 step is retried until its scale fits.

        Args:
            scale: The loss scale of this update. It falls exactly where one is skipped; Accelerate's own flag is never
                set for fused optimizers, whose ``step`` is called in any case.
        """
        if loss_scale(self.accelerator) >= scale:
            self.retries = 0
            return False
        self.retries += 1
        if self.retries > MAX_SCALER_SKIPS or loss_scale(self.accelerator) < 1:
            raise Diverged(f"step {self.progress.step + 1}: gradients overflow fp16 at every loss scale")
        return True

    def _account(self, measured: Measured) -> bool:
        """Read one step's figures, count it, log it when due; return whether a process was asked to stop."""
        loss, norm, stop = measured.read()
        progress, step = self.progress, measured.step
        progress.step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            progress.skipped += 1
            if progress.skipped > self.rhythm.max_skipped_steps:
                progress.step -= 1
                raise Diverged(
                    f"step {progress.step + 1}: loss {loss} and gradient norm {norm} are not finite ({step.names}); "
                    "the update was not applied; lower optim.learning_rate or look at these sequences"
                )
        else:
            progress.tokens += step.tokens
            progress.window.add(loss, step)
        mean = loss / max(step.targets, 1e-9)
        self.hooks.advance(progress.step, mean)
        if self.rhythm.due(self.rhythm.log_every, progress.step) and progress.window.targets:
            self.hooks.log(
                {
                    "step": progress.step,
                    "loss": progress.window.loss / progress.window.targets,
                    "learning_rate": measured.learning_rate,
                    "grad_norm": norm,
                    "window_tokens": progress.window.tokens,
                }
            )
            progress.window = Window()
        return stop

    def _look_up(self, done: int, stop: bool) -> None:
        """Sample, evaluate and save when due; stop when asked."""
        if self.rhythm.due(self.rhythm.sample_every, done) and done < self.rhythm.max_steps:
            self.hooks.sample(done)
        if self.rhythm.due(self.rhythm.eval_every, done):
            self.hooks.evaluate(done)
            self.model.train()
        if stop or self.rhythm.due(self.rhythm.save_every, done) or self.rhythm.due(self.rhythm.push_every, done):
            self.hooks.save(done)
        if stop and done < self.rhythm.max_steps:
            raise Preempted(f"stopped after step {done}")


def _measure(step: Step, vector: Tensor, rate: float, late: bool) -> Measured:
    """Start copying a step's figures to the host; on CUDA they are read one step late, so no step waits."""
    if not late:
        return Measured(step, vector, rate)
    copy = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    copy.copy_(vector, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Measured(step, copy, rate, event)


@torch.no_grad()
def sum_losses(accelerator: Accelerator, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Return (summed loss in nats, targets) over every process's batches, in float64.

    Args:
        model: The loss module as prepared; under DDP its inside is called, since processes may differ in nothing.
    """
    inner = accelerator.unwrap_model(model) if not _is_sharded(model) else model
    inner.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        with accelerator.autocast():
            loss, targets = inner(**to_device(batch, accelerator.device))
        total += torch.stack([loss.double(), targets.double()])
    total = accelerator.reduce(total, "sum")
    return total[0].item(), total[1].item()


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
