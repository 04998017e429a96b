"""The laws of proximal operators and projections, on everything in the catalogue."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from torch import Tensor

from stableopt.constraints import Constraint, L2Squared, Orthogonal, Regularizer, SpectralBall, from_spec
from tests.constraints.catalogue import ALL, CONVEX, CONVEX_SETS, DTYPES, SETS, matrices, only_matrices, tensors
from tests.constraints.oracle import exactly_feasible, same_bits

STEPS = (0.1, 1.0, 3.0)
each = pytest.mark.parametrize("g", ALL, ids=repr)
each_convex = pytest.mark.parametrize("g", CONVEX, ids=repr)
each_set = pytest.mark.parametrize("c", SETS, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for shape in ((4, 3), (2, 5), (1, 4), (1, 1)):
        for scale in (0.3, 1.0, 10.0):
            x, y = (scale * torch.randn(2, *shape, generator=generator)).unbind()
            made += [(x, y), (x, x + 1e-3 * y)]
    return made


@each_convex
def test_prox_is_firmly_nonexpansive(g: Regularizer) -> None:
    """|Px - Py|^2 <= <Px - Py, x - y>."""
    for x, y in pairs():
        for step in STEPS:
            moved, apart = g.prox(x, step) - g.prox(y, step), x - y
            slack = 1e-12 * float(x.norm() + y.norm() + 1) ** 2
            assert float((moved * (apart - moved)).sum()) >= -slack


@each_convex
def test_prox_minimizes_its_own_objective_with_the_curvature_of_the_step(g: Regularizer) -> None:
    """g(u) + |u-x|^2/2s >= g(p) + |p-x|^2/2s + |u-p|^2/2s for every u in the domain."""
    generator = torch.Generator().manual_seed(4)
    for x, y in pairs():
        for step in STEPS:
            p = g.prox(x, step)
            best = float(g.value(p)) + float((p - x).square().sum()) / (2 * step)
            assert math.isfinite(best)
            near = [p + r * torch.randn(x.shape, generator=generator) for r in (1e-4, 1e-2, 1.0)]
            for u in [y, torch.zeros_like(x), 0.99 * p, 1.01 * p, *near]:
                u = g.project(u) if isinstance(g, Constraint) else u
                other = float(g.value(u)) + float((u - x).square().sum()) / (2 * step)
                slack = 1e-11 * (abs(best) + float(x.square().sum()) / step + 1e-6)
                assert other >= best + float((u - p).square().sum()) / (2 * step) - slack


@each_convex
def test_prox_of_a_scalar_is_the_minimum_on_a_fine_grid(g: Regularizer) -> None:
    grid, spacing = torch.linspace(-4.0, 4.0, 801), 0.01
    penalty = torch.stack([g.value(u.reshape(1, 1)) for u in grid])
    if not penalty.isfinite().any():
        grid, penalty = torch.zeros(1), torch.zeros(1)  # a ball smaller than the grid: its center is near enough
    for x in (-3.3, -0.31, 0.0, 0.02, 0.5, 2.7):
        for step in (0.5, 2.0):
            found = float(grid[(penalty + (grid - x).square() / (2 * step)).argmin()])
            assert float(g.prox(torch.tensor([[x]]), step)) == pytest.approx(found, abs=spacing)


@each
def test_one_step_per_coordinate_equals_the_coordinates_one_by_one(g: Regularizer) -> None:
    x, steps = torch.randn(3, 4), torch.rand(3, 4) * 3
    if not g.separable:
        with pytest.raises(ValueError, match="does not act per coordinate"):
            g.prox(x, steps)
        assert same_bits(g.prox(x, torch.tensor(0.5)), g.prox(x, 0.5))
        return
    expected = torch.stack([g.prox(a, float(s)) for a, s in zip(x.flatten(), steps.flatten(), strict=True)])
    torch.testing.assert_close(g.prox(x, steps), expected.reshape(3, 4), rtol=1e-15, atol=0)
    row = g.prox(x, steps[0])
    torch.testing.assert_close(row[1], g.prox(x[1], steps[0]), rtol=0, atol=0)
    for wrong in (torch.ones(5), torch.ones(2, 3, 4)):
        with pytest.raises(ValueError, match="broadcasts"):
            g.prox(x, wrong)


@each
@pytest.mark.parametrize("step", [-1.0, math.nan, math.inf])
def test_a_step_out_of_range_is_refused(g: Regularizer, step: float) -> None:
    with pytest.raises(ValueError, match="step"):
        g.prox(torch.ones(2, 2), step)


@each
@pytest.mark.parametrize("step", [True, "0.1", None, torch.tensor(1)])
def test_a_step_of_the_wrong_type_is_refused(g: Regularizer, step: object) -> None:
    with pytest.raises(TypeError, match="step"):
        g.prox(torch.ones(2, 2), step)  # type: ignore[arg-type]


@each
def test_what_is_not_a_real_floating_tensor_is_refused(g: Regularizer) -> None:
    calls = [g.value, g.prox] + ([g.project, g.violation, g.map] if isinstance(g, Constraint) else [])
    for wrong in (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex128), [[1.0]]):
        for call in calls:
            with pytest.raises(TypeError, match=type(g).__name__):
                call(wrong)  # type: ignore[operator]


@each_set
@each_dtype
def test_a_projection_is_feasible_in_exact_arithmetic(c: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    for name, x in tensors(c, dtype):
        p = c.project(x.to(device))
        assert p.isfinite().all(), name
        assert exactly_feasible(c, p), name
        assert c.violation(p) == 0.0, name
        assert c.value(p).item() == 0.0


@each_set
@each_dtype
def test_projecting_again_changes_no_bit(c: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    for name, x in tensors(c, dtype):
        p = c.project(x.to(device))
        assert same_bits(c.project(p), p), name
        assert same_bits(c.project(p.mT.contiguous().mT if p.ndim == 2 else p), p), name
        assert same_bits(c.prox(p, 0.3), p), name


@each_set
@each_dtype
def test_violation_is_zero_exactly_where_project_changes_nothing(c: Constraint, dtype: torch.dtype) -> None:
    seen = set()
    for name, x in tensors(c, dtype):
        unchanged = same_bits(c.project(x), x)
        feasible = c.violation(x) == 0.0
        seen.add(feasible)
        assert math.isinf(float(c.value(x))) != feasible
        # Only the manifold moves a point that is feasible within its tolerance, to prove that the norm is at most 1.
        assert unchanged == feasible or (isinstance(c, Orthogonal) and feasible), name
        if not feasible:
            assert c.violation(x) > 0.0
    assert seen == {True, False} or c.spec().get("lower") == "-inf" == "-" + str(c.spec().get("upper"))


@each_set
@each_dtype
def test_what_exact_arithmetic_finds_outside_is_never_called_feasible(c: Constraint, dtype: torch.dtype) -> None:
    for name, x in tensors(c, dtype):
        if c.violation(x) == 0.0 and not isinstance(c, Orthogonal):
            assert exactly_feasible(c, x), name


@each
@each_dtype
def test_shape_dtype_device_and_input_are_kept(g: Regularizer, dtype: torch.dtype, device: torch.device) -> None:
    for name, x in tensors(g, dtype):
        x = x.to(device)
        before, version = x.clone(), x._version
        results = [g.prox(x), g.prox(x, 0.0)]
        if isinstance(g, Constraint):
            results += [g.project(x), g.map(x)]
            g.violation(x)
        assert (g.value(x).dtype, g.value(x).shape, g.value(x).device.type) == (torch.float64, (), device.type)
        for result in results:
            assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device), name
        assert x._version == version, name
        assert same_bits(x, before), name


@each
def test_the_memory_layout_does_not_matter(g: Regularizer) -> None:
    for x in (torch.randn(4, 5).mT, torch.randn(6, 8)[::2, 1::2], torch.randn(1, 3).expand(4, 3)):
        assert not x.is_contiguous()
        calls = [g.prox] + ([g.map] if isinstance(g, Constraint) else [])
        for call in calls:
            torch.testing.assert_close(call(x), call(x.contiguous()), rtol=1e-13, atol=1e-13)


@each
@each_dtype
def test_nan_goes_through_and_is_never_feasible(g: Regularizer, dtype: torch.dtype) -> None:
    for shape in ((2, 3), (1, 1)):
        x = torch.ones(shape, dtype=dtype)
        x[0, 0] = math.nan
        assert g.prox(x).isnan().any()
        if isinstance(g, Constraint):
            assert g.project(x).isnan().any()
            assert g.map(x).isnan().any()
            assert g.violation(x) == math.inf
            assert g.value(x) == math.inf


@each_set
def test_infinity_is_clipped_by_boxes_and_undefined_for_norms(c: Constraint) -> None:
    x = torch.tensor([[math.inf, 0.2], [-math.inf, 0.2]])
    p = c.project(x)
    if c.separable:
        assert not p.isnan().any()
        assert c.violation(p) == 0.0
    else:
        assert p.isnan().any()
        assert c.violation(x) == math.inf


@each
def test_a_zero_step_is_the_identity_of_a_penalty_and_a_large_one_its_minimizer(g: Regularizer) -> None:
    x = torch.randn(3, 4)
    if isinstance(g, Constraint):
        assert same_bits(g.prox(x, 0.0), g.project(x))
        assert same_bits(g.prox(x, 7.0), g.project(x))
    else:
        assert torch.equal(g.prox(x, 0.0), x)
        far = g.prox(x, 1e12)
        assert torch.equal(far, x) if g.weight == 0 else float(far.abs().max()) < 1e-9  # type: ignore[attr-defined]


@each
def test_a_spec_survives_json_pickle_and_copies(g: Regularizer) -> None:
    text = json.dumps(g.spec(), allow_nan=False)
    twin = from_spec(json.loads(text))
    for other in (twin, copy.deepcopy(g), copy.copy(g), pickle.loads(pickle.dumps(g))):
        assert other == g
        assert hash(other) == hash(g)
        assert type(other) is type(g)
        assert other.spec() == g.spec()
    assert len({g, twin}) == 1


@each
def test_an_instance_cannot_be_changed(g: Regularizer) -> None:
    for field in g.spec():
        with pytest.raises(AttributeError):
            setattr(g, field, 1.0)


@each_convex
def test_the_derivative_is_that_of_finite_differences(g: Regularizer) -> None:
    generator = torch.Generator().manual_seed(6)
    for shape in ((3, 2), (2, 3), (1, 4)):
        x = (0.9 * torch.randn(shape, generator=generator)).requires_grad_()
        assert torch.autograd.gradcheck(lambda t: g.prox(t, 0.7), x, atol=1e-6)
        if isinstance(g, Constraint):
            assert torch.autograd.gradcheck(g.map, x, atol=1e-6)


@pytest.mark.parametrize("c", CONVEX_SETS, ids=repr)
def test_the_derivative_of_a_projection_is_symmetric_with_spectrum_in_the_unit_interval(c: Constraint) -> None:
    for x in (torch.randn(3, 2), torch.zeros(2, 2), 3 * torch.eye(2), torch.ones(2, 3), 1e-3 * torch.eye(2)):
        J = torch.autograd.functional.jacobian(c.project, x).reshape(x.numel(), x.numel())
        torch.testing.assert_close(J, J.mT, rtol=0, atol=1e-12)
        spectrum = torch.linalg.eigvalsh((J + J.mT) / 2)
        assert spectrum.min() > -1e-12
        assert spectrum.max() < 1 + 1e-12


@each
@each_dtype
def test_gradients_are_finite_where_the_input_is(g: Regularizer, dtype: torch.dtype) -> None:
    for name, x in tensors(g, dtype):
        if name in {"largest", "huge", "uneven"} and (only_matrices(g) or isinstance(g, L2Squared)):
            continue  # the gradient itself may exceed the range of the dtype
        calls = [lambda t: g.prox(t, 0.5)] + ([g.map] if isinstance(g, Constraint) else [])
        for call in calls:
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(call(leaf).sum(), leaf)
            assert grad.isfinite().all() or isinstance(g, Orthogonal), name


@each_set
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_functorch_and_autograd_agree(c: Constraint) -> None:
    x = 2 * torch.randn(3, 2)
    reverse = torch.autograd.functional.jacobian(c.map, x)
    torch.testing.assert_close(torch.func.jacrev(c.map)(x), reverse)
    torch.testing.assert_close(torch.func.jacfwd(c.map)(x), reverse)
    batch = torch.randn(4, 3, 2)
    if not isinstance(c, SpectralBall | Orthogonal):
        torch.testing.assert_close(torch.func.vmap(c.map)(batch), torch.stack([c.map(b) for b in batch]))


@each_set
def test_the_map_reaches_the_set_up_to_rounding(c: Constraint) -> None:
    for _, x in matrices(torch.float64):
        if x.numel() and x.abs().max() < 1e3:
            w = c.map(x)
            torch.testing.assert_close(c.project(w), w, rtol=1e-11, atol=1e-11)
