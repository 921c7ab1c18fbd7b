"""The scaling law: planted constants come back, one bad run does not move them, and the optimum is one."""

import numpy as np
import pytest

from hfkit.scaling import Law, can_fit, describe_law, fit_law

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al., 2022, section D.3
SIZES, LENGTHS = (4e7, 1e8, 4e8, 1e9), (5e8, 2e9, 1e10, 4e10)
RUNS = [(n, d, CHINCHILLA.loss(n, d)) for n in SIZES for d in LENGTHS]


def assert_planted(law: Law, rel: float) -> None:
    """Fail unless every constant is that of the planted law."""
    assert vars(law) == pytest.approx(vars(CHINCHILLA), rel=rel)


def test_planted_constants_come_back() -> None:
    assert_planted(fit_law(RUNS), 1e-4)


def test_one_bad_run_hardly_moves_the_law() -> None:
    spoilt = [*RUNS[:6], (*RUNS[6][:2], 1.2 * RUNS[6][2]), *RUNS[7:]]
    assert_planted(fit_law(spoilt), 0.05)


def test_of_noisy_runs_the_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    noisy = [(n, d, loss * (1 + 0.003 * generator.standard_normal())) for n, d, loss in RUNS]
    found = describe_law(noisy)
    for name, truth in vars(CHINCHILLA).items():
        low, high = found["intervals"][name]
        assert low < truth < high and high - low > 0.02 * truth
    assert 1e-3 < found["left_out_error"]["mean"] < 0.02


def test_the_best_division_of_a_budget_has_the_least_loss() -> None:
    parameters, tokens = CHINCHILLA.divide(1e20)
    assert 6 * parameters * tokens == pytest.approx(1e20)
    others = np.geomspace(0.1, 10, 401) * parameters
    assert others[np.argmin(CHINCHILLA.loss(others, 1e20 / 6 / others))] == pytest.approx(parameters)
    assert CHINCHILLA.divide(1e22)[0] / parameters == pytest.approx(100**CHINCHILLA.exponent)


@pytest.mark.parametrize("rising", [0, 1])
def test_runs_of_which_size_or_length_does_not_help_have_no_optimum(rising: int) -> None:
    runs = [(n, d, 3 + 0.05 * np.log10((n, d)[rising])) for n in SIZES for d in LENGTHS]
    found = describe_law(runs)
    assert found["optimum"] == []
    assert all(np.isfinite(value) for value in found["law"].values())


def test_a_law_needs_three_sizes_three_lengths_and_more_runs_than_constants() -> None:
    assert can_fit(RUNS)
    assert not can_fit([run for run in RUNS if run[0] < 4e8])
    assert not can_fit([run for run in RUNS if run[1] < 1e10])
    assert not can_fit([RUNS[0], RUNS[5], RUNS[10], RUNS[11], RUNS[4]])
