"""What a run says of itself while it goes: the console and its bar, metrics.jsonl, trackers, status.json."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from hfkit.energy import EnergyMeter
from hfkit.files import write_atomic
from hfkit.launch import current_status
from hfkit.loop import Progressed
from hfkit.model import flops_per_token
from hfkit.progress import Progress
from hfkit.settings import TrackingConfig
from hfkit.tracking import (
    MetricsLog,
    Throughput,
    compute_mfu,
    log_to_trackers,
    peak_flops,
    read_metrics,
    start_trackers,
)


class Recorder:
    """Writes on the main process, counts on every one; the run's training seconds go into its ``progress``."""

    def __init__(self, accelerator: Accelerator, output_dir: Path) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self.enabled = accelerator.is_main_process
        self.progress = Progressed()
        self.throughput = Throughput()
        self.log: MetricsLog | None = None
        self.bar: Progress | None = None

    def measure(self, model: PreTrainedModel, length: int) -> None:
        """Note what a token costs, for the utilisation of the device.

        Args:
            length: Tokens of a row: attention's share grows with them.
        """
        self.flops = flops_per_token(model, length)
        self.peak = peak_flops(self.accelerator.device)

    def open(self, progress: Progressed) -> None:
        """Take up the figures where ``progress`` left them."""
        self.progress = progress
        if self.enabled:
            self.log = MetricsLog(self.output_dir / "metrics.jsonl", progress.step)

    def start_trackers(self, tracking: TrackingConfig, settings: dict[str, Any]) -> None:
        """Start the trackers that were asked for."""
        start_trackers(self.accelerator, tracking, settings, self.output_dir, self.progress.step)

    def finish_trackers(self) -> None:
        """Close the trackers; Accelerate's `end_training` would also end the process group, here alone."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @contextmanager
    def training(self, max_steps: int) -> Iterator[None]:
        """Show a bar and count training seconds inside a ``with`` block."""
        self.throughput = Throughput(self.progress.seconds, self.progress.logged_at)
        self.meter = EnergyMeter()
        with Progress(max_steps, "train", "step", self.progress.step, enabled=self.enabled) as self.bar:
            yield
        self.bar = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave a ``with`` block out of the training seconds."""
        with self.throughput.pause():
            yield

    def say(self, text: str) -> None:
        """Tell the person at the console."""
        if self.enabled:
            print(text, file=sys.stderr) if self.bar is None else self.bar.write(text)

    def advance(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        if self.bar is not None:
            self.bar.update(1, loss=loss)
        if status := current_status():
            status.update(step=step)

    def log_training(self, figures: dict[str, Any]) -> None:
        """Write a training line of metrics.jsonl, with the speed since the one before.

        Args:
            figures: step, loss, learning_rate, grad_norm, and window_tokens: those since the line before.
        """
        self.throughput.add(figures.pop("window_tokens"))
        speed, seconds = self.throughput.read(), self.throughput.seconds
        self.progress.seconds = self.progress.logged_at = seconds
        self.progress.joules += self.meter.read()
        line = {**figures, "tokens": self.progress.tokens, "tokens_per_second": speed, "seconds": seconds}
        if (mfu := compute_mfu(self.flops, speed, self.peak, self.accelerator.num_processes)) is not None:
            line["mfu"] = mfu
        self._write(line)
        if self.bar is not None:
            self.bar.update(0, learning_rate=figures["learning_rate"], tokens_per_second=speed)

    def log_evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Write an evaluation line of metrics.jsonl, and print it."""
        self._write({"step": step, **figures})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
        self.say(f"Evaluation after step {step}: {shown}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(line)
            log_to_trackers(self.accelerator, line)

    def write_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        """Print what the model says after ``step`` steps, and keep it for the report."""
        if not self.enabled:
            return
        path = self.output_dir / "samples.jsonl"
        rows = [row for row in read_lines(path) if row["step"] < step]
        rows += [{"step": step, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for prompt, text in zip(prompts, texts, strict=True):
            self.say(f"\n  {prompt} → {text.strip()}")

    def final_figures(self) -> dict[str, Any]:
        """Return what every run's result.json says of its training."""
        lines = read_metrics(self.output_dir / "metrics.jsonl") if self.enabled else []
        losses = [line["loss"] for line in lines if "loss" in line]
        tokens, seconds = self.progress.tokens, self.progress.seconds
        return {
            "tokens": tokens,
            "steps": self.progress.step,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "train_loss": losses[-1] if losses else None,
            "skipped_steps": self.progress.skipped,
            **({"energy_kwh": self.progress.joules / 3.6e6} if self.progress.joules else {}),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file of our own; none where it is missing."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
