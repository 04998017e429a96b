"""Trainings whose exponents, transients and verdicts are known: the profile finds them, to rounding or within its own interval."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.offline import profile, profile_ensemble
from stableopt.theory import spectral_radius


class Point(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, *start):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start))


def quadratic(*curvatures):
    weights = torch.tensor(curvatures)
    return lambda model, _: 0.5 * (weights * model.theta**2).sum()


def sgd(**options):
    return lambda model: torch.optim.SGD(model.parameters(), **options)


def run(loss, optimizer, *start, steps, batches=(0,), **options):
    return profile(
        lambda: Point(*start),
        optimizer,
        batches,
        steps=steps,
        loss=loss,
        **{"directions": "all", "cadence": 1, **options},
    )


@pytest.mark.parametrize("lr", [0.3, 1.1])
def test_gradient_descent_on_a_quadratic(lr):
    curvatures = (1.9, 1.0, 0.3)
    reading = run(quadratic(*curvatures), sgd(lr=lr), 1.0, 1.0, 1.0, steps=400)
    expected = sorted((math.log(abs(1 - lr * c)) for c in curvatures), reverse=True)
    assert [e.value for e in reading.exponents] == pytest.approx(expected, abs=1e-10)
    assert reading.verdict.kind == ("exponentially stable" if max(expected) < 0 else "exponentially unstable")
    if max(expected) < 0:
        assert reading.verdict.rate == pytest.approx(math.exp(max(expected)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_heavy_ball_on_a_quadratic_with_real_roots(beta):
    """Four exponents: the logarithms of the eigenvalues of the two companion matrices."""
    lr, curvatures = 0.05, (0.9, 0.4)
    roots = [r for c in curvatures for r in np.linalg.eigvals([[1 + beta - lr * c, -beta], [1.0, 0.0]])]
    assert all(abs(r.imag) == 0 for r in roots)
    reading = run(quadratic(*curvatures), sgd(lr=lr, momentum=beta), 1.0, 1.0, steps=2500)
    expected = sorted((math.log(abs(r)) for r in roots), reverse=True)
    assert [e.value for e in reading.exponents] == pytest.approx(expected, abs=1e-10)


@pytest.mark.slow
def test_heavy_ball_on_a_quadratic_with_complex_roots():
    """A pair of complex roots of modulus sqrt(beta): the exponents lie in their intervals, and their sum is exact."""
    beta = 0.8
    reading = run(quadratic(1.0), sgd(lr=0.3, momentum=beta), 1.0, steps=600)
    assert reading.exponents[0].value + reading.exponents[1].value == pytest.approx(math.log(beta), abs=1e-10)
    for e in reading.exponents:
        assert e.lower <= 0.5 * math.log(beta) <= e.upper
        assert e.upper - e.lower < 0.01
    assert reading.verdict.kind == "exponentially stable"


@pytest.mark.slow
def test_the_edge_of_heavy_ball_is_seen_on_both_sides():
    lr, beta = 0.1, 0.9
    edge = 2 * (1 + beta) / lr
    for factor, kind in ((0.99, "exponentially stable"), (1.01, "exponentially unstable")):
        reading = run(quadratic(factor * edge), sgd(lr=lr, momentum=beta), 1e-3, steps=1200)
        rho = spectral_radius([[1 + beta - lr * factor * edge, -beta], [1.0, 0.0]])
        assert reading.verdict.kind == kind
        assert reading.exponents[0].value == pytest.approx(math.log(rho), abs=2e-3)


@pytest.mark.parametrize("wd", [0.0, 0.2])
def test_adam_at_its_edge_with_a_frozen_metric(wd):
    """Far below eps the preconditioner stands still, and (2 - lr wd)(1 + b1)/((1 - b1) lr) is the edge."""
    lr, beta1, eps = 0.01, 0.9, 1.0
    edge = (2 - lr * wd) * (1 + beta1) / ((1 - beta1) * lr)
    found = []
    for factor in (0.97, 1.03):
        reading = run(
            quadratic(factor * edge),
            lambda m: torch.optim.AdamW(m.parameters(), lr=lr, betas=(beta1, 0.5), eps=eps, weight_decay=wd),
            1e-60, steps=400, directions=1, start=150,
        )  # fmt: skip
        found.append(reading.exponents[0].value)
    assert found[0] < 0 < found[1]


@pytest.mark.slow
def test_a_chaotic_training():
    """Gradient descent on 4x³/3 - 3x²/2 with rate 1 is x -> 4x(1 - x), whose exponent is ln 2."""

    def loss(model, _):
        x = model.theta
        return (4.0 / 3.0 * x**3 - 1.5 * x**2).sum()

    reading = run(loss, sgd(lr=1.0), 0.3, steps=1500)
    e = reading.exponents[0]
    assert e.lower <= math.log(2.0) <= e.upper
    assert e.upper - e.lower < 0.2
    assert reading.verdict.kind == "exponentially unstable"


def random_curvatures(member=0, low=0.2, high=2.6):
    generator = torch.Generator().manual_seed(1000 + member)
    while True:
        yield low if torch.rand((), generator=generator) < 0.5 else high


def random_loss(model, curvature):
    return 0.5 * curvature * (model.theta**2).sum()


@pytest.mark.slow
def test_scalar_multiplicative_noise_almost_surely():
    reading = run(random_loss, sgd(lr=0.5), 1.0, steps=1500, batches=random_curvatures())
    truth = 0.5 * (math.log(0.9) + math.log(0.3))
    assert reading.exponents[0].lower <= truth <= reading.exponents[0].upper
    assert reading.verdict.kind == "exponentially stable"


@pytest.mark.slow
def test_the_mean_square_may_grow_where_almost_every_run_decays():
    """The curvature is 0.15 or 2.14, the rate 1: E log|1 - a| < 0 < log E (1 - a)²."""
    low, high = 0.15, 2.14
    almost_sure = 0.5 * (math.log(abs(1 - low)) + math.log(abs(1 - high)))
    mean_square = 0.5 * math.log(0.5 * ((1 - low) ** 2 + (1 - high) ** 2))
    assert almost_sure < 0 < mean_square
    path = run(random_loss, sgd(lr=1.0), 1.0, steps=1500, batches=random_curvatures(low=low, high=high))
    assert path.exponents[0].lower <= almost_sure <= path.exponents[0].upper
    found = profile_ensemble(
        lambda: Point(1.0),
        sgd(lr=1.0),
        lambda member: random_curvatures(member, low, high),
        steps=30,
        members=500,
        loss=random_loss,
    )
    assert found.kind == "mean square"
    assert found.lower <= mean_square <= found.upper
    assert found.lower > almost_sure


@pytest.mark.slow
def test_a_jordan_block_has_a_transient_peak():
    """At critical damping the companion matrix is a Jordan block: K(t, 0) ~ t rho^t rises before it falls."""
    beta = 0.9
    lr = (1 - math.sqrt(beta)) ** 2  # the two roots meet at sqrt(beta)
    reading = run(quadratic(1.0), sgd(lr=lr, momentum=beta), 1.0, steps=1500)
    w = reading.windows
    assert w.peak > math.log(1.5)
    assert 5 <= w.peak_step - reading.factors.steps[0] <= 60
    assert reading.verdict.kind == "exponentially stable"
    assert reading.exponents[0].value == pytest.approx(0.5 * math.log(beta), abs=2e-3)
    assert reading.energy.check(w).holds
    assert reading.energy.rate < 1  # an energy that dissipates although norms grow at first


@pytest.mark.slow
def test_a_jordan_block_with_eigenvalue_one_is_subexponential():
    """Momentum 1 and no curvature: a velocity is never lost, K(t, 0) grows like t. The exponent is 0 and says nothing of it."""
    reading = run(quadratic(0.0, 1.0), sgd(lr=0.1, momentum=1.0), 1.0, 1.0, steps=1200)
    assert reading.verdict.kind == "subexponential"
    assert abs(reading.exponents[0].value) < 0.01
    steps = reading.factors.steps - reading.factors.steps[0]
    flat = np.exp(reading.windows.path[-1])
    assert flat == pytest.approx(steps[-1], rel=0.02)  # [[1, 1], [0, 1]]^t in units of lr


@pytest.mark.slow
def test_a_flat_direction_is_bounded_and_nothing_more():
    reading = run(quadratic(1.0, 0.0), sgd(lr=0.5), 1.0, 1.0, steps=600)
    assert reading.exponents[0].value == pytest.approx(0.0, abs=1e-12)
    assert reading.verdict.kind == "profile-bounded"
    assert reading.verdict.constant == pytest.approx(1.0, abs=1e-6)


def test_growth_that_starts_late_is_seen_by_the_windows():
    """The curvature changes sign midway: K(T, 0) has not grown, but what entered midway has, by e^10."""

    def loss(model, step):
        return 0.5 * (1.0 if step < 300 else -1.0) * (model.theta**2).sum()

    reading = run(loss, sgd(lr=0.05), 1.0, steps=500, batches=list(range(500)))
    w = reading.windows
    assert w.path[-1] < 0.0
    assert w.start - 300 == 0
    assert w.end == 500
    assert w.sup == pytest.approx(200 * math.log(1.05), rel=1e-9)
    assert reading.verdict.kind not in {"exponentially stable", "profile-bounded"}


def test_weight_decay_moves_every_exponent():
    lr, wd = 0.1, 0.5
    reading = run(
        quadratic(4.0, 0.2), lambda m: torch.optim.SGD(m.parameters(), lr=lr, weight_decay=wd), 1.0, 1.0, steps=600
    )
    expected = [math.log(1 - lr * (c + wd)) for c in (0.2, 4.0)]
    assert [e.value for e in reading.exponents] == pytest.approx(expected, abs=1e-10)
