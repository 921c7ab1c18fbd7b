"""Progress of long work on stderr: a bar on a terminal, sparse plain lines where the output is a log file."""

import sys
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

from tqdm import tqdm


def format_time(seconds: float) -> str:
    """Return hours, minutes and seconds.

    Example:
        >>> format_time(3725.4)
        '1:02:05'
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def format_figures(figures: dict[str, Any]) -> str:
    """Return figures as they read best beside a bar; None is left out.

    Example:
        >>> format_figures({"loss": 3.41251, "learning_rate": 0.001, "tokens_per_second": 12345.6, "grad_norm": None})
        'loss 3.413  lr 1.00e-03  12,346 tokens/s'
    """
    shown = []
    for name, value in figures.items():
        if name == "learning_rate" and value is not None:
            shown.append(f"lr {value:.2e}")
        elif name == "tokens_per_second" and value is not None:
            shown.append(f"{value:,.0f} tokens/s")
        elif value is not None:
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(shown)


class Progress:
    """Progress of long work on stderr: a bar on a terminal, sparse plain lines in a log file.

    Args:
        total: Units of the whole work; None where unknown.
        description: What is being done.
        unit: What is counted, such as "step" or "document".
        start: Units done before (a resumed run); left out of the speed and the remaining time.
        enabled: False on every process but the main one: nothing is shown.
        stream: Where to write; None is stderr.
        clock: Seconds, for tests.

    Example:
        >>> with Progress(3, "train", "step", stream=sys.stdout, clock=lambda: 0.0) as progress:
        ...     progress.update(3, loss=2.5)
        train 3/3 steps (100%)  loss 2.5  0:00:00 elapsed
    """

    interval = 5.0  # seconds between plain lines, at least; later on 1 % of the time elapsed, so that logs stay short

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "step",
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.start = self.done = start
        self.enabled, self.clock = enabled, clock
        self.stream = sys.stderr if stream is None else stream
        self.figures: dict[str, Any] = {}
        self.began = self.printed_at = clock()
        self.printed: int | None = None
        self.bar: tqdm | None = None
        if enabled and self.stream.isatty():
            self.bar = tqdm(
                total=total, desc=description, unit=f" {unit}s", initial=start, file=self.stream, dynamic_ncols=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, n: int = 1, **figures: Any) -> None:
        """Count ``n`` more units; ``figures`` replace the ones shown so far."""
        self.done += n
        self.figures.update(figures)
        if self.bar is not None:
            if figures:
                self.bar.set_postfix_str(format_figures(self.figures), refresh=False)
            self.bar.update(n)
        elif self.enabled:
            now = self.clock()
            if now - self.printed_at >= max(self.interval, (now - self.began) / 100):
                self._print()

    def write(self, text: str) -> None:
        """Print ``text`` above the bar."""
        if self.enabled:
            tqdm.write(text, file=self.stream)
            self.stream.flush()

    def close(self) -> None:
        """Leave the last state on the screen or in the log."""
        if self.bar is not None:
            self.bar.close()
        elif self.enabled and self.printed != self.done:
            self._print()
        self.enabled = False

    def _print(self) -> None:
        self.printed, self.printed_at = self.done, self.clock()
        elapsed = self.printed_at - self.began
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{self.description} {count} {self.unit}s{share}", format_figures(self.figures)]
        parts.append(f"{format_time(elapsed)} elapsed")
        if self.total and self.start < self.done < self.total:
            remaining = elapsed / (self.done - self.start) * (self.total - self.done)
            parts.append(f"{format_time(remaining)} remaining")
        self.stream.write("  ".join(part for part in parts if part) + "\n")
        self.stream.flush()
