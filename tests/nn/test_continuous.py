"""Laws of continuous depth: steps within their limit, the rate of the flow, and that the one tends to the other."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    ContinuousDepth,
    DissipativeBlock,
    DissipativeField,
    GradientBlock,
    GradientField,
    InfNormField,
    field_bound,
    flow_bound,
    lipschitz,
    uniform_bound,
)
from tests.nn.catalogue import jacobian, operator_norm

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("make", "norm", "rate"),
    [
        (lambda: DissipativeField(3, rate=0.4, free=0.0), "l2", 0.4),
        (lambda: GradientField(3, strong=0.3), "l2", 0.3),
        (lambda: InfNormField(3, rate=0.5), "linf", 0.5),
    ],
)
def test_the_constant_of_the_steps_tends_to_that_of_the_flow(make: object, norm: str, rate: float) -> None:
    field = make()  # type: ignore[operator]
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.3 * torch.randn_like(p))
    m = field_bound(field, norm).rate.lower
    assert m >= rate * (1 - 1e-12)
    gaps = []
    for steps in (32, 128, 512):
        flow = ContinuousDepth(field, time=2.0, steps=steps)
        factor = flow.flow()
        assert factor.factor.upper == pytest.approx(math.exp(-2 * m), rel=1e-12)
        assert factor.rate.lower == pytest.approx(m, rel=1e-12)
        assert 2.0 in factor.time
        gaps.append(abs(math.log(lipschitz(flow, norm).upper / factor.factor.upper)))
    assert gaps[1] <= 0.3 * gaps[0]  # of first order in the step
    assert gaps[2] <= 0.3 * gaps[1]
    if norm == "l2" and rate == 0.3:
        assert lipschitz(flow, norm).upper == pytest.approx((1 - 2.0 / 512 * 0.3) ** 512, rel=1e-12)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
def test_the_states_tend_to_the_flow_in_the_order_of_the_method(method: str) -> None:
    """exp(tJ) of a linear field: one unit that is always active."""
    field = GradientField(3, activation="softplus")
    nn.init.constant_(field.bias, 60.0)  # slope 1 to the last digit
    A, x = field.weight.detach(), torch.randn(3)
    J = -A.mT @ A
    shift = torch.linalg.solve(J, A.mT @ field.bias.detach())  # f(h) = J h - A^T b
    exact = torch.matrix_exp(J) @ (x - shift) + shift
    errors = []
    for steps in (4, 8):
        with torch.no_grad():
            errors.append(float((ContinuousDepth(field, method=method, steps=steps)(x) - exact).norm()))
    order = {"euler": 1, "heun": 2, "rk4": 4}[method]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_it_takes_as_many_steps_as_the_limit_asks_for_and_stops_at_it_when_it_falls() -> None:
    field = GradientField(3)
    flow = ContinuousDepth(field, time=5.0)
    assert flow.steps == [3]  # the limit is 2
    assert flow.reached() == pytest.approx(5.0)
    nn.init.constant_(field.weight, 1.0)  # now the limit is 2 / 9
    assert flow.reached() == pytest.approx(3 * 2 / 9, rel=0.01)
    assert lipschitz(flow).upper <= 1.0
    assert flow.refine() == [23]
    assert flow.reached() == pytest.approx(5.0)
    assert lipschitz(flow).upper <= 1.0
    assert all(float(tau.detach()) <= 2 / 9 for tau in flow.step_sizes())
    assert "steps=[23]" in repr(flow)
    two = ContinuousDepth([GradientField(3), field], time=10.0)
    assert two.steps == [3, 23]


def test_steps_beyond_the_limit_are_refused_with_the_number_that_it_takes() -> None:
    field = GradientField(3)
    with pytest.raises(
        ValueError, match=r"steps=2 makes steps of 2.5, above the limit 1\.9\d* of Euler along GradientField. .* 3"
    ):
        ContinuousDepth(field, time=5.0, steps=2)
    assert ContinuousDepth(field, time=5.0, steps=3).steps == [3]
    half = ContinuousDepth(field, time=1.9, method="rk4", steps=1)
    assert lipschitz(half).upper == 1.0
    with pytest.raises(ValueError, match="above the limit"):
        ContinuousDepth(field, time=1.9, method="rk4_38", steps=1)
    for make, message in (
        (lambda: ContinuousDepth([]), "at least one field"),
        (lambda: ContinuousDepth([field, InfNormField(3)]), "limits in one norm"),
        (lambda: ContinuousDepth(field, time=0.0), "time must be"),
        (lambda: ContinuousDepth(field, steps=0), "steps must be an integer"),
        (lambda: ContinuousDepth(field, method="dopri5"), "circle contractivity radius 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="must be Fields, got Linear"):
        ContinuousDepth([nn.Linear(2, 2)])  # type: ignore[list-item]
    nn.init.constant_(field.weight, math.nan)
    with pytest.raises(ValueError, match="no number of steps reaches the time"):
        ContinuousDepth(field)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_no_jacobian_exceeds_the_bound_nor_that_of_the_flow_by_much(norm: str) -> None:
    fields = [DissipativeField(3, rate=0.5), DissipativeField(3, rate=0.1)]
    flow = ContinuousDepth(fields, time=1.0, steps=4)
    assert operator_norm(jacobian(flow, torch.randn(1, 3)), norm) <= lipschitz(flow, norm).upper * (1 + 1e3 * EPS)
    fine = ContinuousDepth(fields, time=1.0, method="ssprk33", steps=8)
    J = jacobian(fine, torch.randn(1, 3))
    assert operator_norm(J, "l2") <= fine.flow().factor.upper * (
        1 + 1e-3
    )  # the flow itself, but for the error of the steps
    mean = 0.5 * sum(field_bound(f, "l2").rate.lower for f in fields)
    assert fine.flow().rate.lower == pytest.approx(mean, rel=1e-9)
    assert fine.flow().factor.upper == pytest.approx(math.exp(-mean), rel=1e-9)


def test_the_flow_of_a_stack_is_that_of_its_fields() -> None:
    stack = nn.Sequential(*[DissipativeBlock(3, rate=0.3, depth=8) for _ in range(8)])
    taus = np.array([float(block.step_size().detach()) for block in stack])  # type: ignore[operator]
    rates = np.array([field_bound(block.field, "l2").rate.lower for block in stack])  # type: ignore[arg-type]
    flow = flow_bound(stack)
    assert flow.time.upper == pytest.approx(taus.sum())
    assert flow.factor.upper == pytest.approx(math.exp(-float(taus @ rates)), rel=1e-9)
    assert lipschitz(stack).upper == pytest.approx(flow.factor.upper, rel=0.05)
    with pytest.raises(UncertifiableError, match="blocks that step along a field, got GradientBlock"):
        flow_bound([GradientBlock(3)])
    assert flow_bound([]).factor.upper == 1.0


def test_what_holds_for_all_parameters() -> None:
    for flow, norm in (
        (ContinuousDepth(DissipativeField(3)), "l2"),
        (ContinuousDepth([InfNormField(3)] * 2, method="heun"), "linf"),
    ):
        bound = uniform_bound(flow, norm)
        assert bound is not None
        assert bound.upper == 1.0
        assert uniform_bound(flow, "l1") is None
    assert lipschitz(ContinuousDepth(GradientField(3)), "token_max").upper == 1.0


def test_training_never_leaves_the_limit_and_reaches_every_parameter() -> None:
    flow = ContinuousDepth([DissipativeField(3, rate=0.2), DissipativeField(3, rate=0.2)], time=2.0, steps=8)
    opt = torch.optim.SGD(flow.parameters(), lr=3.0)  # so large that it runs into the limit
    x, y = torch.randn(16, 3), 5 * torch.randn(16, 3)
    for _ in range(6):
        opt.zero_grad()
        (flow(x) - y).square().mean().backward()
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in flow.parameters())
        opt.step()
        assert lipschitz(flow).upper <= 1.0
    assert flow.reached() < 2.0
    flow.refine()
    assert flow.reached() == pytest.approx(2.0)


def test_copies_casts_and_transforms() -> None:
    flow = ContinuousDepth(GradientField(3), time=3.0)
    x = torch.randn(2, 3)
    torch.testing.assert_close(copy.deepcopy(flow)(x), flow(x))
    torch.testing.assert_close(torch.func.vmap(flow)(x), flow(x))
    assert copy.deepcopy(flow).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(flow).to("meta")(x.to("meta")).shape == (2, 3)
    with torch.device("meta"):
        ContinuousDepth(GradientField(3), steps=2)
        with pytest.raises(ValueError, match="meta device holds no numbers"):
            ContinuousDepth(GradientField(3))


@pytest.mark.slow
def test_compilation_and_export_keep_the_map() -> None:
    flow, x = ContinuousDepth(GradientField(3), time=3.0), torch.randn(2, 3)
    exported = torch.export.export(flow, (x,)).module()
    for other in (torch.compile(flow, backend="eager", fullgraph=True), exported):
        torch.testing.assert_close(other(x), flow(x))
