"""Scaling law: how the loss falls with a model's parameters and the tokens it is trained on, fitted to a sweep.

L(N, D) = E + A / N^α + B / D^β in nats per token (Hoffmann et al., 2022, arXiv:2203.15556, approach 3). What a fit of a
few small runs is worth is said beside it: intervals from refitting resampled runs, which that paper's own were far too
narrow for (Besiroglu et al., 2024, arXiv:2404.10102), and the error at runs that were left out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

Measured = Sequence[tuple[float, float, float]]
"""Parameters, tokens and loss of each run."""
LEAST = 3  # different sizes, and different lengths: fewer leave an exponent undetermined
DELTA = 1e-3  # Huber's: residuals of log L beyond it count linearly, as in the paper's section D.2
EXPONENTS = np.geomspace(0.05, 1.6, 8)  # where a fit may begin
EXPONENT_BOUNDS = 1e-3, 3.0
RESAMPLES = 100


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    E: float
    """Loss that neither size nor tokens remove."""
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Return the loss of a model of so many parameters after so many tokens."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def exponent(self) -> float:
        """With the best division of a budget C, parameters grow as C to this power."""
        return self.beta / (self.alpha + self.beta)

    def divide(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens that give the least loss for 6 · parameters · tokens = ``flops``.

        (Hoffmann et al., 2022, equation 4.)
        """
        ratio = (math.log(self.alpha * self.A) - math.log(self.beta * self.B)) / (self.alpha + self.beta)
        parameters = ratio + self.exponent * math.log(flops / 6)  # in logarithms, of which no law overflows
        return float(np.exp(parameters)), float(np.exp(math.log(flops / 6) - parameters))

    @property
    def has_optimum(self) -> bool:
        """Whether both size and tokens were seen to matter: an exponent at its bound says that one does not."""
        low, high = EXPONENT_BOUNDS
        return all(1.01 * low < exponent < 0.99 * high for exponent in (self.alpha, self.beta))


def can_fit(runs: Measured) -> bool:
    """Whether the runs tell the law's terms apart."""
    return all(len({run[place] for run in runs}) >= LEAST for place in (0, 1)) and len(runs) > len(Law.__annotations__)


def fit_law(runs: Measured, starts: int = 3) -> Law:
    """Return the law nearest to the runs: Huber loss of the residuals of log L, from several starting points.

    Given both exponents the law is linear in E, A and B, so a starting point is a pair of exponents with the best
    non-negative three; ``starts`` of those are followed down.
    """
    sizes, tokens, losses = np.array(runs, dtype=np.float64).T
    size_unit, token_unit = np.exp(np.log(sizes).mean()), np.exp(np.log(tokens).mean())  # so that A and B are about 1
    n, d = np.log(sizes / size_unit), np.log(tokens / token_unit)

    def terms(p: np.ndarray) -> np.ndarray:  # logarithms of E, A / N^α and B / D^β: (3, runs)
        return np.stack([np.full_like(n, p[0]), p[1] - p[3] * n, p[2] - p[4] * d])

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(terms(p)) - np.log(losses)

    def slopes(p: np.ndarray) -> np.ndarray:
        shares = np.exp(terms(p) - np.logaddexp.reduce(terms(p)))
        return np.stack([*shares, -shares[1] * n, -shares[2] * d], axis=1)

    least = 1e-3 * losses.min()
    begins = []
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        columns = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], axis=1)
        scales, error = nnls(columns / losses[:, None], np.ones_like(losses))
        begins.append((error, [*np.log(np.maximum(scales, 2 * least)), alpha, beta]))
    begins.sort(key=lambda begin: begin[0])
    low, high = EXPONENT_BOUNDS
    bounds = [*3 * [math.log(least)], low, low], [*3 * [np.inf], high, high]
    fits = [least_squares(residuals, p, slopes, bounds, loss="huber", f_scale=DELTA) for _, p in begins[:starts]]
    e, a, b, alpha, beta = min(fits, key=lambda fit: fit.cost).x
    return Law(
        math.exp(e),
        math.exp(a + alpha * math.log(size_unit)),
        float(alpha),
        math.exp(b + beta * math.log(token_unit)),
        float(beta),
    )


def describe_law(runs: Measured, seed: int = 0) -> dict[str, Any]:
    """Return the fitted law, how sure it is, and what it says of the best size for a budget.

    Returns:
        `law` (its five constants and `exponent`), `intervals` (95 % of the laws of resampled runs), `left_out_error`
        (relative error of the loss of a run that the fit has not seen: its mean size, and that of the largest run), and
        `optimum` (parameters, tokens and loss at the largest run's budget, and at ten times it; empty where the runs do
        not show that both matter).
    """
    law, largest = fit_law(runs), max(runs, key=lambda run: run[0] * run[1])
    errors = {run: _left_out_error(runs, run) for run in set(runs)}
    known = [abs(error) for error in errors.values() if error is not None]
    return {
        "law": {**asdict(law), "exponent": law.exponent},
        "intervals": _intervals(runs, seed),
        "left_out_error": {"mean": float(np.mean(known)) if known else None, "largest_run": errors[largest]},
        "optimum": [_optimum(law, factor * 6 * largest[0] * largest[1]) for factor in (1, 10) if law.has_optimum],
    }


def _optimum(law: Law, flops: float) -> dict[str, float]:
    parameters, tokens = law.divide(flops)
    return {"flops": flops, "parameters": parameters, "tokens": tokens, "loss": law.loss(parameters, tokens)}


def _left_out_error(runs: Measured, left_out: tuple[float, float, float]) -> float | None:
    """Return the relative error at a run of the law of the others; None where those are too few."""
    others = [run for run in runs if run != left_out]
    return float(fit_law(others).loss(*left_out[:2]) / left_out[2] - 1) if can_fit(others) else None


def _intervals(runs: Measured, seed: int) -> dict[str, tuple[float, float]]:
    """Return where 95 % of the laws of resampled runs lie."""
    generator = np.random.default_rng(seed)
    laws = []
    for _ in range(RESAMPLES):
        drawn = [runs[number] for number in generator.integers(len(runs), size=len(runs))]
        if can_fit(drawn):
            laws.append(fit_law(drawn, starts=1))
    names = ("E", "A", "alpha", "B", "beta", "exponent")
    values = {name: [getattr(law, name) for law in laws] for name in names}
    return {name: tuple(np.percentile(found, [2.5, 97.5]).tolist()) for name, found in values.items() if found}
