"""Steps to zero: orders and limits that are known, in depth and in learning rate, within the intervals that are stated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.lyapunov.profile.studies.steps import depth_study, lr_study
from tests.lyapunov.profile.studies.test_flow import expm

Field = Callable[[float, Tensor], Tensor]


def euler(f: Field) -> Callable[[float, int], Callable[[Tensor], Tensor]]:
    def stack(step: float, blocks: int) -> Callable[[Tensor], Tensor]:
        def net(h: Tensor) -> Tensor:
            for l in range(blocks):
                h = h + step * f(step * l, h)
            return h

        return net

    return stack


def runge_kutta(f: Field) -> Callable[[float, int], Callable[[Tensor], Tensor]]:
    def stack(step: float, blocks: int) -> Callable[[Tensor], Tensor]:
        def net(h: Tensor) -> Tensor:
            for l in range(blocks):
                t = step * l
                a = f(t, h)
                b = f(t + step / 2, h + step / 2 * a)
                c = f(t + step / 2, h + step / 2 * b)
                d = f(t + step, h + step * c)
                h = h + step / 6 * (a + 2 * b + 2 * c + d)
            return h

        return net

    return stack


A = torch.tensor([[-1.0, 3.0], [0.0, -1.5]], dtype=torch.float64)


def linear(t: float, h: Tensor) -> Tensor:
    return A @ h


def test_residual_blocks_tend_to_their_flow_at_order_one() -> None:
    study = depth_study(euler(linear), torch.tensor([1.0, 2.0]), time=2.0, flow=linear)
    for part in (study.state, study.rate):
        assert part.agrees
        assert part.interval[0] <= 1.0 <= part.interval[1]
        assert part.order_error < 0.25
    exact = expm(2.0 * A.numpy())
    assert study.rate.limit == pytest.approx(math.log(np.linalg.norm(exact, 2)) / 2, abs=study.rate.limit_error)
    np.testing.assert_allclose(study.state.limit, exact @ [1.0, 2.0], atol=study.state.limit_error)
    # not normal: the logarithmic norm is a bound, and not attained
    assert study.log_norm == pytest.approx(np.linalg.eigvalsh(0.5 * (A + A.T).numpy())[-1], abs=1e-9)
    assert study.holds
    assert float(study.rate.limit) < study.log_norm - 0.1
    json.dumps(study.as_dict(), allow_nan=False)
    assert str(study).splitlines()[2].endswith("holds")


def test_a_normal_field_attains_its_logarithmic_norm() -> None:
    S = torch.diag(torch.tensor([-0.5, -2.0]))
    study = depth_study(euler(lambda t, h: S @ h), torch.ones(2), flow=lambda t, h: S @ h, counts=(8, 16, 24, 32, 48))
    assert study.holds
    assert float(study.rate.limit) == pytest.approx(study.log_norm, abs=study.rate.limit_error + study.log_norm_error)


def test_blocks_of_runge_and_kutta_have_order_four() -> None:
    def f(t: float, h: Tensor) -> Tensor:
        return torch.tanh(A @ h) * (1 + 0.5 * math.cos(t))

    study = depth_study(runge_kutta(f), torch.tensor([1.0, 2.0]), time=1.0, counts=(8, 12, 16, 24, 32, 48), flow=f)
    for part in (study.state, study.rate):
        assert part.agrees
        assert part.interval[0] <= 4.0 <= part.interval[1]
        assert not part.interval[0] <= 3.0
    assert study.holds


def test_a_wrong_flow_is_seen() -> None:
    study = depth_study(
        euler(linear), torch.tensor([1.0, 2.0]), flow=lambda t, h: 1.01 * (A @ h), counts=(8, 16, 24, 32, 48)
    )
    assert study.state.agrees is False
    assert study.rate.agrees is False
    assert study.rate.verdict == "converges"


def test_weights_drawn_anew_have_no_limit() -> None:
    def stack(step: float, blocks: int) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(blocks)
        weights = [torch.randn(2, 2, generator=generator) for _ in range(blocks)]

        def net(h: Tensor) -> Tensor:
            for W in weights:
                h = h + step * torch.tanh(W @ h)
            return h

        return net

    study = depth_study(stack, torch.tensor([1.0, 2.0]), counts=(8, 16, 32, 64, 128, 256))
    assert study.state.verdict == "inconclusive"
    assert study.holds is None
    assert study.reason == "no flow was given"
    assert math.isnan(study.log_norm)
    json.dumps(study.as_dict(), allow_nan=False)


def test_one_direction_grows_no_faster_than_all() -> None:
    v, counts = torch.tensor([1.0, -1.0]), (8, 16, 24, 32, 48)
    one = depth_study(euler(linear), torch.tensor([1.0, 2.0]), flow=linear, direction=v, counts=counts)
    all_ = depth_study(euler(linear), torch.tensor([1.0, 2.0]), counts=counts)
    exact = expm(A.numpy()) @ v.numpy()
    assert one.rate.limit == pytest.approx(math.log(np.linalg.norm(exact) / math.sqrt(2)), abs=one.rate.limit_error)
    assert one.rate.agrees
    assert float(one.rate.limit) <= float(all_.rate.limit)


def quadratic(H: Tensor) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

    return Point, lambda model: 0.5 * model.w @ H @ model.w  # type: ignore[operator]


H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
MU = float(torch.linalg.eigvalsh(H)[0])


def test_gradient_descent_tends_to_the_gradient_flow_at_order_one() -> None:
    model, loss = quadratic(H)
    study = lr_study(
        model, lambda m, step: torch.optim.SGD(m.parameters(), lr=step), loss, time=1.0, counts=(16, 24, 32, 48, 64)
    )
    exact = expm(-H.numpy())
    np.testing.assert_allclose(study.state.limit, exact @ [1.0, -2.0], atol=study.state.limit_error)
    assert study.rate.limit == pytest.approx(-MU, abs=study.rate.limit_error)
    # GD itself: log(1 - step mu) / step, to the last digits
    for step, value in zip(study.rate.steps, study.rate.values, strict=True):
        assert value == pytest.approx(math.log1p(-step * MU) / step, abs=1e-12)
    for part in (study.state, study.rate):
        assert part.interval[0] <= 1.0 <= part.interval[1]
    assert study.log_norm == pytest.approx(-MU, abs=1e-12)
    assert study.holds


@pytest.mark.slow
def test_a_fixed_momentum_tends_to_the_same_flow_faster() -> None:
    model, loss = quadratic(H)
    study = lr_study(
        model,
        lambda m, step: torch.optim.SGD(m.parameters(), lr=step, momentum=0.5),
        loss,
        time=1.0,
        counts=(32, 64, 96, 128, 192),
    )
    assert study.rate.limit == pytest.approx(-2 * MU, abs=study.rate.limit_error)
    np.testing.assert_allclose(study.state.limit, expm(-2 * H.numpy()) @ [1.0, -2.0], atol=study.state.limit_error)
    assert study.rate.interval[0] <= 1.0 <= study.rate.interval[1]
    assert study.holds
    assert study.log_norm == pytest.approx(-2 * MU, abs=1e-12)


@pytest.mark.slow
def test_a_momentum_that_tends_to_one_tends_to_the_damped_oscillator() -> None:
    model, loss = quadratic(H)
    gamma, time = 1.0, 2.0
    study = lr_study(
        model,
        lambda m, h: torch.optim.SGD(m.parameters(), lr=h * h, momentum=1 - gamma * h),
        loss,
        time=time,
        counts=(48, 64, 96, 128, 192),
    )
    block = np.block([[np.zeros((2, 2)), np.eye(2)], [-H.numpy(), -gamma * np.eye(2)]])
    exact = expm(time * block)[:2, :2]  # from rest
    np.testing.assert_allclose(study.state.limit, exact @ [1.0, -2.0], atol=study.state.limit_error)
    assert study.rate.limit == pytest.approx(math.log(np.linalg.norm(exact, 2)) / time, abs=study.rate.limit_error)
    assert study.state.interval[0] <= 1.0 <= study.state.interval[1]
    assert "at one momentum" in study.reason
    assert study.holds is None


@pytest.mark.slow
def test_adam_tends_to_its_own_flow() -> None:
    model, loss = quadratic(H)
    eps = 1.0  # of the size of the gradient: else the flow is that of signs, with kinks
    study = lr_study(
        model,
        lambda m, step: torch.optim.Adam(m.parameters(), lr=step, betas=(0.5, 0.6), eps=eps),
        loss,
        time=1.0,
        counts=(64, 96, 128, 192, 256),
    )
    flow = depth_study(
        euler(lambda t, w: -(H @ w) / ((H @ w).abs() + eps)), torch.tensor([1.0, -2.0]), counts=(8, 16, 24, 32, 48, 64)
    )
    assert np.linalg.norm(study.state.limit - flow.state.limit) <= study.state.limit_error + flow.state.limit_error
    assert abs(float(study.rate.limit) - float(flow.rate.limit)) <= study.rate.limit_error + flow.rate.limit_error
    assert "is no gradient flow" in study.reason


@pytest.mark.slow
def test_a_net_obeys_the_logarithmic_norm_of_its_loss() -> None:
    x, y = torch.randn(20, 3), torch.randint(2, (20,))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(x), y)

    study = lr_study(
        model, lambda m, step: torch.optim.SGD(m.parameters(), lr=step), loss, time=2.0, counts=(16, 24, 32, 48, 64)
    )
    assert study.holds
    assert study.log_norm > 0  # not convex
    assert study.state.interval[0] <= 1.0 <= study.state.interval[1]


def test_what_cannot_be_studied_is_refused_with_a_sentence() -> None:
    model, loss = quadratic(H)

    def sgd(m: nn.Module, step: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(m.parameters(), lr=step)

    with pytest.raises(ValueError, match="time must be a finite number"):
        lr_study(model, sgd, loss, time=0.0)
    with pytest.raises(ValueError, match="counts must be distinct integers"):
        lr_study(model, sgd, loss, time=1.0, counts=(4, 4, 8))
    with pytest.raises(ValueError, match="the same parameters each time"):
        lr_study(lambda: Different(), sgd, lambda m: m.w.square().sum(), time=1.0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="nothing is known about the update of Rprop"):
        lr_study(model, lambda m, step: torch.optim.Rprop(m.parameters(), lr=step), loss, time=1.0)
    with pytest.raises(ValueError, match="keeps the shape"):
        depth_study(lambda step, blocks: lambda h: h[:1], torch.ones(2))
    with pytest.raises(ValueError, match="513 numbers is not written down"):
        depth_study(euler(linear), torch.ones(513))
    with pytest.raises(ValueError, match="not all zero"):
        depth_study(euler(linear), torch.ones(2), direction=torch.zeros(2))


class Different(nn.Module):
    count = 0

    def __init__(self) -> None:
        super().__init__()
        Different.count += 1
        self.w = nn.Parameter(torch.full((2,), float(Different.count)))


@pytest.mark.slow
def test_the_same_masks_are_drawn_in_each_step_and_no_random_number_is_used_up() -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 3, bias=False), nn.Dropout(0.5), nn.Linear(3, 1, bias=False))

    x, before = torch.randn(4, 2), torch.get_rng_state()
    study = lr_study(
        model,
        lambda m, step: torch.optim.SGD(m.parameters(), lr=step),
        lambda m: m(x).square().mean(),
        time=1.0,
        counts=(32, 48, 64, 96, 128),
    )
    assert torch.equal(before, torch.get_rng_state())
    assert study.state.verdict == "converges"  # with new masks each time nothing would
