"""The figures of a run while it runs: metrics.jsonl, speed, and experiment trackers through Accelerate.

Only the main process writes. ``metrics.jsonl`` is the record that everything else (report, resume, trackers) is made
from: one flushed line per (step, kind), cut back to the resumed step, so that an interrupted run and an uninterrupted
one leave the same file but for its times.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hfkit.files import finite, write_atomic
from hfkit.masking import mask_secrets
from hfkit.settings import TrackingConfig

# Dense bf16 operations per second by device name, first match wins (vendors' data sheets; sparsity doubles them on
# paper only). V100 and T4 have no bf16: fp16. A10G is the cloud part, capped at 70; H100 without suffix is SXM.
PEAK_FLOPS = (
    (r"\bB200\b", 2250e12),
    (r"\bH100\b.*\bPCIe\b", 756e12),
    (r"\bH100\b.*\bNVL\b", 835e12),
    (r"\b(H100|G?H200|H800)\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA(100|800)\b", 312e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bA30\b", 165e12),
    (r"\bA6000\b", 155e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 5090\b", 209e12),
    (r"\bRTX 4090\b", 165e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bV100\b", 125e12),
    (r"\bT4\b", 65e12),
    (r"\bMI300X\b", 1307e12),
    (r"\bMI250X\b", 383e12),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without the one that a crash tore; a missing file has none."""
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def line_key(line: dict[str, Any]) -> tuple[int, str]:
    """Return (step, kind): a training line has a ``loss``, every other one is an evaluation."""
    return line["step"], "train" if "loss" in line else "eval"


class MetricsLog:
    """Appends to metrics.jsonl, holding one line per (step, kind).

    Args:
        path: The file, cut back atomically to the lines that the resumed state has seen.
        start: Step that training goes on from; 0 for a new run.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        lines = {line_key(line): line for line in read_metrics(path) if line["step"] <= start}
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomic(path, text)
        self.written = set(lines)
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it; an evaluation repeated after a resume is not written twice."""
        key = line_key(line)
        if key in self.written:
            return
        self.written.add(key)
        self.file.write(json.dumps(finite(line), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Throughput:
    """Time and tokens of training alone: what lies inside ``pause`` (evaluation, saving) does not count.

    Args:
        seconds: Training seconds before a resume.
        line_began: Those of them before the last training line; None is all.
        clock: Seconds, for tests.
    """

    def __init__(
        self, seconds: float = 0.0, line_began: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self.banked = seconds  # up to `since`
        self.since: float | None = clock()  # None while paused
        self.tokens = 0
        self.line_began = seconds if line_began is None else line_began

    @property
    def seconds(self) -> float:
        """Training seconds so far, resumes included."""
        return self.banked + (0.0 if self.since is None else self.clock() - self.since)

    def add(self, tokens: int) -> None:
        """Count tokens, over all processes."""
        self.tokens += tokens

    def read(self) -> float | None:
        """Return tokens per second since the last call and begin anew; None where no time has passed."""
        now = self.seconds
        tokens, elapsed = self.tokens, now - self.line_began
        self.tokens, self.line_began = 0, now
        return tokens / elapsed if elapsed > 0 else None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock inside a ``with`` block; blocks may be nested."""
        outermost = self.since is not None
        if outermost:
            self.banked, self.since = self.seconds, None
        try:
            yield
        finally:
            if outermost:
                self.since = self.clock()


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device (operations per second); None where it is not known, as on a CPU."""
    return find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def find_peak(name: str) -> float | None:
    """Return the peak for a device name as torch gives it.

    Example:
        >>> find_peak("NVIDIA H100 PCIe"), find_peak("NVIDIA L40S"), find_peak("unheard of")
        (756000000000000.0, 362000000000000.0, None)
    """
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, name.replace("-", " "))), None)


def compute_mfu(
    flops_per_token: float, tokens_per_second: float | None, peak: float | None, devices: int
) -> float | None:
    """Return model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); None without a peak.

    Example:
        >>> compute_mfu(flops_per_token=6e9, tokens_per_second=50_000, peak=300e12, devices=2)
        0.5
    """
    if peak is None or tokens_per_second is None:
        return None
    return flops_per_token * tokens_per_second / (peak * devices)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Return a nested configuration under dotted names with plain values, secrets masked: what every tracker accepts.

    Example:
        >>> flatten({"optim": {"learning_rate": 0.001}, "files": ["a", "b"], "resume": None})
        {'optim.learning_rate': 0.001, 'files': "['a', 'b']", 'resume': 'None'}
    """
    flat: dict[str, int | float | str | bool] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float)) else mask_secrets(str(value))
    return flat


def start_trackers(
    accelerator: Accelerator, config: TrackingConfig, run_config: dict[str, Any], output_dir: Path, start: int = 0
) -> None:
    """Start the trackers named in ``config.to``; ``accelerator.log`` and ``end_training`` then serve them.

    Args:
        run_config: The recipe's resolved configuration, nested.
        output_dir: Trackers that write files do so under ``output_dir/trackers``.
        start: Resumed step; TensorBoard drops what an earlier attempt wrote beyond it.
    """
    if not config.to:
        return
    accelerator.log_with = list(config.to)
    accelerator.project_configuration.logging_dir = str(output_dir / "trackers")
    accelerator.init_trackers("hfkit", flatten(run_config), {"tensorboard": {"purge_step": start + 1}})


def log_to_trackers(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Send one metrics line to the trackers, figures of an evaluation under ``eval/``, the others under ``train/``."""
    step, kind = line_key(line)
    figures = {name: value for name, value in finite(line).items() if name != "step" and value is not None}
    accelerator.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)
