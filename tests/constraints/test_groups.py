"""The Euclidean norm and its prox, also with one step per entry, against 60 digits and the condition of optimality."""

from __future__ import annotations

import functools
import inspect
import math

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from stableopt.constraints import L2Ball, groups
from stableopt.constraints.groups import L2, Partition, Segments, shrink_groups
from stableopt.constraints.layout import Vectors

signed = st.tuples(st.sampled_from([-1.0, 1.0, 0.0]), st.floats(-8.0, 8.0)).map(lambda p: p[0] * 10.0 ** p[1])
positive = st.floats(-8.0, 8.0).map(lambda e: 10.0**e)
vectors = st.lists(signed, min_size=1, max_size=6)
pairs = st.lists(st.tuples(signed, positive), min_size=1, max_size=6)


def exact_prox(x: list[float], steps: list[float], weight: float) -> list[mpmath.mpf]:
    """Bisect for the norm of the minimizer with 60 digits."""
    with mpmath.workdps(60):
        X, T = [mpmath.mpf(v) for v in x], [mpmath.mpf(s) * mpmath.mpf(weight) for s in steps]

        def F(nu: mpmath.mpf) -> mpmath.mpf:
            return mpmath.fsum((v / (nu + t)) ** 2 for v, t in zip(X, T, strict=True) if v)

        if all(t > 0 or v == 0 for v, t in zip(X, T, strict=True)) and F(mpmath.mpf(0)) <= 1:
            return [mpmath.mpf(0)] * len(X)
        low, high = mpmath.mpf(0), mpmath.sqrt(mpmath.fsum(v * v for v in X))
        for _ in range(250):
            middle = (low + high) / 2
            low, high = (middle, high) if F(middle) > 1 else (low, middle)
        return [v * high / (high + t) if v else v for v, t in zip(X, T, strict=True)]


def optimality(x: Tensor, u: Tensor, steps: Tensor, weight: float) -> float:
    """Return the residual of 0 in w d|u| + (u - x) / s, relative to its terms, with 50 digits; at 0 the excess over w."""
    with mpmath.workdps(50):
        X, U, S = ([mpmath.mpf(v) for v in t.flatten().tolist()] for t in (x, u, steps))
        w, norm = mpmath.mpf(weight), mpmath.sqrt(mpmath.fsum(v * v for v in U))
        if norm == 0:
            dual = mpmath.sqrt(mpmath.fsum((a / s) ** 2 for a, s in zip(X, S, strict=True)))
            return float(max(dual - w, 0) / w) if w else float(dual)
        terms = [(w * b / norm, (b - a) / s, abs(a) / s + w) for a, b, s in zip(X, U, S, strict=True)]
        return float(max(abs(p + q) / size for p, q, size in terms if size))


@given(x=vectors, weight=positive, step=positive)
@example(x=[3.0, 4.0], weight=5.0, step=1.0)
@example(x=[3.0, 4.0], weight=4.999999999999, step=1.0)
def test_one_step_shortens_the_vector_by_step_times_weight(x: list[float], weight: float, step: float) -> None:
    found = L2(weight).prox(torch.tensor(x), step)
    exact = exact_prox(x, [step] * len(x), weight)
    norm = math.hypot(*x)
    for value, wanted, entry in zip(found.tolist(), exact, x, strict=True):
        assert abs(value - wanted) <= 2e-15 * abs(entry) * (1 + float(abs(wanted) / norm) if norm else 1)
        assert value * entry >= 0  # no sign changes


@given(data=pairs, weight=positive)
@example(data=[(3.0, 1.0), (4.0, 1.0)], weight=5.0)
@example(data=[(1e8, 1e-8), (1e-8, 1e8), (-1.0, 1.0)], weight=1.0)
def test_several_steps_satisfy_the_condition_of_optimality(data: list[tuple[float, float]], weight: float) -> None:
    x, steps = (torch.tensor(column) for column in zip(*data, strict=True))
    u = L2(weight).prox(x, steps)
    assert optimality(x, u, steps, weight) < 1e-14
    assert bool((u * x >= 0).all() and (u.abs() <= x.abs()).all())


@given(data=pairs, weight=positive)
def test_the_fixed_number_of_evaluations_gives_the_same(data: list[tuple[float, float]], weight: float) -> None:
    x, steps = (torch.tensor(column) for column in zip(*data, strict=True))
    early = L2(weight).prox(x, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_may_stop", lambda segments: False)
        full = L2(weight).prox(x, steps)
    assert optimality(x, full, steps, weight) < 1e-14
    torch.testing.assert_close(early, full, rtol=1e-9, atol=1e-14 * float(x.abs().max()))


def test_several_steps_equal_sixty_digits() -> None:
    generator = torch.Generator().manual_seed(5)
    for n in (1, 2, 5, 9):
        x = torch.randn(n, generator=generator)
        steps = 10.0 ** torch.empty(n).uniform_(-3, 1, generator=generator)
        for weight in (0.0, 0.1, 0.5, 2.0):
            exact = torch.tensor([float(v) for v in exact_prox(x.tolist(), steps.tolist(), weight)])
            torch.testing.assert_close(L2(weight).prox(x, steps), exact, rtol=2e-14, atol=0)


@pytest.mark.parametrize("stop", [True, False])
def test_three_hundred_scales_at_once(stop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """F falls by the same amount in every decade: the slowest case for Newton, which only the halvings make quick."""
    if not stop:
        monkeypatch.setattr(groups, "_may_stop", lambda segments: False)
    steps = torch.tensor([10.0 ** (-k) for k in range(300)])
    for amount in (1 / 299.5, 1 / 150.3, 1 / 20.2, 1 / 2.5):
        x = steps * math.sqrt(amount)
        u = L2(1.0).prox(x, steps)
        assert optimality(x, u, steps, 1.0) < 1e-13
        assert u.abs().max() > 0


def test_the_result_is_zero_up_to_the_threshold_and_not_past_it() -> None:
    x, steps = torch.tensor([3.0, -4.0, 12.0]), torch.tensor([0.25, 4.0, 1.0])
    limit = math.sqrt(12.0**2 + 1.0 + 12.0**2)
    for factor, zero in ((1.0 + 1e-14, True), (1.0 - 1e-12, False)):
        assert bool((L2(limit * factor).prox(x, steps) == 0).all()) is zero
        assert bool((L2(5.0 * factor).prox(torch.tensor([3.0, 4.0])) == 0).all()) is zero
    assert torch.equal(L2(5.0).prox(torch.tensor([3.0, 4.0])), torch.zeros(2))


def test_no_sign_changes_next_to_the_threshold() -> None:
    generator = torch.Generator().manual_seed(8)
    for _ in range(80):
        direction = torch.randn(3, generator=generator)
        steps = 10.0 ** torch.empty(3).uniform_(-2, 2, generator=generator)
        for ulps in (-2.0, 0.0, 1.0, 2.0, 4.0):
            x = steps * direction / direction.norm() * (1.0 + ulps * 2.0**-52)
            u = L2(1.0).prox(x, steps)
            assert bool((u * x >= 0).all())
            assert bool((u.abs() <= 1e-10 * x.abs()).all())
    # here the last step of Newton would end below 0
    x = torch.tensor([-0.49752578468507264, -0.00020219491227397622, 0.0013456263520440694, -9.379737035776227])
    u = L2(1.0).prox(
        x, torch.tensor([3.226379994105443, 0.0013395345880570406, 0.0017000644141485332, 16.404243763815227])
    )
    assert bool((u * x >= 0).all())


@pytest.mark.parametrize("decades", [1, 4, 8, 16])
def test_at_most_four_evaluations_are_needed_on_the_cpu(decades: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    squares = groups._squares
    monkeypatch.setattr(groups, "_squares", lambda t: calls.append(1) or squares(t))
    generator = torch.Generator().manual_seed(10)
    for weight in (0.1, 1.0, 10.0):
        x, powers = torch.randn(50, 400, generator=generator), torch.rand(50, 400, generator=generator)
        calls.clear()
        L2(weight, dims=1).prox(x, 10.0 ** (decades * (powers - 0.9)))
        assert len(calls) <= 4 + 3  # the test for 0, the bracket and the last step


def test_equal_steps_agree_with_one_step_and_a_metric_divides() -> None:
    x = torch.randn(3, 4)
    for g in (L2(0.7), L2(0.7, dims=1), L2(0.7, dims=0), L2(0.7, dims=(1, 0))):
        torch.testing.assert_close(g.prox(x, torch.full((3, 4), 0.3)), g.prox(x, 0.3), rtol=1e-14, atol=1e-16)
        metric = torch.rand(3, 4) + 0.2
        torch.testing.assert_close(g.prox(x, 0.3, metric), g.prox(x, 0.3 / metric), rtol=0, atol=0)
        torch.testing.assert_close(g.prox(x, torch.tensor([[0.3]])), g.prox(x, 0.3), rtol=0, atol=0)
    rows = torch.rand(3, 1).expand(3, 4)
    each = torch.stack([L2(0.7).prox(row, float(s[0])) for row, s in zip(x, rows, strict=True)])
    torch.testing.assert_close(L2(0.7, dims=1).prox(x, rows), each, rtol=1e-14, atol=1e-16)


def test_a_step_of_zero_keeps_its_entry_bit_for_bit() -> None:
    x = torch.tensor([0.3, -1.7, 2.0, 0.0])
    u = L2(0.9).prox(x, torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert torch.equal(u[[0, 2, 3]], x[[0, 2, 3]])
    assert 0 > float(u[1]) > -1.7
    assert torch.equal(L2(0.9).prox(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0])), torch.zeros(2))
    assert torch.equal(L2(0.9).prox(x, torch.zeros(4)), x)
    assert torch.equal(L2(0.0).prox(x, torch.rand(4)), x)
    assert torch.equal(L2(0.9).prox(x, 0.0), x)


@pytest.mark.parametrize("dims", [0, 1, (0, 1), (-1,), (2, 0)])
def test_vectors_along_dims_are_separate(dims: int | tuple[int, ...]) -> None:
    x, steps = torch.randn(2, 3, 4), torch.rand(2, 3, 4) * 2
    g, wanted = L2(0.8, dims=dims), (dims,) if isinstance(dims, int) else dims
    moved = tuple(range(-len(wanted), 0))
    rows, s = x.movedim(wanted, moved).flatten(-len(wanted)), steps.movedim(wanted, moved).flatten(-len(wanted))
    values = rows.norm(dim=-1)
    assert float(g.value(x)) == pytest.approx(0.8 * float(values.sum()), rel=1e-14)
    shape = rows.shape
    rows, s = rows.reshape(-1, shape[-1]), s.reshape(-1, shape[-1])
    for chosen, given_steps in ((0.7, [0.7] * len(rows)), (steps, list(s))):
        one_by_one = torch.stack([L2(0.8).prox(r, t) for r, t in zip(rows, given_steps, strict=True)])
        found = g.prox(x, chosen).movedim(wanted, moved).reshape(one_by_one.shape)
        torch.testing.assert_close(found, one_by_one, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 2.0**1020, 2.0**-1060])
def test_no_scale_overflows_or_vanishes(scale: float) -> None:
    x, weight = torch.tensor([3.0, -4.0]) * scale, 2.5
    expected = 0.5 * x
    torch.testing.assert_close(L2(weight).prox(x, scale), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(L2(weight).prox(x, torch.tensor([scale, scale])), expected, rtol=1e-12, atol=0)
    assert float(L2(1.0).value(x)) == pytest.approx(5 * scale, rel=1e-12)
    leaf = x.clone().requires_grad_()
    for step in (scale, torch.tensor([scale, 0.5 * scale])):
        (grad,) = torch.autograd.grad(L2(weight).prox(leaf, step).sum(), leaf)
        unit = torch.tensor([3.0, -4.0], requires_grad=True)
        (wanted,) = torch.autograd.grad(L2(weight).prox(unit, step / scale).sum(), unit)
        # a subnormal threshold has few digits
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12 if scale > 1e-307 else 1e-4)


def test_scales_may_differ_wildly_within_a_vector() -> None:
    x = torch.tensor([1e300, 1e-300, 1.0, 0.0])
    torch.testing.assert_close(L2(1.0).prox(x, 1.0), x, rtol=1e-15, atol=0)
    u = L2(1.0).prox(x, torch.tensor([1e-300, 1e300, 1.0, 1.0]))
    torch.testing.assert_close(u, x * torch.tensor([1.0, 0.5, 1.0, 1.0]), rtol=1e-15, atol=0)
    u = L2(1.0).prox(torch.tensor([1.0, 1e-300]), torch.tensor([0.5, 1e308]))
    torch.testing.assert_close(u[0], torch.tensor(0.5), rtol=1e-15, atol=0)
    big = torch.tensor([1.0, 1.0])
    assert torch.equal(L2(1e300).prox(big, 1e300), torch.zeros(2))
    assert torch.equal(L2(1e300).prox(big, torch.tensor([1e300, 1e301])), torch.zeros(2))


def test_the_derivative_at_zero_is_finite_and_zero() -> None:
    for x in (torch.zeros(3), torch.tensor([3.0, 4.0, 0.0])):
        for step in (0.5, torch.tensor([0.5, 0.6, 0.7])):
            leaf = x.clone().requires_grad_()
            g = L2(12.0)
            (grad,) = torch.autograd.grad(g.prox(leaf, step).sum(), leaf)
            assert torch.equal(grad, torch.zeros(3))
    leaf = torch.zeros(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(L2(2.0).value(leaf), leaf)[0], torch.zeros(3))
    jacobian = torch.autograd.functional.jacobian(L2(5.0).prox, torch.tensor([3.0, 4.0]))
    assert torch.equal(jacobian, torch.zeros(2, 2))


def test_derivatives_stay_finite_where_a_threshold_overflows() -> None:
    for step in (1e300, torch.tensor([1e300, 1e301])):
        leaf = torch.ones(2, requires_grad=True)
        (grad,) = torch.autograd.grad(L2(1e300).prox(leaf, step).sum(), leaf)
        assert torch.equal(grad, torch.zeros(2))
    leaf = torch.tensor([1e-5, 1e-5], requires_grad=True)
    J = torch.autograd.functional.jacobian(lambda t: L2(1.0).prox(t, torch.tensor([1e-6, 1e308])), leaf)
    torch.testing.assert_close(J, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), rtol=1e-12, atol=1e-300)
    leaf = torch.full((4,), 1.7e308).requires_grad_()
    for step in (1.0, torch.ones(4), torch.tensor([1.0, 2.0, 0.0, 1e300])):
        (grad,) = torch.autograd.grad(L2(1.0).prox(leaf, step).sum(), leaf)
        torch.testing.assert_close(grad, torch.ones(4), rtol=1e-7, atol=0)


def test_the_derivative_in_a_metric_is_symmetric_in_it_with_spectrum_in_the_unit_interval() -> None:
    generator = torch.Generator().manual_seed(9)
    for weight in (0.2, 1.0, 1.6):
        x = 2 * torch.randn(5, generator=generator)
        steps = 10.0 ** torch.empty(5).uniform_(-1.5, 0.5, generator=generator)
        J = torch.autograd.functional.jacobian(functools.partial(L2(weight).prox, step=steps), x)
        root = steps.sqrt()
        S = J * root / root[:, None]  # P^(1/2) J P^(-1/2) with P = 1/s
        torch.testing.assert_close(S, S.mT, rtol=0, atol=1e-13)
        spectrum = torch.linalg.eigvalsh(S)
        assert spectrum.min() > -1e-13
        assert spectrum.max() < 1 + 1e-13


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside forward mode
def test_forward_mode_without_torch_func() -> None:
    x, tangent, steps = torch.randn(4), torch.randn(4), torch.rand(4)
    for step in (0.3, steps):
        J = torch.autograd.functional.jacobian(functools.partial(L2(0.7).prox, step=step), x)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(L2(0.7).prox(forward_ad.make_dual(x, tangent), step)).tangent
        torch.testing.assert_close(found, J @ tangent)


def test_derivatives_equal_finite_differences_in_the_point_the_step_and_the_metric() -> None:
    x = torch.randn(3, 4).requires_grad_()
    steps = (torch.rand(3, 4) + 0.1).requires_grad_()
    metric = (torch.rand(3, 4) + 0.5).requires_grad_()
    for g in (L2(0.7), L2(1.3, dims=1), L2(2.5, dims=0)):
        assert torch.autograd.gradcheck(g.value, (x,))
        assert torch.autograd.gradcheck(g.prox, (x, torch.tensor(0.6, requires_grad=True)))
        assert torch.autograd.gradcheck(g.prox, (x, steps))
        assert torch.autograd.gradcheck(lambda t, p, g=g: g.prox(t, 0.4, p), (x, metric))
    z = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: L2(0.7).prox(t, 0.9), (z,))
    assert torch.autograd.gradcheck(lambda t, s: L2(0.7).prox(t, s), (z, steps[0].detach().requires_grad_()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_functorch_agrees_with_autograd() -> None:
    x, steps = torch.randn(5), torch.rand(5) + 0.1
    batch = torch.randn(3, 5)
    for step in (0.3, steps):
        prox = functools.partial(L2(0.7).prox, step=step)
        reverse = torch.autograd.functional.jacobian(prox, x)
        torch.testing.assert_close(torch.func.jacrev(prox)(x), reverse)
        torch.testing.assert_close(torch.func.jacfwd(prox)(x), reverse)
        torch.testing.assert_close(torch.func.vmap(prox)(batch), torch.stack([prox(b) for b in batch]))


def test_complex_vectors_shrink_like_their_real_and_imaginary_parts() -> None:
    z = torch.randn(6, dtype=torch.complex128)
    real = torch.view_as_real(z)
    for step in (0.4, torch.rand(6)):
        parts = step if isinstance(step, float) else step[:, None].expand(6, 2)
        together = L2(1.1).prox(real, parts)
        torch.testing.assert_close(torch.view_as_real(L2(1.1).prox(z, step)), together, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(L2(1.1).value(z), L2(1.1).value(real), rtol=1e-14, atol=0)
    assert L2(1.1).prox(z.to(torch.complex64)).dtype == torch.complex64
    assert torch.equal(L2(1.1).prox(z.conj()), L2(1.1).prox(z).conj())


def test_nan_spoils_its_own_vector_only() -> None:
    x = torch.tensor([[math.nan, 1.0], [3.0, 4.0]])
    for step in (1.0, torch.rand(2, 2)):
        u = L2(2.5, dims=1).prox(x, step)
        assert u[0].isnan().all()
        assert u[1].isfinite().all()
    assert L2(1.0).value(x).isnan()
    u = L2(2.5).prox(torch.tensor([math.inf, 1.0]))
    assert float(u[0]) == math.inf
    assert L2(2.5).prox(torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 2.0])).isnan().any()
    assert L2(2.5).prox(torch.tensor([1.0, 1.0]), torch.tensor([math.nan, 2.0])).isnan().any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_empty_and_single(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.0)
    for g in (L2(0.5), *([L2(0.5, dims=0), L2(0.5, dims=-1)] if shape else [])):
        assert g.prox(x).shape == shape
        assert g.prox(x, torch.full(shape, 0.3)).shape == shape
        assert float(g.value(x)) == 0.5 * 2.0 * x.numel()
    assert L2(0.5).prox(torch.tensor(-2.0), torch.tensor(1.0)).item() == -1.5
    assert L2(0.5, dims=1).prox(torch.tensor([[2.0], [-4.0]]), torch.tensor([[1.0], [2.0]])).tolist() == [[1.5], [-3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    x, steps = torch.randn(50).to(dtype), torch.rand(50)
    for step in (0.3, steps):
        assert torch.equal(L2(0.7).prox(x, step), L2(0.7).prox(x.double(), step).to(dtype))


def test_moreau_with_the_ball() -> None:
    if "dims" not in inspect.signature(L2Ball).parameters:
        pytest.skip("L2Ball has no dims here")
    x = torch.randn(4, 5)
    for g in (L2(0.7), L2(0.7, dims=1)):
        ball = g.conjugate()
        assert (type(ball), ball.radius, ball.dims) == (L2Ball, 0.7, g.dims)
        for s in (0.2, 1.0, 3.0):
            torch.testing.assert_close(g.prox(x, s) + s * ball.project(x / s), x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, (-1.0,)),
        (ValueError, (math.inf,)),
        (ValueError, (math.nan,)),
        (TypeError, ("1",)),
        (TypeError, (True,)),
        (ValueError, (1.0, ())),
        (ValueError, (1.0, (0, 0))),
        (TypeError, (1.0, 0.5)),
    ],
)
def test_bad_arguments_are_refused(error: type[Exception], arguments: tuple[object, ...]) -> None:
    with pytest.raises(error, match="L2"):
        L2(*arguments)


def test_a_missing_dimension_and_a_step_that_does_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="dims"):
        L2(1.0, dims=2).prox(torch.ones(2, 2))
    with pytest.raises(ValueError, match="broadcasts"):
        L2(1.0).prox(torch.ones(2, 2), torch.ones(3))


def test_segments_reduce_and_spread() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    v = Vectors("GroupLasso", x, None)
    segments, weights = Partition((1, 0, 1, -1), (2.0, 0.0)).on(v, "GroupLasso")
    assert segments.sum(torch.where(segments.free, 0.0, v.data)).tolist() == [[-2.0, 4.0]]
    assert segments.max(torch.where(segments.free, 0.0, v.data.abs())).tolist() == [[2.0, 3.0]]
    shrunk = shrink_groups(v.data, torch.ones(1, 1), weights, segments)
    assert shrunk.tolist() == [[1.0, 0.0, 3.0, 4.0]]
    assert isinstance(segments, Segments)
