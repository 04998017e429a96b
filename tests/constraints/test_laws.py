"""The laws of proximal operators and projections, on every row of the catalogue."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from stableopt.constraints import Constraint, L2Ball, Regularizer, from_spec
from tests.constraints.catalogue import CONVEX, DTYPES, ROWS, SETS, name_of, pairs, points, random, shapes_of
from tests.constraints.oracle import same_bits
from tests.constraints.rows import Row

STEPS = (0.1, 1.0, 3.0)
each = pytest.mark.parametrize("row", ROWS, ids=name_of)
each_convex = pytest.mark.parametrize("row", CONVEX, ids=name_of)
each_set = pytest.mark.parametrize("row", SETS, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_dtype_in_turn = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))],
    ids=str,
)
"""The widest and the coarsest type by default, those between them in the longer run."""


def set_of(row: Row) -> Constraint:
    assert isinstance(row.g, Constraint)
    return row.g


def takes_complex(g: Regularizer) -> bool:
    return bool(vars(type(g)).get("complex_too", getattr(type(g), "complex_too", False)))


def objective(row: Row, u: Tensor, x: Tensor, step: float | Tensor) -> float:
    return float(row.g.value(u)) + float(((u - x).square() / (2 * step)).sum())


def candidates(row: Row, p: Tensor, y: Tensor) -> list[Tensor]:
    """Return points of the domain: near the proximal point, and elsewhere."""
    generator = torch.Generator().manual_seed(4)
    near = [p + r * torch.randn(p.shape, generator=generator) for r in (1e-4, 1e-2, 1.0)]
    made = [y, torch.zeros_like(p), 0.99 * p, 1.01 * p, *near]
    if isinstance(row.g, Constraint):
        return [row.g.project(u) for u in made]
    return made if row.domain is None else [row.domain(u) for u in made]


@each_convex
def test_prox_is_firmly_nonexpansive(row: Row) -> None:
    """|Px - Py|^2 <= <Px - Py, x - y>."""
    for (x, y), step in zip(pairs(row), itertools.cycle(STEPS), strict=False):
        moved, apart = row.g.prox(x, step) - row.g.prox(y, step), x - y
        slack = 1e-12 * float(x.norm() + y.norm() + 1) ** 2
        assert float((moved * (apart - moved)).sum()) >= -slack


@each
def test_prox_minimizes_its_own_objective(row: Row) -> None:
    """g(u) + |u-x|^2/2s >= g(p) + |p-x|^2/2s, plus |u-p|^2/2s if g is convex, for every u in the domain."""
    for (x, y), step in zip(pairs(row), itertools.cycle(STEPS), strict=False):
        p = row.g.prox(x, step)
        best = objective(row, p, x, step)
        assert math.isfinite(best)
        for u in candidates(row, p, y):
            bonus = float((u - p).square().sum()) / (2 * step) if row.convex else 0.0
            slack = 1e-11 * (abs(best) + float(x.square().sum()) / step + 1e-6)
            assert objective(row, u, x, step) >= best + bonus - slack


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.shapes is None and row.g.separable and not row.degenerate], ids=name_of
)
def test_prox_of_a_scalar_is_the_minimum_on_a_fine_grid(row: Row) -> None:
    grid, spacing = torch.linspace(-4.0, 4.0, 801), 0.01
    penalty = torch.stack([row.g.value(u.reshape(1, 1)) for u in grid])
    for x in (-3.3, -0.31, 0.0, 0.02, 0.5, 2.7):
        for step in (0.5, 2.0):
            total = penalty + (grid - x).square() / (2 * step)
            at = float(row.g.prox(torch.tensor([[x]]), step))
            if row.convex:
                assert at == pytest.approx(float(grid[total.argmin()]), abs=spacing)
            assert objective(row, torch.tensor([[at]]), torch.tensor([[x]]), step) <= float(total.min()) + 1e-12


@each
def test_a_diagonal_metric_is_exact_or_refused(row: Row) -> None:
    """The minimizer of g(u) + sum P_i (u_i-x_i)^2 / 2s; for what is separable, each coordinate alone."""
    g = row.g
    for shape in shapes_of(row)[:3]:
        if math.prod(shape) == 1:
            continue
        x, metric = 2 * random(row, shape, 1), 0.2 + 3 * torch.rand(shape)
        if not g.diagonal:
            with pytest.raises(ValueError, match="no exact prox in a diagonal metric"):
                g.prox(x, 1.0 / metric)
            continue
        p = g.prox(x, 0.7, metric=metric)  # type: ignore[call-arg]
        torch.testing.assert_close(g.prox(x, 0.7 / metric), p, rtol=1e-12, atol=1e-12)
        best = objective(row, p, x, 0.7 / metric)
        for u in candidates(row, p, random(row, shape, 2)):
            bonus = float(((u - p).square() * metric).sum()) / 1.4 if row.convex else 0.0
            assert objective(row, u, x, 0.7 / metric) >= best + bonus - 1e-10 * (1 + abs(best))
        same = torch.ones(shape)
        torch.testing.assert_close(g.prox(x, 0.7 * same), g.prox(x, 0.7), rtol=1e-11, atol=1e-11)
        for wrong in (torch.ones(97), torch.ones(2, *shape)):
            with pytest.raises(ValueError, match="broadcasts"):
                g.prox(x, wrong)
        if g.separable and row.shapes is None:
            steps = 3 * torch.rand(shape)
            one_by_one = [g.prox(a, float(s)) for a, s in zip(x.flatten(), steps.flatten(), strict=True)]
            torch.testing.assert_close(g.prox(x, steps), torch.stack(one_by_one).reshape(shape), rtol=1e-14, atol=0)


@each
def test_a_tensor_with_one_entry_is_a_step_like_a_number(row: Row) -> None:
    for shape in shapes_of(row)[:2]:
        x = random(row, shape, 5)
        torch.testing.assert_close(row.g.prox(x, torch.tensor(0.5)), row.g.prox(x, 0.5), rtol=1e-15, atol=0)


@each
@pytest.mark.parametrize("step", [-1.0, math.nan, math.inf])
def test_a_step_out_of_range_is_refused(row: Row, step: float) -> None:
    with pytest.raises(ValueError, match="step"):
        row.g.prox(torch.ones(shapes_of(row)[0]), step)


@each
@pytest.mark.parametrize("step", [True, "0.1", None, torch.tensor(1)])
def test_a_step_of_the_wrong_type_is_refused(row: Row, step: Any) -> None:
    with pytest.raises(TypeError, match="step"):
        row.g.prox(torch.ones(shapes_of(row)[0]), step)


@each
def test_what_is_not_a_floating_tensor_is_refused(row: Row) -> None:
    g, shape = row.g, shapes_of(row)[0]
    calls: list[Any] = [g.value, g.prox] + ([g.project, g.violation, g.map] if isinstance(g, Constraint) else [])
    wrong: list[Any] = [torch.ones(shape, dtype=torch.int64), [[1.0]]]
    if not takes_complex(g):
        wrong.append(torch.ones(shape, dtype=torch.complex128))
    for x in wrong:
        for call in calls:
            with pytest.raises(TypeError, match="needs a float64, float32, bfloat16"):
                call(x)


@each
def test_complex_numbers_with_zero_imaginary_part_are_like_real_ones(row: Row) -> None:
    g = row.g
    if not takes_complex(g):
        return
    for shape in shapes_of(row)[:2]:
        x = random(row, shape, 6)
        z = torch.complex(x, torch.zeros_like(x))
        turned = z * torch.exp(torch.tensor(0.7j))
        p = g.prox(x, 0.4)
        torch.testing.assert_close(g.prox(z, 0.4).real, p, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(g.prox(turned, 0.4), p * torch.exp(torch.tensor(0.7j)), rtol=1e-9, atol=1e-9)
        assert g.prox(z.to(torch.complex64), 0.4).dtype == torch.complex64
        if isinstance(g, Constraint):
            for dtype in (torch.complex64, torch.complex128):
                inside = g.project((3 * turned).to(dtype))
                assert g.violation(inside) == 0.0
                assert torch.equal(g.project(inside), inside)


@each_set
@each_dtype_in_turn
def test_a_projection_is_feasible_in_exact_arithmetic(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    c = set_of(row)
    assert row.exact is not None
    for name, x in points(row, dtype):
        p = c.project(x.to(device))
        assert p.isfinite().all(), name
        assert row.exact(p), name
        assert c.violation(p) == 0.0, name
        assert c.value(p).item() == 0.0


@each_set
@each_dtype_in_turn
def test_projecting_again_changes_no_bit(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    c = set_of(row)
    for name, x in points(row, dtype):
        p = c.project(x.to(device))
        assert same_bits(c.project(p), p), name
        assert same_bits(c.project(p.mT.contiguous().mT if p.ndim == 2 else p), p), name
        assert same_bits(c.prox(p, 0.3), p), name


@each_set
@each_dtype_in_turn
def test_violation_is_zero_exactly_where_project_changes_nothing(row: Row, dtype: torch.dtype) -> None:
    c = set_of(row)
    seen = set()
    for name, x in points(row, dtype):
        unchanged = same_bits(c.project(x), x)
        feasible = c.violation(x) == 0.0
        seen.add(feasible)
        assert math.isinf(float(c.value(x))) != feasible
        # A set with a tolerance may move a point within it, to prove something more.
        assert unchanged == feasible or (row.tolerant and feasible), name
        if not feasible:
            assert c.violation(x) > 0.0
    assert seen == {True, False} or row.degenerate


@each_set
@each_dtype_in_turn
def test_what_exact_arithmetic_finds_outside_is_never_called_feasible(row: Row, dtype: torch.dtype) -> None:
    c = set_of(row)
    assert row.exact is not None
    for name, x in points(row, dtype):
        if c.violation(x) == 0.0 and not row.tolerant:
            assert row.exact(x), name


@each
@each_dtype_in_turn
def test_shape_dtype_device_and_input_are_kept(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    g = row.g
    for name, point in points(row, dtype):
        if name.startswith("random") and not name.endswith("*1"):
            continue  # the size of usual numbers changes no shape
        x = point.to(device)
        before, version = x.clone(), x._version
        results = [g.prox(x), g.project(x) if isinstance(g, Constraint) else g.prox(x, 0.0)]
        if isinstance(g, Constraint):
            if (
                not row.tolerant or x.abs().sum() < 1e3
            ):  # a manifold is parametrized by free parameters of moderate size
                results.append(g.map(x))
            g.violation(x)
        assert (g.value(x).dtype, g.value(x).shape, g.value(x).device.type) == (torch.float64, (), device.type)
        for result in results:
            assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device), name
        assert x._version == version, name
        assert same_bits(x, before), name


@each
def test_in_place_variants_give_the_same_bits_and_leave_refused_input_alone(row: Row) -> None:
    for shape in shapes_of(row)[:2]:
        x = 2 * random(row, shape, 7)
        wanted = row.g.prox(x, 0.3)
        leaf = torch.nn.Parameter(x.clone())
        assert row.g.prox_(leaf, 0.3) is leaf
        assert same_bits(leaf, wanted)
        assert leaf.grad_fn is None
        if isinstance(row.g, Constraint):
            assert same_bits(row.g.project_(x.clone()), row.g.project(x))
        before = x.clone()
        with pytest.raises(ValueError, match="step"):
            row.g.prox_(x, -1.0)
        assert same_bits(x, before)


@each
def test_the_memory_layout_does_not_matter(row: Row) -> None:
    for shape in shapes_of(row):
        spaced = torch.randn(*shape, 2)[..., 0] if row.domain is None else row.domain(torch.randn(*shape, 2))[..., 0]
        flipped = spaced.mT.contiguous().mT if len(shape) == 2 else spaced
        for x in (spaced, flipped, random(row, shape, 8)[..., :1].expand(shape)):
            calls: list[Any] = [row.g.prox] + ([row.g.map] if isinstance(row.g, Constraint) else [])
            for call in calls:
                torch.testing.assert_close(call(x), call(x.contiguous()), rtol=1e-13, atol=1e-13)


@each
def test_a_batch_is_its_vectors_one_by_one(row: Row) -> None:
    g: Any = row.g
    fields = {f.name for f in dataclasses.fields(g)}
    if "dims" not in fields or (g.dims is not None and not isinstance(g.dims, int)):
        return
    for shape in shapes_of(row)[:3]:
        if g.dims is not None and len(shape) != 1:
            continue
        dims = tuple(range(-len(shape), 0))
        many = dataclasses.replace(g, dims=dims if len(dims) > 1 else -1)
        x = torch.stack([random(row, shape, seed) * 3 for seed in range(4)])
        alone = torch.stack([g.prox(one, 0.7) for one in x])
        torch.testing.assert_close(many.prox(x, 0.7), alone, rtol=1e-12, atol=1e-12)
        value = sum(float(g.value(one)) for one in alone)
        assert float(many.value(alone)) == pytest.approx(value, rel=1e-12, abs=1e-12)
        if len(shape) == 1:
            first = dataclasses.replace(g, dims=0)
            torch.testing.assert_close(first.prox(x.T, 0.7), alone.T, rtol=1e-12, atol=1e-12)
        if isinstance(g, Constraint):
            assert many.violation(x) == pytest.approx(max(g.violation(one) for one in x), rel=1e-9, abs=1e-12)


@each
@each_dtype
def test_nan_goes_through_and_is_never_feasible(row: Row, dtype: torch.dtype) -> None:
    g = row.g
    for shape in shapes_of(row)[:2]:
        x = torch.ones(shape, dtype=dtype)
        x[(0,) * len(shape)] = math.nan
        assert g.prox(x).isnan().any()
        if isinstance(g, Constraint):
            assert g.project(x).isnan().any()
            assert g.map(x).isnan().any()
            assert g.violation(x) == math.inf
            assert g.value(x) == math.inf


@each_set
def test_infinity_is_clipped_entry_by_entry_and_undefined_for_norms(row: Row) -> None:
    c = set_of(row)
    x = torch.full(shapes_of(row)[0], 0.2)
    x.view(-1)[0] = math.inf
    p = c.project(x)
    if c.separable:
        assert not p.isnan().any()
        assert c.violation(p) == 0.0
    else:
        assert p.isnan().any()
        assert c.violation(x) == math.inf


@each
def test_a_zero_step_is_the_identity_of_a_penalty_and_a_larger_step_lowers_the_value(row: Row) -> None:
    g = row.g
    for shape in shapes_of(row)[:3]:
        x = random(row, shape, 9)
        if isinstance(g, Constraint):
            assert same_bits(g.prox(x, 0.0), g.project(x))
            assert same_bits(g.prox(x, 7.0), g.project(x))
            continue
        torch.testing.assert_close(g.prox(x, 0.0), x, rtol=1e-12, atol=1e-12)
        values = [float(g.value(g.prox(x, s))) for s in (0.0, 0.01, 0.3, 2.0, 1e3)]
        for larger, smaller in itertools.pairwise(values):
            assert smaller <= larger + 1e-10 * (1 + abs(larger))


@each_convex
def test_moreau_and_fenchel_young_hold_where_the_conjugate_has_code_of_its_own(row: Row) -> None:
    """prox_{sg}(x) + s prox_{g*/s}(x/s) = x, and g(p) + g*(q) = <p, q> for the two points."""
    g = row.g
    try:
        twin = g.conjugate()
    except ValueError as refused:
        assert "conjugate" in str(refused)  # noqa: PT017  the sentence must say what is missing
        return
    for shape in shapes_of(row)[:4]:
        for scale in (0.3, 4.0):
            x = scale * random(row, shape, 10)
            for s in STEPS:
                p, q = g.prox(x, s), twin.prox(x / s, 1 / s)
                torch.testing.assert_close(p + s * q, x, rtol=1e-9, atol=1e-9 * scale)
                size = 1 + float(p.abs().max()) * float(q.abs().sum())
                assert float(g.value(p)) + float(twin.value(q)) == pytest.approx(float((p * q).sum()), abs=1e-8 * size)


@each
def test_a_spec_survives_json_pickle_and_copies(row: Row) -> None:
    g = row.g
    text = json.dumps(g.spec(), allow_nan=False)
    twin = from_spec(json.loads(text))
    for other in (twin, copy.deepcopy(g), copy.copy(g), pickle.loads(pickle.dumps(g))):
        assert other == g
        assert hash(other) == hash(g)
        assert type(other) is type(g)
        assert other.spec() == g.spec()
    assert len({g, twin}) == 1


@each
def test_an_instance_cannot_be_changed(row: Row) -> None:
    for field in row.g.spec():
        with pytest.raises(AttributeError):
            setattr(row.g, field, 1.0)


@each
def test_the_derivative_is_that_of_finite_differences(row: Row) -> None:
    g = row.g
    if not row.smooth:
        return
    for shape in shapes_of(row)[:3]:
        x = (0.9 * random(row, shape, 6)).requires_grad_()
        assert torch.autograd.gradcheck(lambda t: g.prox(t, 0.7), x, atol=1e-6)
        if isinstance(g, Constraint):
            assert torch.autograd.gradcheck(g.map, x, atol=1e-6)


@each_convex
def test_the_derivative_of_a_prox_is_symmetric_with_spectrum_in_the_unit_interval(row: Row) -> None:
    """It is an element of the Clarke Jacobian of the gradient of a convex function that is 1-smooth; also at kinks."""
    for shape in shapes_of(row)[:2]:
        for x in (random(row, shape, 11), torch.zeros(shape), 3 * torch.ones(shape), 1e-3 * torch.ones(shape)):
            J = torch.autograd.functional.jacobian(lambda t: row.g.prox(t, 0.7), x).reshape(x.numel(), x.numel())
            torch.testing.assert_close(J, J.mT, rtol=0, atol=1e-9)
            spectrum = torch.linalg.eigvalsh((J + J.mT) / 2)
            assert spectrum.min() > -1e-9
            assert spectrum.max() < 1 + 1e-9


@each
@each_dtype_in_turn
def test_gradients_are_finite_where_the_input_is(row: Row, dtype: torch.dtype) -> None:
    g = row.g
    for name, x in points(row, dtype):
        if name in {"largest", "huge", "uneven"} and not isinstance(g, L2Ball):
            continue  # the gradient itself may exceed the range of the dtype
        calls: list[Any] = [lambda t: g.prox(t, 0.5)] + ([g.map] if isinstance(g, Constraint) else [])
        for call in calls:
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(call(leaf).sum(), leaf)
            assert grad.isfinite().all() or row.tolerant, name


@pytest.mark.parametrize("row", [row for row in SETS if row.g.separable or isinstance(row.g, L2Ball)], ids=name_of)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jacfwd
def test_functorch_and_autograd_agree(row: Row) -> None:
    c = set_of(row)
    shape = shapes_of(row)[0]
    x = 2 * random(row, shape, 12)
    reverse = torch.autograd.functional.jacobian(c.map, x)
    torch.testing.assert_close(torch.func.jacrev(c.map)(x), reverse)
    torch.testing.assert_close(torch.func.jacfwd(c.map)(x), reverse)
    batch = torch.stack([random(row, shape, seed) for seed in range(4)])
    torch.testing.assert_close(torch.func.vmap(c.map)(batch), torch.stack([c.map(b) for b in batch]))


@each_set
def test_the_map_reaches_the_set_up_to_rounding(row: Row) -> None:
    c = set_of(row)
    for _, x in points(row, torch.float64):
        if x.numel() and x.abs().max() < 1e3:
            w = c.map(x)
            torch.testing.assert_close(c.project(w), w, rtol=1e-11, atol=1e-11)
