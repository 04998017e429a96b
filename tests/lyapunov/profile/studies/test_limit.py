"""The limit of a measured value: order and limit within their own errors, on families where both are known; else inconclusive."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.profile.studies.limit import LimitStudy, limit_study

HALVED = [0.2 * 2.0**-k for k in range(7)]


@given(order=st.floats(0.3, 6.0), ratio=st.floats(1.3, 4.0), c=st.floats(0.1, 10.0), v0=st.floats(-5.0, 5.0))
def test_a_pure_power_has_its_order_and_its_limit(order: float, ratio: float, c: float, v0: float) -> None:
    steps = [0.5 * ratio**-k for k in range(6)]
    study = limit_study(lambda h: v0 + c * h**order, steps)
    if study.verdict == "converges":  # else rounding has swallowed the differences
        assert study.order == pytest.approx(order, abs=study.order_error)
        assert study.limit == pytest.approx(v0, abs=study.limit_error)
    else:
        assert c * steps[3] ** order < 1e-9 or "larger than the errors" in study.reason or order < 0.5


def test_steps_of_any_ratio_will_do() -> None:
    study = limit_study(lambda h: 1.0 + h**2, [0.5, 0.4, 0.25, 0.22, 0.1, 0.03])
    np.testing.assert_allclose(study.orders, 2.0, rtol=1e-9)
    assert study.limit == pytest.approx(1.0, abs=1e-12)
    assert study.steps[0] == 0.5


def test_the_remainder_is_extrapolated_for_steps_of_any_ratio() -> None:
    study = limit_study(lambda h: 1.0 + h * (1.0 + 0.3 * h), [1 / n for n in (32, 48, 64, 96, 128)])
    assert abs(study.orders[-1] - 1.0) > 5e-3
    assert abs(study.order - 1.0) < 2e-4
    assert study.order_error < 0.05


def test_what_differences_do_not_have_in_common_counts() -> None:
    # the remainder is across the leading term: the order hardly sees it, the limit does
    study = limit_study(lambda h: (np.array([h, h * h]), 0.0), [0.02 * 2.0**-k for k in range(8)])
    assert study.order == pytest.approx(1.0, abs=study.order_error)
    assert 1e-8 < float(np.linalg.norm(study.limit)) <= study.limit_error < 1e-6


@pytest.mark.parametrize("count", [6, 8, 12])
def test_a_large_step_does_not_speak_for_small_ones(count: int) -> None:
    # order 2 is what is seen while h > 1e-3, order 1 is what is there
    study = limit_study(lambda h: (h + 1000.0 * h * h, 0.0), [0.02 * 2.0**-k for k in range(count)])
    if count == 12:
        assert study.order == pytest.approx(1.0, abs=study.order_error)
        assert abs(float(study.limit)) <= study.limit_error
    else:
        assert study.verdict == "inconclusive"


@pytest.mark.parametrize("dimension", [0, 4])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_intervals_hold_what_they_say_they_hold(dimension: int, noise: float) -> None:
    generator, shape = np.random.default_rng(1), () if dimension == 0 else (dimension,)
    given_, orders, limits, strict = 0, 0, 0, 0
    for trial in range(240):
        p, q, ratio = (0.5, 1.0, 2.0, 4.0)[trial % 4], 1.0 + trial % 3 / 2, (1.5, 2.0, 3.0)[trial // 4 % 3]
        c, a, b, v0 = (generator.normal(size=shape) for _ in range(4))

        def measure(h: float, p=p, q=q, c=c, a=a, b=b, v0=v0):
            value = v0 + c * h**p + a * h ** (p + q) + b * h ** (p + 2 * q)
            error = noise * generator.uniform(-1, 1, size=shape) / math.sqrt(max(dimension, 1))
            return value + error, noise + 1e-15 * float(np.linalg.norm(value))

        study = limit_study(measure, [0.2 * ratio**-k for k in range(5 + trial % 4)])
        if study.verdict != "converges":
            continue
        low, high = study.interval
        given_, orders = given_ + 1, orders + (low <= p <= high)
        limits += float(np.linalg.norm(study.limit - v0)) <= study.limit_error
        strict += low <= p + 1 <= high or low <= p - 1 <= high
    assert given_ >= 180
    assert orders >= 0.98 * given_
    assert limits >= 0.98 * given_
    assert strict == 0  # an interval never reaches the next integer order


@pytest.mark.parametrize(
    ("apart", "orders", "limits"), [((1.0, 2.0), 0.01, 0.01), ((0.5, 2.0), 0.04, 0.01), ((0.25, 1.0), 0.18, 0.03)]
)
def test_powers_close_together_are_missed_as_often_as_is_said(
    apart: tuple[float, float], orders: float, limits: float
) -> None:
    generator, decided, missed, off = np.random.default_rng(0), 0, 0, 0
    for trial in range(200):
        p = generator.uniform(0.5, 3.0)
        q = p + generator.uniform(*apart)
        r = q + generator.uniform(*apart)
        a, b, d = generator.normal(size=3)
        study = limit_study(
            lambda h, p=p, q=q, r=r, a=a, b=b, d=d: 3.0 + a * h**p + b * h**q + d * h**r,
            [0.2 * 2.0**-k for k in range(5 + trial % 4)],
        )
        if study.verdict == "converges":
            decided += 1
            missed += not study.interval[0] <= p <= study.interval[1]
            off += abs(float(study.limit) - 3.0) > study.limit_error
            assert "within about" in str(study)
    assert decided >= 150
    assert missed <= orders * decided
    assert off <= limits * decided
    assert apart[0] >= 0.5 or missed >= 0.05 * decided  # or the docstring says too much


def test_an_interval_is_not_wider_than_need_be() -> None:
    study = limit_study(math.exp, HALVED, predicted=1.0)
    assert study.order_error < 0.02
    assert study.limit_error < 1e-4
    assert study.distance > 1e-3 * study.limit_error  # and no thousand times too wide
    assert study.agrees


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda h: math.sin(1.0 / h), ""),
        (lambda h: 1.0 / h, "not seen to converge"),
        (math.log, "not seen to converge"),
        (lambda h: (-1.0) ** round(math.log2(0.2 / h)) * h, "do not point the same way"),
        (lambda h: (h, 1.0), "never"),
        (lambda h: math.nan if h < 0.01 else h, "is not finite"),
    ],
)
def test_what_does_not_converge_is_inconclusive(measure, said: str) -> None:
    study = limit_study(measure, HALVED)
    if said == "never":
        assert study.verdict == "exact"
        assert study.limit_error >= 2.0
        return
    assert study.verdict == "inconclusive"
    assert study.reason
    assert said in study.reason
    assert math.isnan(study.limit)
    assert study.limit_error == math.inf
    assert study.agrees is None
    assert "inconclusive down to step 0.00313" in str(study)


def test_rounding_is_where_a_study_ends() -> None:
    steps = [0.5**k for k in range(1, 40)]
    study = limit_study(lambda h: 1.0 + h**4, steps)
    assert study.verdict == "converges"
    assert study.interval[0] <= 4.0 <= study.interval[1]
    assert math.isnan(study.orders[-1])
    noisy = limit_study(lambda h: (1.0 + h, 0.3 * h), HALVED)
    assert noisy.verdict == "inconclusive"


def test_large_steps_where_nothing_is_asymptotic_do_no_harm() -> None:
    study = limit_study(
        lambda h: math.inf if h > 0.5 else math.cos(9 * h), [1.0, 0.8, 0.4, 0.2, *HALVED[1:]], predicted=1.0
    )
    assert study.interval[0] <= 2.0 <= study.interval[1]
    assert study.agrees


def test_a_value_that_does_not_depend_on_the_step_is_exact() -> None:
    study = limit_study(lambda h: 3.0, HALVED, predicted=3.0)
    assert (study.verdict, study.limit, study.agrees) == ("exact", 3.0, True)
    assert "does not depend on the step" in str(study)
    assert limit_study(lambda h: 3.0, HALVED, predicted=3.0 + 1e-12).agrees is False


def test_a_prediction_is_compared_and_changes_nothing() -> None:
    right, wrong = (limit_study(math.exp, HALVED, predicted=x) for x in (1.0, 1.001))
    assert (right.agrees, wrong.agrees) == (True, False)
    assert right.limit == wrong.limit
    assert "0.001 away from the predicted limit" in str(wrong)
    assert limit_study(math.exp, HALVED, predicted=1.001, predicted_error=1e-3).agrees


def test_vectors_are_studied_as_a_whole() -> None:
    study = limit_study(lambda h: np.array([math.exp(-h), 2.0 + h * h]), HALVED, predicted=[1.0, 2.0])
    assert study.agrees
    assert study.values.shape == (7, 2)
    assert study.interval[0] <= 1.0 <= study.interval[1]
    assert "a vector of norm" in str(study)
    json.dumps(study.as_dict(), allow_nan=False)


def test_four_steps_are_too_few_to_see_an_order_settle() -> None:
    study = limit_study(math.exp, HALVED[:4])
    assert study.verdict == "inconclusive"
    assert "five steps" in study.reason
    assert limit_study(math.exp, HALVED[:5]).verdict == "converges"
    with pytest.raises(ValueError, match="at least three steps, positive and distinct"):
        limit_study(math.exp, [0.1, 0.1, 0.2])
    with pytest.raises(ValueError, match="values of one shape"):
        limit_study(lambda h: [1.0] if h > 0.1 else [1.0, 2.0], HALVED)


def test_a_study_is_plain_data() -> None:
    study = limit_study(math.exp, HALVED)
    assert isinstance(study, LimitStudy)
    plain = json.loads(json.dumps(study.as_dict(), allow_nan=False))
    assert plain["interval"][0] < 1.0 < plain["interval"][1]
    assert plain["predicted"] is None
