"""A mean that forgets: unbiased, with a standard error that is true and an interval that covers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from stableopt.lyapunov.running import RunningMean, student_quantile


def test_it_is_the_weighted_mean_with_the_textbook_variance() -> None:
    x = np.random.default_rng(0).standard_normal(40)
    running = RunningMean(keep=0.8)
    for value in x:
        running.add(float(value))
    w = 0.8 ** np.arange(39, -1, -1)
    mean = np.average(x, weights=w)
    variance = (w * (x - mean) ** 2).sum() / (w.sum() - (w**2).sum() / w.sum())
    assert running.mean == pytest.approx(mean, rel=1e-12)
    assert running.error == pytest.approx(math.sqrt(variance * (w**2).sum()) / w.sum(), rel=1e-12)
    assert running.count == pytest.approx(1.8 / 0.2, rel=1e-3)


def test_without_forgetting_it_is_the_ordinary_mean() -> None:
    running = RunningMean(keep=1.0)
    running.add(1.0, 2.0)
    running.add(6.0)
    assert (running.mean, running.count) == (3.0, 3.0)
    assert running.error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert math.isnan(RunningMean().error)
    running = RunningMean()
    running.add(1.0)
    assert math.isnan(running.error)


@pytest.mark.parametrize("length", [3, 10, 60])
def test_the_squared_error_is_unbiased_and_the_interval_covers(length: int) -> None:
    x = np.random.default_rng(length).standard_normal((4000, length))
    misses, squared, true = 0, 0.0, 0.0
    for row in x:
        running = RunningMean()
        for value in row:
            running.add(float(value))
        misses += abs(running.mean) > student_quantile(0.975, running.count - 1.0) * running.error
        squared += running.error**2
        true += running.mean**2
    assert squared / true == pytest.approx(1.0, abs=0.1)
    assert misses / len(x) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("freedom", [1.0, 1.7, 4.0, 18.0, 500.0])
def test_the_quantiles_are_those_of_student(freedom: float) -> None:
    for probability in (0.025, 0.3, 0.5, 0.9, 0.995):
        expected = stats.t.ppf(probability, freedom)
        assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5, abs=1e-9)
