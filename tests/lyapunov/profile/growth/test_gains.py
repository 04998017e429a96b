"""Small gain on measured gains: T6's rate and weights, the joint rate that is never worse, and the decay that was really seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.growth.gains import coupled_gains
from stableopt.theory import small_gain_radius


def walk(gains, h: float, theta: float, slack: float = 1.0) -> tuple[list[float], list[float]]:
    """Return norms that attain the gains, or a share of them."""
    hs, thetas = [h], [theta]
    for a, b, c, d in zip(gains.a, gains.b, gains.c, gains.d, strict=True):
        h, theta = slack * (a * h + b * theta), slack * (c * h + d * theta)
        hs.append(h)
        thetas.append(theta)
    return hs, thetas


def random_gains(seed: int, T: int = 40):
    rng = np.random.default_rng(seed)
    a, d = rng.uniform(0, 0.9, (2, T))
    b, c = rng.uniform(0, 1, (2, T)) * 10.0 ** rng.uniform(-3, 1, (2, 1)) * 0.3
    return coupled_gains(a, b, c, d)


@pytest.mark.parametrize("seed", range(30))
def test_the_rate_is_the_radius_and_v_decays_by_it(seed: int) -> None:
    gains = random_gains(seed)
    eigenvalues = np.linalg.eigvals(gains.matrix)
    assert gains.radius == pytest.approx(np.abs(eigenvalues).max(), rel=1e-12)
    assert gains.verdict == ("holds" if gains.radius < 1 else "fails")
    v = np.array(gains.weights)
    np.testing.assert_allclose(v @ gains.matrix, gains.radius * v, rtol=1e-12)  # the left Perron vector
    assert v.sum() == pytest.approx(1.0)
    for joint in (False, True):
        check = gains.check(*walk(gains, 1.0, 2.0), joint=joint)
        assert check.holds
        assert check.undominated == 0
        assert check.worst <= (gains.joint_rate if joint else gains.rate) * (1 + 1e-14)


@pytest.mark.parametrize("seed", range(30))
def test_the_joint_rate_is_the_least_over_all_weights(seed: int) -> None:
    gains = random_gains(seed)
    assert gains.joint_rate <= gains.radius * (1 + 1e-14)

    def rate(u: float) -> float:
        return max((gains.a + u * gains.c).max(), (gains.b / u + gains.d).max())

    v1, v2 = gains.joint_weights
    assert rate(v2 / v1) == pytest.approx(gains.joint_rate, rel=1e-13)
    assert all(rate(u) >= gains.joint_rate * (1 - 1e-14) for u in np.geomspace(1e-8, 1e8, 2000))


def test_v_attains_the_radius_when_the_gains_are_constant_and_not_less() -> None:
    gains = coupled_gains([0.5] * 60, 0.2, 0.3, 0.6)
    hs, thetas = walk(gains, 1.0, 1.0)
    check = gains.check(hs, thetas)
    assert check.holds
    assert check.worst == pytest.approx(gains.radius, rel=1e-12)
    assert gains.joint_rate == pytest.approx(gains.radius, rel=1e-14)
    hs[30] *= 1 + 1e-9
    broken = gains.check(hs, thetas)
    assert (broken.violations, broken.undominated) == (1, 1)


def test_both_sides_of_the_limit() -> None:
    b = c = math.sqrt(0.2)
    assert coupled_gains(0.5, b * 0.999999, c, 0.6).verdict == "holds"
    assert coupled_gains(0.5, b * 1.000001, c, 0.6).verdict == "fails"
    assert coupled_gains(0.5, 0.5, 0.5, 0.5).verdict == "fails"
    growing = coupled_gains([0.9] * 50, 0.5, 0.5, 0.9)
    assert not growing.contracts
    hs, thetas = walk(growing, 1.0, 1.0)
    assert hs[-1] > 1e5
    assert growing.check(hs, thetas).holds  # V grows by at most the radius


@pytest.mark.parametrize(("b", "c"), [(50.0, 0.0), (0.0, 50.0), (0.0, 0.0)])
@pytest.mark.parametrize(("a", "d"), [(0.5, 0.75), (0.75, 0.5), (0.6, 0.6), (0.0, 0.0)])
def test_a_triangular_system_decays_however_large_the_one_product(a: float, b: float, c: float, d: float) -> None:
    gains = coupled_gains(np.full(30, a), b, c, d)
    assert gains.verdict == "triangular"
    assert gains.radius == max(a, d) == gains.joint_rate
    assert gains.radius < gains.rate < 1
    assert gains.check(*walk(gains, 1.0, 1.0)).holds
    attained = b == c == 0 or (a > d and c == 0) or (a < d and b == 0)  # else only weights towards an end come near
    assert math.isnan(gains.joint_weights[0]) != attained
    if attained:
        assert gains.check(*walk(gains, 1.0, 1.0), joint=True).holds


def test_a_triangular_system_beyond_the_limit_fails_and_has_no_energy() -> None:
    gains = coupled_gains([1.0], 1.0, 0.0, 0.5)
    assert gains.verdict == "fails"
    assert not gains.contracts
    with pytest.raises(ValueError, match="no positive weights"):
        gains.check([1.0, 1.0], [1.0, 1.0])


def test_suprema_at_different_steps_can_fail_where_the_joint_rate_holds() -> None:
    gains = coupled_gains([0.9, 0.1], 0.3, [0.0, 0.5], 0.2)
    assert gains.verdict == "fails"
    assert gains.contracts
    assert gains.check(*walk(gains, 1.0, 1.0), joint=True).holds


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1.0, 1e9, 1e150])
def test_weights_do_not_cancel_whatever_the_units_of_the_parameters(scale: float) -> None:
    """Other units of the parameters multiply b and divide c; nothing else changes but the weights."""
    gains = coupled_gains([0.9, 0.3], np.array([0.1, 0.2]) * scale, np.array([0.2, 0.4]) / scale, [0.5, 0.4])
    plain = coupled_gains([0.9, 0.3], [0.1, 0.2], [0.2, 0.4], [0.5, 0.4])
    assert gains.radius == pytest.approx(plain.radius, rel=1e-12)
    assert gains.joint_rate == pytest.approx(plain.joint_rate, rel=1e-12)
    assert gains.check([1.0, 0.5, 0.1], [0.1 / scale, 0.05 / scale, 0.01 / scale]).holds
    for (v1, v2), (w1, w2) in ((gains.weights, plain.weights), (gains.joint_weights, plain.joint_weights)):
        assert v2 / v1 == pytest.approx(scale * w2 / w1, rel=1e-10)
    weak = coupled_gains(0.9, 1e-9, 1e-9, 0.1)
    v1, v2 = weak.weights
    assert v1 * 1e-9 + v2 * 0.1 == pytest.approx(weak.radius * v2, rel=1e-12)


def test_numbers_stand_for_all_steps_and_agree_with_the_law() -> None:
    gains = coupled_gains(0.5, [0.25, 0.1], 0.25, 0.5)
    assert gains.a.tolist() == [0.5, 0.5]
    assert gains.radius == small_gain_radius(0.5, 0.25, 0.25, 0.5) == 0.75


def test_norms_that_vanish_and_come_back_are_seen() -> None:
    gains = coupled_gains([0.5, 0.5], 0.1, 0.1, 0.5)
    check = gains.check([0.0, 0.0, 1.0], [0.0, 0.0, 0.0])
    assert check.worst == math.inf
    assert (check.violations, check.undominated) == (1, 1)
    assert gains.check([0.0] * 3, [0.0] * 3).worst == 0.0


@pytest.mark.parametrize(
    "gains", [(-1, 0, 0, 0), (math.nan, 0, 0, 0), ([], 0, 0, 0), ([[0.5]], 0, 0, 0), (0, 0, 0, math.inf)]
)
def test_nonsense_is_refused(gains) -> None:
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        coupled_gains(*gains)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        coupled_gains([0.5, 0.5], [0.1] * 3, 0.0, 0.5)
    with pytest.raises(ValueError, match="2 steps have 3 norms"):
        coupled_gains([0.5, 0.5], 0.1, 0.1, 0.5).check([1.0, 1.0], [1.0, 1.0, 1.0])


@pytest.mark.parametrize(("b", "c"), [(0.1, 0.1), (50.0, 0.0)])
def test_gains_that_are_estimates_from_below_exclude_nothing_and_can_fail(b: float, c: float) -> None:
    known = coupled_gains(a=0.5, b=b, c=c, d=0.6)
    below = coupled_gains(a=0.5, b=b, c=c, d=0.6, exact=False)
    assert known.verdict == ("holds" if c else "triangular")
    assert known.contracts
    assert below.verdict == "not excluded"
    assert not below.contracts
    assert (below.radius, below.rate, below.weights) == (known.radius, known.rate, known.weights)
    assert coupled_gains(a=0.5, b=b, c=c, d=1.0, exact=False).verdict == "fails"


def test_a_joint_rate_from_below_shows_no_contraction_either() -> None:
    gains = {"a": [0.9, 0.1], "b": 0.3, "c": [0.0, 0.5], "d": 0.2}
    assert coupled_gains(**gains).contracts
    assert not coupled_gains(**gains, exact=False).contracts
