"""Laws of the activations: GroupSort, MaxMin, Abs, SoftAbs, NActivation, Householder, Scale, and torch's own constants."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import flint
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn import GroupSort, Scale, lipschitz, lipschitz_rule
from stableopt.nn.activation_constants import HARDSWISH_SLOPE, MISH_SLOPE, SELU_SLOPE, activation_constant
from stableopt.nn.activations import Abs, MaxMin, NActivation, SoftAbs, channel_dim, channelwise
from stableopt.nn.householder import Householder, unit_rows
from tests.nn import module_laws as laws
from tests.nn.catalogue import jacobian
from tests.nn.module_laws import EPS, NORMS


def householder(channels: int, group_size: int = 2) -> Householder:
    """One with random directions, so that its hyperplanes are generic."""
    module = Householder(channels, group_size)
    nn.init.normal_(module.direction)
    return module


def zigzag(channels: int) -> NActivation:
    module = NActivation(channels)
    nn.init.normal_(module.thresholds)
    return module


OURS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("groupsort", lambda: GroupSort(3), (6, 2)),
    ("maxmin", MaxMin, (6,)),
    ("abs", Abs, (5,)),
    ("abs of some", lambda: Abs(0.5), (5, 2)),
    ("soft abs", lambda: SoftAbs(0.3), (5,)),
    ("zigzag", lambda: zigzag(4), (4,)),
    ("zigzag image", lambda: zigzag(3), (3, 2, 2)),
    ("zigzag initial", lambda: NActivation(3), (3,)),
    ("householder", lambda: householder(6), (6,)),
    ("householder 3", lambda: householder(6, 3), (6, 2)),
    ("householder image", lambda: householder(4, 4), (4, 2, 1)),
    ("scale", lambda: Scale(-0.5), (3,)),
]
ORTHOGONAL = {name for name, *_ in OURS} - {"soft abs", "scale"}


def cases() -> list[object]:
    return [pytest.param(make, shape, id=name) for name, make, shape in OURS]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("make", "shape"), cases())
def test_nothing_is_stretched_by_more_than_the_constant(make: Callable[[], nn.Module], shape: tuple, norm: str) -> None:
    laws.check_pairs(make(), shape, norm)
    laws.check_jacobians(make(), shape, norm)


@pytest.mark.parametrize(("make", "shape"), cases())
def test_copies_states_and_compiled_calls_agree(make: Callable[[], nn.Module], shape: tuple) -> None:
    laws.check_copies(make(), shape)


@pytest.mark.parametrize(("make", "shape"), cases())
def test_every_device_and_dtype_works(make: Callable[[], nn.Module], shape: tuple) -> None:
    laws.check_devices_and_dtypes(make(), shape)


@pytest.mark.parametrize(("make", "shape"), cases())
def test_gradients_are_right_and_no_parameter_is_dead(make: Callable[[], nn.Module], shape: tuple) -> None:
    laws.check_gradients(make(), shape)


@pytest.mark.parametrize("name", sorted(ORTHOGONAL))
def test_the_norm_of_a_gradient_is_kept(name: str) -> None:
    make, shape = next((make, shape) for other, make, shape in OURS if other == name)
    assert laws.keeps_gradient_norms(make(), shape)
    assert laws.constant(make(), "l2") == 1.0


# GroupSort and MaxMin.


@given(
    groups=st.integers(1, 4), size=st.integers(2, 5), tail=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99)
)
def test_each_group_holds_the_same_numbers_in_order(groups: int, size: int, tail: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups * size, *tail, generator=generator)
    y = GroupSort(size)(x)
    for g in range(groups):  # the literal twin
        part = slice(g * size, (g + 1) * size)
        torch.testing.assert_close(y[:, part], x[:, part].sort(dim=1).values, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_the_jacobian_is_a_permutation_within_groups(size: int) -> None:
    J = jacobian(GroupSort(size), torch.randn(1, 2 * size))
    torch.testing.assert_close(J @ J.T, torch.eye(2 * size), rtol=0, atol=0)
    assert not J[:size, size:].any()


def test_a_vector_is_sorted_along_its_only_dimension() -> None:
    assert GroupSort(2)(torch.tensor([2.0, 1.0, 0.0, 5.0])).tolist() == [1.0, 2.0, 0.0, 5.0]


def test_a_tie_gets_a_convex_combination_of_gradients() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    GroupSort(2)(x)[0, 0].backward()
    assert x.grad is not None
    assert (x.grad >= 0).all()
    assert float(x.grad.sum()) == 1.0


@pytest.mark.parametrize("bad", [1, 0, -2, 2.0, True, "2"])
def test_a_group_size_that_sorts_nothing_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="group_size must be an integer >= 2"):
        GroupSort(bad)  # type: ignore[arg-type]


def test_channels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by 2, got 3 in dimension 1 of shape \(1, 3\)"):
        GroupSort(2)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="0-d"):
        GroupSort(2)(torch.tensor(1.0))


def test_maxmin_is_groupsort_of_pairs_and_has_its_rule() -> None:
    x = torch.randn(3, 4, 2)
    torch.testing.assert_close(MaxMin()(x), GroupSort(2)(x), rtol=0, atol=0)
    assert lipschitz(MaxMin()) == lipschitz(GroupSort(2)) == Bound.point(1.0)
    assert str(MaxMin()) == "MaxMin()"


# Scale, Abs, SoftAbs.


def test_the_scale_factor_is_a_finite_setting() -> None:
    assert Scale(-2).factor == -2.0
    assert Scale(3.0).state_dict() == {}
    assert Scale(-2.0)(torch.tensor([1.5])).tolist() == [-3.0]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="factor must be finite"):
            Scale(bad)


@pytest.mark.parametrize("module", [GroupSort(2), GroupSort(3), Scale(0.5), MaxMin(), Abs(0.5), SoftAbs(0.2)])
def test_copies_compute_the_same(module: torch.nn.Module) -> None:
    x = torch.randn(3, 6, 2)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.compile(module, backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    assert str(module).startswith(type(module).__name__ + "(")
    assert module.to("meta")(x.to("meta")).shape == x.shape


def test_a_fraction_of_the_channels_is_folded() -> None:
    x = -torch.ones(2, 5, 3)
    assert Abs(0.5)(x)[0, :, 0].tolist() == [1.0, 1.0, -1.0, -1.0, -1.0]
    assert Abs(0.5)(x[0, :, 0]).tolist() == [1.0, 1.0, -1.0, -1.0, -1.0]
    assert torch.equal(Abs(0.1)(x), x)
    assert torch.equal(Abs()(x), x.abs())
    assert float(Abs()(torch.tensor(-3.0))) == 3.0
    with pytest.raises(ValueError, match="0-d"):
        Abs(0.5)(torch.tensor(1.0))


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5, math.nan])
def test_a_fraction_outside_its_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="fraction must lie in"):
        Abs(bad)


def test_the_smooth_absolute_value_is_its_formula_and_reaches_slope_one() -> None:
    delta, x = 0.3, torch.linspace(-5, 5, 101)
    torch.testing.assert_close(SoftAbs(delta)(x), (x**2 + delta**2).sqrt() - delta)
    assert laws.attained(SoftAbs(delta), torch.tensor([[1e7]]), "l2") >= 1 - 1e-14
    assert float(SoftAbs(delta)(torch.tensor(1e300))) == 1e300  # the square would overflow
    torch.testing.assert_close(jacobian(SoftAbs(delta), torch.tensor([delta])), torch.tensor([[math.sqrt(0.5)]]))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_delta_that_is_not_positive_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="delta must be positive"):
        SoftAbs(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_beyond_half_precision_do_not_spoil_half_inputs(dtype: torch.dtype) -> None:
    x = torch.tensor([[-300.0], [0.5], [300.0]], dtype=dtype)
    torch.testing.assert_close(SoftAbs(1e5)(x), SoftAbs(1e5)(x.float()).to(dtype))
    assert SoftAbs(1e5)(x).isfinite().all()
    for init in ((-1e5, 1e5), (-1e5, 0.0)):
        y = NActivation(1, init=init).float()(x)
        assert y.dtype == dtype
        assert y.tolist() == NActivation(1, init=init)(x.double()).tolist()


def test_at_a_tie_a_pair_shares_its_gradient() -> None:
    """The statement of the docstring: (1, -1) goes to (0, 0)."""
    J = jacobian(MaxMin(), torch.ones(1, 2))
    assert J.tolist() == [[0.5, 0.5], [0.5, 0.5]]


# NActivation.


@given(a=st.floats(-5, 5), b=st.floats(-5, 5), x=st.floats(-20, 20))
def test_the_zigzag_is_its_three_pieces(a: float, b: float, x: float) -> None:
    module = NActivation(1, init=(a, b))
    l, u = min(a, b), max(a, b)
    expected = x - 2 * l if x <= l else x - 2 * u if x >= u else -x
    assert float(module(torch.tensor([[x]])).detach()) == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_the_zigzag_contains_the_identity_and_both_absolute_values() -> None:
    x = torch.linspace(-3, 3, 61)[:, None]
    for init, expected in (((0.0, 0.0), x), ((-100.0, 0.0), x.abs()), ((0.0, 100.0), -x.abs())):
        torch.testing.assert_close(NActivation(1, init=init)(x), expected, rtol=0, atol=0)


def test_the_thresholds_meet_and_are_learned_apart() -> None:
    module = NActivation(1, init=(0.0, 0.0))
    x = torch.tensor([[-2.0], [-1.0], [3.0]])
    module(x).sum().backward()
    assert module.thresholds.grad is not None
    assert module.thresholds.grad.flatten().tolist() == [-4.0, -2.0]  # two inputs below, one above
    for threshold in (-0.7, 0.4):  # continuous at both
        module = NActivation(1, init=(-0.7, 0.4))
        near = torch.tensor([[threshold - 1e-9], [threshold + 1e-9]])
        assert float(module(near).diff(dim=0).abs().detach()) <= 3e-9


def test_a_slope_just_past_one_would_break_the_constant() -> None:
    """The two sides: the zigzag is an isometry on each piece; 1 % more is seen by the check."""
    x = torch.tensor([[-4.0], [-3.0]])
    f = zigzag(1).requires_grad_(False)
    nn.init.zeros_(f.thresholds)
    assert float((f(x[0:1]) - f(x[1:2])).abs()) == float((x[0] - x[1]).abs())
    assert float((1.01 * f(x[0:1]) - 1.01 * f(x[1:2])).abs()) > laws.constant(f, "l2")


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_a_number_of_channels_that_is_none_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="channels must be an integer"):
        NActivation(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channels must be an integer"):
        Householder(bad)  # type: ignore[arg-type]


def test_wrong_thresholds_and_channels_are_refused() -> None:
    for bad in ((math.nan, 0.0), (0.0, math.inf), (0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="two finite thresholds"):
            NActivation(1, init=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"built for 3 channels, got 2 in dimension 1 of shape \(1, 2\)"):
        NActivation(3)(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="0-d"):
        NActivation(1)(torch.tensor(0.0))
    module = NActivation(1)
    for bad in (math.nan, math.inf):
        nn.init.constant_(module.thresholds, bad)
        with pytest.raises(ValueError, match="NaN or infinite"):
            lipschitz_rule(module, "l2")


def test_channels_are_found_where_torch_has_them() -> None:
    assert channel_dim(torch.zeros(3), 3, "x") == 0
    assert channel_dim(torch.zeros(5, 3, 7), 3, "x") == 1
    assert channelwise(torch.ones(3), torch.zeros(3)).shape == (3,)
    assert channelwise(torch.ones(3), torch.zeros(5, 3, 7, 7)).shape == (3, 1, 1)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(zigzag(3)(x)[1, :, 2].shape, torch.Size([3]))


# Householder.


@pytest.mark.parametrize("size", [2, 3, 4])
def test_householder_is_a_reflection_on_the_negative_side_only(size: int) -> None:
    module = householder(2 * size, size)
    x = torch.randn(50, 2 * size)
    y = module(x)
    for group in range(2):  # the literal twin
        part = slice(group * size, (group + 1) * size)
        d = module.direction.detach()[group]
        R = torch.eye(size) - 2 * torch.outer(d, d) / (d @ d)
        for row, image in zip(x[:, part], y[:, part], strict=True):
            torch.testing.assert_close(image, row if d @ row >= 0 else R @ row)
    assert (y.unflatten(1, (2, size)) * module.direction).sum(2).min() >= -1e-12  # the image lies on the positive side


def test_householder_starts_as_maxmin() -> None:
    x = torch.randn(20, 6, 3)
    torch.testing.assert_close(Householder(6)(x), MaxMin()(x))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_the_constant_of_householder_is_attained_on_the_negative_side(size: int, norm: str) -> None:
    module = householder(size, size)
    x = -module.direction.detach().reshape(1, -1)
    exact = laws.attained(module, x, norm)
    J = jacobian(module, x)
    if laws.matrix_norm(J, norm) > 1:
        assert exact == pytest.approx(1.0, rel=1e-13)
    assert 1.0 <= laws.constant(module, norm) <= math.sqrt(size) * (1 + 4 * EPS)


def test_the_largest_constant_of_a_pair_is_the_root_of_two() -> None:
    module = Householder(2)
    theta = math.pi / 4  # |cos| + |sin| is largest
    with torch.no_grad():
        module.direction.copy_(torch.tensor([[math.sin(theta / 2), -math.cos(theta / 2)]]))
    assert laws.constant(module, "linf") == pytest.approx(math.sqrt(2), rel=1e-15)
    assert laws.constant(Householder(2), "linf") == pytest.approx(1.0, rel=1e-15)


def test_the_length_of_a_direction_does_not_matter() -> None:
    x = torch.randn(9, 4)
    module = householder(4)
    expected = module(x)
    for factor in (1e-200, 1e200, 2.0**-1060):
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.direction.mul_(factor)
        if factor > 1e-300:
            torch.testing.assert_close(other(x), expected)
        assert other(x).isfinite().all()
        assert laws.constant(other, "linf") <= math.sqrt(2) * (1 + EPS)


def test_a_direction_of_zero_is_the_identity_with_finite_gradients() -> None:
    module = Householder(2)
    nn.init.zeros_(module.direction)
    x = torch.randn(4, 2)
    y = module(x)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    y.sum().backward()
    assert module.direction.grad is not None
    assert module.direction.grad.isfinite().all()
    assert [lipschitz_rule(module, norm).upper for norm in NORMS] == [1.0, 1.0, 1.0]
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_householder_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="divisible by group_size, got 3 and 2"):
        Householder(3)
    with pytest.raises(ValueError, match="group_size must be an integer >= 2"):
        Householder(4, 1)
    for shape in ((2, 3), ()):
        with pytest.raises(ValueError, match="built for 4 channels"):
            Householder(4)(torch.zeros(shape))
    module = Householder(2)
    nn.init.constant_(module.direction, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        lipschitz_rule(module, "l2")


def test_autocast_does_not_lower_the_precision_of_the_reflection() -> None:
    module, x = householder(4).float(), torch.randn(8, 4, dtype=torch.float32)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


# The constants of torch's activations.


ELEMENTWISE: list[tuple[str, Callable[[], nn.Module], float, float | None]] = [
    # name, module, constant, a point where it is (nearly) attained
    ("mish", nn.Mish, MISH_SLOPE.upper, 1.4905711794854278),
    ("hardswish", nn.Hardswish, 1.5, 3.0 - 1e-9),
    ("selu", nn.SELU, 1.7580993408473768, -1e-12),
    ("hardsigmoid", nn.Hardsigmoid, 1 / 6, 0.3),
    ("softsign", nn.Softsign, 1.0, 0.0),
    ("log sigmoid", nn.LogSigmoid, 1.0, -50.0),
    ("tanhshrink", nn.Tanhshrink, 1.0, 30.0),
    ("celu", lambda: nn.CELU(0.4), 1.0, 1.0),
    ("celu wide", lambda: nn.CELU(7.0), 1.0, 1.0),
    ("softshrink", nn.Softshrink, 1.0, 2.0),
    ("hardshrink 0", lambda: nn.Hardshrink(0.0), 1.0, 2.0),
    ("threshold", lambda: nn.Threshold(0.3, 0.3), 1.0, 1.0),
    ("rrelu", nn.RReLU, 1.0, 2.0),
    ("rrelu steep", lambda: nn.RReLU(-3.0, -2.0), 2.5, -1.0),
    ("relu6", nn.ReLU6, 1.0, 3.0),
    ("leaky steep", lambda: nn.LeakyReLU(1.25), 1.25, -1.0),
    ("gelu", nn.GELU, 1.1289041451851549, math.sqrt(2)),
    ("gelu tanh", lambda: nn.GELU("tanh"), 1.1289930686587719, 1.4185040087908284),
    ("silu", nn.SiLU, 1.0998393201288670, 2.3993572805154677),
    ("sigmoid", nn.Sigmoid, 0.25, 0.0),
    ("softplus", nn.Softplus, 1.0, 50.0),
    ("elu", lambda: nn.ELU(1.5), 1.5, -1e-12),
    ("hardtanh", lambda: nn.Hardtanh(-2.0, 5.0), 1.0, 0.0),
    ("tanh", nn.Tanh, 1.0, 0.0),
]


@pytest.mark.parametrize(("make", "value", "at"), [row[1:] for row in ELEMENTWISE], ids=[row[0] for row in ELEMENTWISE])
def test_the_constant_is_the_largest_slope_and_is_attained(make: Callable, value: float, at: float) -> None:
    module = make().eval()
    for norm in NORMS:
        assert laws.constant(module, norm) == pytest.approx(value, rel=3e-16)
    grid = torch.cat([torch.linspace(-12, 12, 200_001), torch.linspace(-1000, 1000, 1001)]).requires_grad_()
    (slopes,) = torch.autograd.grad(module(grid).sum(), grid)
    slack = 1e-7 if isinstance(module, nn.Hardsigmoid) else 8 * EPS  # torch has the derivative 1/6 in float32 only
    assert float(slopes.abs().max()) <= value * (1 + slack)
    assert laws.attained(module, torch.tensor([[at]]), "l2") == pytest.approx(1.0, abs=4e-8)
    laws.check_pairs(module, (4,), "l2")


def test_a_constant_one_unit_lower_would_be_wrong() -> None:
    """The stored ends are neighbors, and ball arithmetic puts the supremum between them."""
    assert math.nextafter(MISH_SLOPE.lower, math.inf) == MISH_SLOPE.upper
    assert SELU_SLOPE.upper <= math.nextafter(SELU_SLOPE.lower, math.inf)
    assert Bound.point(1.5) == HARDSWISH_SLOPE


def arb(value: float) -> flint.arb:
    return flint.arb(value)


def interval(low: float, high: float) -> flint.arb:
    middle, radius = (low + high) / 2, math.nextafter((high - low) / 2, math.inf) * (1 + 1e-9)
    return flint.arb(middle, radius)


def mish_slope(x: flint.arb) -> flint.arb:
    """Derivative of x tanh(softplus x): tanh s + x (1 - tanh(s)^2) sigmoid(x)."""
    e = x.exp()
    q = (1 + e) ** 2
    t = (q - 1) / (q + 1)  # tanh log(1 + e^x)
    return t + x * (1 - t) * (1 + t) * e / (1 + e)


def mish_curvature(x: flint.arb) -> flint.arb:
    """Second derivative, with w = sech^2(s) and g = sigmoid(x): 2 w g + x (w g (1 - g) - 2 t w g^2)."""
    e = x.exp()
    q = (1 + e) ** 2
    t, g = (q - 1) / (q + 1), e / (1 + e)
    w = (1 - t) * (1 + t)
    return 2 * w * g + x * (w * g * (1 - g) - 2 * t * w * g * g)


@pytest.mark.slow
def test_the_slope_of_mish_is_proved_on_the_whole_line() -> None:
    """Bisection in ball arithmetic on [-40, 40], concavity near the maximum, closed forms beyond."""
    flint.ctx.prec = 120
    upper, lower = arb(MISH_SLOPE.upper), arb(MISH_SLOPE.lower)
    assert (
        mish_slope(flint.arb("1.49057117948542845929441890819790982112783350126")) > lower
    )  # attained above the lower end
    # beyond 40: slope = t + x (1 - t^2) g <= 1 + x 4 e^(-2x) < 1.01; below -40: |slope| <= t + |x| e^x <= 2 (1 + |x|) e^x < 1.01
    stack, boxes = [(-40.0, 40.0)], 0
    while stack:
        low, high = stack.pop()
        boxes += 1
        box = interval(low, high)
        slope = mish_slope(box)
        if slope < upper and slope > -upper:
            continue
        middle = (low + high) / 2
        if low > 1.4 and high < 1.6 and high - low < 1e-3 and mish_is_concave_around(low, high):
            continue
        assert high - low > 1e-9, "a box that cannot be decided"
        stack += [(low, middle), (middle, high)]
    assert boxes > 20


def mish_is_concave_around(low: float, high: float) -> bool:
    """Whether the slope is concave from the box to c, and its tangent at c stays below the upper end on it (|x - c| < 1)."""
    c = flint.arb("1.49057117948542845929441890819790982112783350126472582128564674")
    hull = interval(min(low, 1.4905), max(high, 1.4907))
    top = mish_slope(c) + abs(mish_curvature(c))
    return bool(mish_third(hull) < 0) and bool(top < arb(MISH_SLOPE.upper))


def mish_third(x: flint.arb) -> flint.arb:
    """Second derivative of the slope: six times the third Taylor coefficient of x tanh(softplus x) at the box."""
    series = flint.arb_series([x, 1], prec=4)
    e = series.exp()
    q = (1 + e) * (1 + e)
    t = (q - 1) / (q + 1)
    f = series * t
    return f[3] * 6


def test_the_oracle_of_mish_is_the_function_of_torch() -> None:
    flint.ctx.prec = 120
    x = torch.linspace(-6, 6, 49, requires_grad=True)
    (slopes,) = torch.autograd.grad(nn.Mish()(x).sum(), x, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes.sum(), x)
    for point, slope, curvature in zip(x.tolist(), slopes.tolist(), curvatures.tolist(), strict=True):
        assert float(mish_slope(arb(point))) == pytest.approx(slope, abs=1e-13)
        assert float(mish_curvature(arb(point))) == pytest.approx(curvature, abs=1e-12)
    near = [float(mish_curvature(arb(1.2 + d))) for d in (-1e-5, 1e-5)]
    assert float(mish_third(arb(1.2))) == pytest.approx((near[1] - near[0]) / 2e-5, rel=1e-8)


def test_selu_is_the_constants_of_torch() -> None:
    slope = jacobian(nn.SELU(), torch.tensor([-1e-300]))
    assert float(slope) == pytest.approx(SELU_SLOPE.upper, rel=2 * EPS)
    assert float(jacobian(nn.SELU(), torch.tensor([1.0]))) < SELU_SLOPE.lower


@given(weights=st.lists(st.floats(-3, 3), min_size=1, max_size=4))
def test_prelu_has_its_largest_slope(weights: list[float]) -> None:
    module = nn.PReLU(len(weights))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weights))
    expected = max(1.0, *map(abs, weights), 0.0)
    assert [laws.constant(module, norm) for norm in NORMS] == [expected] * 3
    J = jacobian(module, -torch.ones(1, len(weights)))
    assert laws.matrix_norm(J, "l2") == pytest.approx(max(map(abs, weights)), abs=1e-15)


def test_slopes_that_are_no_numbers_are_refused() -> None:
    module = nn.PReLU()
    nn.init.constant_(module.weight, math.nan)
    for bad in (module, nn.RReLU(math.nan, math.nan), nn.RReLU(0.0, math.inf)):
        with pytest.raises(ValueError, match=r"NaN|must be finite"):
            activation_constant(bad)


REFUSED = [
    (lambda: nn.Threshold(0.0, 1.0), "jumps at its threshold"),
    (lambda: nn.Threshold(0.0, math.nan), "jumps at its threshold"),
    (nn.Hardshrink, "jumps by lambd"),
    (lambda: nn.GLU(), "no global Lipschitz constant"),
    (lambda: nn.CELU(-1.0), "without limit"),
    (lambda: nn.CELU(math.inf), "without limit"),
    (lambda: nn.Softshrink(-1.0), "no map that torch computes"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_has_no_constant_is_refused(make: Callable, message: str) -> None:
    for norm in NORMS:
        with pytest.raises(UncertifiableError, match=message):
            lipschitz_rule(make(), norm)


def test_what_is_refused_has_arbitrarily_large_slopes() -> None:
    for module, a, b in (
        (nn.Threshold(0.0, 1.0), 0.0, 1e-9),
        (nn.Hardshrink(), 0.5, 0.5 + 1e-9),
        (nn.CELU(-1.0), -40.0, -40.0 + 1e-9),
    ):
        y = module(torch.tensor([a, b]))
        assert float(y.diff().abs()) > 1e5 * (b - a)
    assert float(torch.linalg.matrix_norm(jacobian(nn.GLU(), torch.tensor([[1e6, 0.0]])), 2)) > 1e5
    with pytest.raises(RuntimeError):
        nn.Softshrink(-1.0)(torch.zeros(1))


@pytest.mark.parametrize("module", [nn.Softmax(1), nn.Softmin(1)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_softmax_is_a_half(module: nn.Module, norm: str) -> None:
    laws.check_pairs(module, (5,), norm)
    laws.check_jacobians(module, (5,), norm)
    for n in (2, 3, 40):  # two classes share the mass
        x = torch.full((1, n), -800.0)
        x[0, :2] = 0.0
        assert laws.attained(module, -x if isinstance(module, nn.Softmin) else x, norm) == pytest.approx(1.0, abs=1e-13)


def test_softmax_of_images_is_a_half() -> None:
    for norm in NORMS:
        laws.check_jacobians(nn.Softmax2d(), (3, 2, 2), norm)
    assert laws.attained(nn.Softmax2d(), torch.zeros(1, 2, 1, 1), "l2") == pytest.approx(1.0)


def test_log_softmax_has_a_constant_in_linf_only() -> None:
    module = nn.LogSoftmax(1)
    laws.check_pairs(module, (6,), "linf")
    laws.check_jacobians(module, (6,), "linf")
    one_hot = torch.tensor([[800.0, 0.0, 0.0, 0.0]])
    assert laws.attained(module, one_hot, "linf") == pytest.approx(1.0, abs=1e-13)
    for norm, growth in (("l2", "square root of the number of classes"), ("l1", "the number of classes")):
        with pytest.raises(UncertifiableError, match=growth):
            lipschitz_rule(module, norm)
    for n in (2, 9, 30):  # the growth that the message states
        x = torch.zeros(1, n)
        x[0, 0] = 800.0
        J = jacobian(module, x)
        assert laws.matrix_norm(J, "l2") == pytest.approx(math.sqrt(n))
        assert laws.matrix_norm(J, "l1") == pytest.approx(n - 1)


def test_the_rule_and_the_constant_are_the_same_number() -> None:
    for _, make, *_ in ELEMENTWISE:
        assert activation_constant(make().eval()) == lipschitz_rule(make().eval(), "l2")


def test_all_pairs_of_activations_compose() -> None:
    """A chain of the norm-keeping ones is orthogonal almost everywhere."""
    parts = [MaxMin(), Abs(), zigzag(4), householder(4)]
    for first, second in itertools.permutations(parts, 2):
        assert laws.keeps_gradient_norms(nn.Sequential(first, second), (4,))
