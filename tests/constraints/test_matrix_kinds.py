"""What all classes of matrices share: batches, derivatives, parametrizations, shards, and how a rounded point is pulled inside."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stableopt.constraints import Constraint, Regularizer, from_spec
from stableopt.constraints.lowrank import AlmostOrthogonal, Rank
from stableopt.constraints.matrix_kinds import pull_until_proved
from stableopt.constraints.spectra import NuclearBall, NuclearNorm, SpectralNorm
from stableopt.constraints.symmetric import PSD, Hurwitz
from tests.constraints.catalogue import DTYPES
from tests.two_processes import in_two_processes

SETS: list[Any] = [NuclearBall(0.9), PSD(), PSD(0.1, 2.0), Hurwitz(0.2), Rank(1), AlmostOrthogonal(0.3)]
ALL: list[Any] = [NuclearNorm(0.3), SpectralNorm(0.4), *SETS]
each_class = pytest.mark.parametrize("g", ALL, ids=repr)
each_set = pytest.mark.parametrize("c", SETS, ids=repr)


@each_class
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch's forward mode
def test_derivatives_go_forward_too(g: Any) -> None:
    forward = torch.autograd.forward_ad
    for x in (torch.randn(3, 3), 0.5 * torch.eye(3) if not isinstance(g, Hurwitz) else -torch.eye(3)):
        for function in (lambda t: g.prox(t, 0.7), g.map if isinstance(g, Constraint) else g.value):
            reverse = torch.autograd.functional.jacobian(function, x)
            direction = torch.randn(3, 3)
            with forward.dual_level():
                tangent = forward.unpack_dual(function(forward.make_dual(x, direction))).tangent
            torch.testing.assert_close(tangent, (reverse * direction).sum((-2, -1)), atol=1e-10, rtol=0)


@each_class
def test_a_batch_is_its_matrices_one_by_one_wherever_the_two_dimensions_are(g: Any) -> None:
    x = 2 * torch.randn(2, 3, 4, 4)
    fields = {k: v for k, v in g.spec().items() if k not in {"name", "dims"}}
    fields = {k: math.inf if v == "inf" else v for k, v in fields.items()}
    last, mixed = type(g)(**fields, dims=(-2, -1)), type(g)(**fields, dims=(2, 0))
    assert from_spec(mixed.spec()) == mixed
    alone = torch.stack([torch.stack([g.prox(m, 0.7) for m in row]) for row in x])
    torch.testing.assert_close(last.prox(x, 0.7), alone, rtol=1e-12, atol=1e-12)
    moved = x.permute(3, 0, 2, 1).contiguous()  # entry (i, j) of a matrix lies at dimensions 2 and 0
    torch.testing.assert_close(mixed.prox(moved, 0.7), alone.permute(3, 0, 2, 1), rtol=1e-12, atol=1e-12)
    if isinstance(g, Constraint):
        torch.testing.assert_close(last.map(x), alone, rtol=1e-10, atol=1e-10)
        assert last.map(x).is_contiguous()
        assert mixed.map(moved).is_contiguous()
        assert last.violation(x) == max(g.violation(m) for row in x for m in row)
        assert last.violation(alone) == mixed.violation(alone.permute(3, 0, 2, 1)) == 0.0
        assert last.project(alone) is alone
    else:
        total = sum(float(g.value(m)) for row in x for m in row)
        assert float(last.value(x)) == pytest.approx(total, rel=1e-13)
        assert float(mixed.value(moved)) == pytest.approx(total, rel=1e-13)


@each_class
def test_one_bad_matrix_of_a_batch_spoils_only_itself(g: Any) -> None:
    fields = {k: v for k, v in g.spec().items() if k not in {"name", "dims"}}
    many = type(g)(**{k: math.inf if v == "inf" else v for k, v in fields.items()}, dims=(-2, -1))
    for bad in (math.nan, math.inf):
        x = torch.randn(3, 2, 2)
        x[1, 0, 1] = bad
        calls = [many.prox] + ([many.map] if isinstance(many, Constraint) else [])
        for call in calls:
            p = call(x)
            assert p[1].isnan().all()
            assert p[[0, 2]].isfinite().all()
        assert not many.value(x).isfinite()


@each_class
def test_shapes_that_do_not_fit_are_refused(g: Any) -> None:
    for shape in ((), (3,), (2, 2, 3, 3)):
        calls = [g.value, g.prox] + ([g.map, g.project, g.violation, g.parametrization] if g in SETS else [])
        for call in calls:
            with pytest.raises(ValueError, match="two dimensions"):
                call(torch.ones(shape))
    for call in (g.value, g.prox):
        assert call(torch.ones(0, 0)).numel() in {0, 1}
    empty = torch.zeros(0, 0)
    assert g.prox(empty) is empty


@pytest.mark.parametrize("cls", [NuclearNorm, SpectralNorm, NuclearBall, AlmostOrthogonal, Hurwitz])
def test_arguments_out_of_range_are_refused_in_a_sentence(cls: Any) -> None:
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{cls.__name__} needs"):
            cls(bad)
    for bad in (True, "1", None, 1j):
        with pytest.raises(TypeError, match=f"{cls.__name__} needs a real number"):
            cls(bad)
    for dims in (3, (1,), (0, 1, 2), (1, 1), ()):
        with pytest.raises(ValueError, match="dims"):
            cls(0.5, dims)
    for dims in ("ab", (0.0, 1.0), (True, 0)):
        with pytest.raises(TypeError, match="dims"):
            cls(0.5, dims)
    assert cls(0.5, [0, 1]).dims == (0, 1)
    with pytest.raises(ValueError, match="names one dimension"):
        cls(0.5, (1, -1)).prox(torch.ones(2, 2))


@each_set
def test_a_parametrized_layer_stays_in_the_set_and_keeps_what_is_assigned(c: Any) -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", c.parametrization(layer.weight))
    for _ in range(3):
        wanted = c.project(2 * torch.randn(4, 4))
        layer.weight = wanted
        torch.testing.assert_close(layer.weight, wanted, rtol=1e-12, atol=1e-12)
        layer(torch.randn(2, 4)).square().sum().backward()
        assert layer.parametrizations.weight.original.grad.isfinite().all()
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(torch.randn(4, 4))
        torch.testing.assert_close(c.project(layer.weight), layer.weight, rtol=1e-11, atol=1e-11)


@each_set
def test_the_map_works_where_there_are_no_numbers(c: Any) -> None:
    """On the meta device, where a model is built before it has weights."""
    for dtype in DTYPES:
        x = torch.empty(3, 3, device="meta", dtype=dtype)
        w = c.map(x)
        assert (w.device.type, w.shape, w.dtype) == ("meta", x.shape, dtype)
        module = c.parametrization(x)
        assert module.right_inverse(x).device.type == "meta"
        with torch.device("meta"):
            layer = nn.Linear(3, 3, dtype=dtype)
            parametrize.register_parametrization(layer, "weight", c.parametrization(layer.weight))


@each_class
def test_a_point_inside_is_returned_itself_and_a_step_tensor_counts(g: Any) -> None:
    x = torch.randn(3, 3)
    if isinstance(g, Constraint):
        p = g.project(x)
        assert g.project(p) is p
        assert not g.project(x.requires_grad_()).isnan().any()
    else:
        torch.testing.assert_close(g.prox(x, torch.tensor([[0.6]]), torch.tensor(2.0)), g.prox(x, 0.3))
        assert torch.equal(g.prox(x, 1e308), torch.zeros(3, 3))


def test_pulling_stops_at_the_center_and_says_when_that_does_not_help() -> None:
    asked: list[Tensor] = []

    def never(a: Tensor) -> float:
        asked.append(a)
        return 1.0

    assert pull_until_proved(torch.ones(2, 2), 0.0, torch.float32, never, 1.0) is None
    assert torch.equal(asked[0], torch.ones(2, 2, dtype=torch.float32))
    assert torch.equal(asked[-1], torch.zeros(2, 2, dtype=torch.float32))
    assert len(asked) <= 60
    near = pull_until_proved(torch.ones(1, 1), 0.0, torch.float64, lambda a: float(a) - 1.0, 1.0)
    assert near is not None
    assert 2.0**-50 < 1.0 - float(near) < 2.0**-44


def test_a_projection_beyond_the_range_of_the_dtype_is_stored_inside_it() -> None:
    s, c = 0.03**0.5, 0.97**0.5
    u = torch.cat([torch.tensor([s]), torch.full((7,), c / 7**0.5)])
    v = torch.cat([torch.tensor([c]), torch.full((7,), -s / 7**0.5)])
    x = (9e4 * torch.outer(u, u) - 7e4 * torch.outer(v, v)).half()
    assert x.isfinite().all()
    for g in (Rank(1), NuclearBall(1.3e5), PSD(-1e4), Hurwitz(1.0)):
        p = g.project(x)
        assert p.isfinite().all()
        assert g.violation(p) == 0.0


SHARDED = """
    import sys
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from stableopt.constraints import Constraint
    from stableopt.constraints.lowrank import AlmostOrthogonal, Rank
    from stableopt.constraints.spectra import NuclearBall, NuclearNorm, SpectralNorm
    from stableopt.constraints.symmetric import PSD, Hurwitz
    from tests.two_processes import join, leave

    torch.set_default_dtype(torch.float64)
    join(*sys.argv[1:])
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for dims, shape in ((None, (5, 5)), ((0, 2), (5, 3, 5))):
        for g in (NuclearNorm(0.3, dims), SpectralNorm(0.3, dims), NuclearBall(0.8, dims), PSD(0.0, 3.0, dims), Hurwitz(0.1, dims),
                  Rank(2, dims), AlmostOrthogonal(0.2, dims)):
            for shard in range(len(shape)):
                x = torch.randn(shape)
                with torch.no_grad():
                    d = distribute_tensor(x, mesh, [Shard(shard)])
                    for step in (0.5, torch.tensor([0.5])):
                        p = g.prox(d, step)
                        assert p.placements == d.placements
                        assert torch.equal(p.full_tensor(), g.prox(x, 0.5))
                    assert torch.equal(g.value(d), g.value(x)), (g.value(d), g.value(x))
                    if isinstance(g, Constraint):
                        assert g.violation(d) == g.violation(x)
                        assert g.violation(p) == 0.0
                        assert torch.equal(g.map(d).full_tensor(), g.map(x))
                        assert torch.equal(g.project(p).to_local(), p.to_local())
    leave()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_as_one(tmp_path: Path) -> None:
    in_two_processes(textwrap.dedent(SHARDED), tmp_path)


def test_every_class_is_a_regularizer_that_is_not_separable() -> None:
    for g in ALL:
        assert isinstance(g, Regularizer)
        assert not g.separable
        assert not g.diagonal
