"""Laws of the learnable spline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.nn import lipschitz_rule
from stableopt.nn.splines import LinearSpline, largest_below
from stableopt.nn.uniform import uniform_bound
from tests.nn import module_laws as laws
from tests.nn.catalogue import jacobian
from tests.nn.module_laws import EPS, NORMS


def spline(channels: int = 3, knots: int = 7, scale: float = 0.6, **options: float) -> LinearSpline:
    """One with random slopes and biases; a scale above the limit makes it clip."""
    module = LinearSpline(channels, knots=knots, **options)
    nn.init.normal_(module.slopes, std=scale)
    nn.init.normal_(module.bias)
    return module


def _shrink(module: nn.Module) -> None:
    """Move all slopes inside the limit, where none is clipped."""
    with torch.no_grad():
        module.slopes.mul_(0.9).add_(0.05)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3,)),
        ({"scale": 9.0}, (3, 2, 2)),
        ({"scale": 9.0, "limit": 0.25, "span": 0.5}, (3,)),
        ({"limit": 4.0, "scale": 9.0}, (3,)),
    ],
)
def test_nothing_is_stretched_by_more_than_the_constant(options: dict, shape: tuple, norm: str) -> None:
    module = spline(**options)
    assert laws.constant(module, norm) <= module.limit
    laws.check_pairs(module, shape, norm)
    laws.check_jacobians(module, shape, norm)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo instantiates Function
def test_copies_devices_and_gradients() -> None:
    laws.check_copies(spline(scale=3.0), (3, 2))
    laws.check_devices_and_dtypes(spline(), (3, 2))
    laws.check_gradients(spline(knots=3, span=1.0, scale=0.2), (3,))
    laws.check_gradients(LinearSpline(2, knots=3, span=1.0, limit=1.5, init="relu").apply(_shrink), (2, 4))


@given(
    slopes=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    bias=st.floats(-2, 2),
    x=st.floats(-9, 9),
    limit=st.floats(0.1, 2),
)
def test_it_is_the_integral_of_its_clipped_slopes(slopes: list[float], bias: float, x: float, limit: float) -> None:
    module = LinearSpline(1, knots=5, span=2.0, limit=limit)
    with torch.no_grad():
        module.slopes.copy_(torch.tensor([slopes]))
        module.bias.fill_(bias)
    clipped = np.clip(slopes, -limit, limit)
    edges = [-math.inf, -2.0, -1.0, 0.0, 1.0, 2.0, math.inf]
    total = bias
    for slope, low, high in zip(clipped, edges[:-1], edges[1:], strict=True):  # the literal twin: one piece at a time
        part = max(0.0, min(high, max(x, 0.0)) - max(low, min(x, 0.0)))
        total += math.copysign(slope, slope * x) * abs(part) if x else 0.0
    assert float(module(torch.tensor([[x]])).detach()) == pytest.approx(total, rel=1e-13, abs=1e-13)


def test_the_limit_is_attained_and_one_step_more_breaks_it() -> None:
    module = spline(1, scale=0.1)
    with torch.no_grad():
        module.slopes[0, 3] = 50.0  # clipped
    middle = torch.tensor([[-0.5]])
    assert float(jacobian(module, middle)) == 1.0
    assert laws.constant(module, "l2") == 1.0
    assert laws.attained(module, middle, "l2") == 1.0
    loose = LinearSpline(1, knots=7, limit=math.nextafter(1.0, 2.0))
    loose.load_state_dict(module.state_dict())
    assert float(jacobian(loose, middle)) > 1.0
    assert laws.constant(loose, "l2") > 1.0


def test_the_constant_is_the_largest_slope_in_force() -> None:
    module = spline(scale=0.3)
    exact = float(module.limited_slopes().detach().abs().max())
    assert exact < 1
    assert lipschitz_rule(module, "linf").lower == lipschitz_rule(module, "linf").upper == exact
    widest = max(
        laws.matrix_norm(jacobian(module, torch.full((1, 3), t)), "l2")
        for t in (-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0)
    )
    assert widest == exact


@pytest.mark.parametrize("init", ["abs", "identity", "relu"])
def test_the_functions_at_the_start(init: str) -> None:
    x = torch.linspace(-7, 7, 113)[:, None]
    expected = {"abs": x.abs(), "identity": x, "relu": x.relu()}[init]
    for limit in (1.0, 0.5):
        torch.testing.assert_close(LinearSpline(1, init=init, limit=limit)(x), limit * expected, rtol=0, atol=1e-14)


def test_pieces_meet_at_the_knots() -> None:
    module = spline(1, knots=9, span=2.0)
    for knot in torch.linspace(-2, 2, 9).tolist():
        y = module(torch.tensor([[math.nextafter(knot, -9)], [knot], [math.nextafter(knot, 9)]]))
        assert float((y.max() - y.min()).detach()) <= 32 * EPS
    zero = module(torch.zeros(1, 1))
    torch.testing.assert_close(zero, module.bias[None], rtol=0, atol=4 * EPS)


def test_float64_is_computed_in_float64_whatever_the_default_is() -> None:
    module = spline(1, knots=11, span=0.7).double()
    x = torch.cat([3 * torch.randn(500, 1), torch.linspace(-0.7, 0.7, 11)[:, None]])
    s, b, h = module.limited_slopes().detach()[0], module.bias.detach(), 1.4 / 10
    exact = b + s[0] * (x + 0.7).clamp_max(0) + s[-1] * (x - 0.7).clamp_min(0)  # one hinge per piece
    for k in range(10):
        left = -0.7 + k * h
        exact = exact + s[k + 1] * ((x - left).clamp(0, h) - min(max(0.0 - left, 0.0), h))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        y = module(x).detach()
        knots = torch.tensor([-0.7 + k * h for k in range(11)], dtype=torch.float64)[:, None]
        jump = (module(knots + 1e-13) - module(knots - 1e-13)).abs().max().detach()
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-14)
    assert float(jump) <= 1e-12


@given(limit=st.floats(1e-300, 1e300))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_limit_is_rounded_down_to_the_largest_number_below(dtype: torch.dtype, limit: float) -> None:
    low = torch.tensor(largest_below(limit, dtype), dtype=dtype)
    assert float(low) == largest_below(limit, dtype) <= limit
    above = torch.nextafter(low, torch.full_like(low, math.inf))
    assert float(above) > limit or not above.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [0.1, 0.7, 1.0, 3.3, 1e-5])
def test_no_slope_in_force_exceeds_the_limit_in_any_dtype(dtype: torch.dtype, limit: float) -> None:
    module = spline(2, scale=9.0, limit=limit).to(dtype)
    steepest = float(module.limited_slopes().detach().double().abs().max())
    assert steepest <= limit
    assert lipschitz_rule(module, "l2").upper == steepest
    assert uniform_bound(module).upper == limit
    if dtype in {torch.float64, torch.float32}:
        x = torch.tensor([[-9.0, -9.0]], dtype=dtype)
        assert float(jacobian(module, x).abs().max()) <= limit


def test_a_clipped_slope_comes_back_but_never_goes_out() -> None:
    module = LinearSpline(1, knots=3, span=1.0)
    with torch.no_grad():
        module.slopes.copy_(torch.tensor([[1.0, 5.0, -7.0, 0.5]]))
    y = module.limited_slopes()
    for cotangent, expected in (
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]),  # descent would lower each: inward except at the lower limit
        ([-1.0, -1.0, -1.0, -1.0], [0.0, 0.0, -1.0, -1.0]),
    ):
        (grad,) = torch.autograd.grad(y, module.slopes, torch.tensor([cotangent]), retain_graph=True)
        assert grad.tolist() == [expected]
    with torch.no_grad():
        module.slopes.copy_(torch.tensor([[1.0, 1.6, -1.5, 0.5]]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    x = torch.linspace(-2, 2, 41)[:, None]
    for _ in range(1200):  # fits x/2 from slopes that start outside
        optimizer.zero_grad()
        ((module(x) - 0.5 * x) ** 2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(module.limited_slopes(), torch.full((1, 4), 0.5), rtol=0, atol=1e-3)


def test_forward_derivatives_by_the_slopes_are_those_of_clipping() -> None:
    module = spline(2, scale=1.5)
    x, state = torch.randn(6, 2), dict(module.named_parameters())
    primal, tangent = module.slopes.detach(), torch.randn_like(module.slopes)

    def f(slopes: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {**state, "slopes": slopes}, (x,))

    _, forward = torch.func.jvp(f, (primal,), (tangent,))
    inside = tangent * (primal.abs() <= 1)
    difference = (f(primal + 1e-6 * inside) - f(primal - 1e-6 * inside)) / 2e-6
    torch.testing.assert_close(forward, difference, rtol=0, atol=1e-8)


def test_batched_and_second_derivatives_work() -> None:
    module = spline(2)
    x = torch.randn(5, 2)
    state = dict(module.named_parameters())

    def loss(parameters: dict, row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (row,)).square().sum()

    batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)
    for i, row in enumerate(x):
        single = torch.func.grad(loss)(state, row)
        for name, value in single.items():
            torch.testing.assert_close(batched[name][i], value)
    hessian = torch.func.hessian(lambda b: loss({**state, "bias": b}, x))(module.bias.detach())
    torch.testing.assert_close(hessian, 10 * torch.eye(2))  # two times five rows


def test_nan_stays_nan_and_far_inputs_stay_finite() -> None:
    module = spline(1)
    y = module(torch.tensor([[math.nan], [1e300], [-1e300]]))
    assert y.isnan().flatten().tolist() == [True, False, False]
    assert y[1:].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be an integer"),
        ({"channels": 1.0}, "channels must be an integer"),
        ({"channels": True}, "channels must be an integer"),
        ({"channels": 1, "knots": 4}, "knots must be an odd integer"),
        ({"channels": 1, "knots": 1}, "knots must be an odd integer"),
        ({"channels": 1, "knots": 3.0}, "knots must be an odd integer"),
        ({"channels": 1, "span": 0.0}, "span must be positive"),
        ({"channels": 1, "limit": math.inf}, "limit must be positive"),
        ({"channels": 1, "limit": -1.0}, "limit must be positive"),
        ({"channels": 1, "init": "hat"}, "init must be one of"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSpline(**options)


def test_wrong_inputs_and_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="built for 3 channels, got 2"):
        LinearSpline(3)(torch.zeros(1, 2))
    for name in ("slopes", "bias"):
        module = LinearSpline(2)
        nn.init.constant_(getattr(module, name), math.nan)
        with pytest.raises(ValueError, match="NaN or infinite"):
            lipschitz_rule(module, "l2")
