"""The registry, the spec, and the parametrizations of every constraint."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import stableopt.constraints as room
from stableopt.constraints import (
    L1,
    Box,
    Constraint,
    L2Ball,
    NonNegative,
    Orthogonal,
    Regularizer,
    SpectralBall,
    from_spec,
)
from tests.constraints.catalogue import DTYPES, ROWS
from tests.constraints.catalogue import SETS as SET_ROWS
from tests.constraints.oracle import same_bits

SETS = [row.g for row in SET_ROWS if row.shapes is None or {(3, 4), (3, 3), (1, 1)} <= set(row.shapes)]
each_set = pytest.mark.parametrize("c", SETS, ids=repr)


def constrained(c: Constraint, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (3, 4)) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    parametrize.register_parametrization(layer, "weight", c.parametrization(layer.weight))
    return layer


def test_the_catalogue_is_complete() -> None:
    public = {getattr(room, name) for name in room.__all__}
    classes = {k for k in public if inspect.isclass(k) and issubclass(k, Regularizer) and not inspect.isabstract(k)}
    assert {type(row.g) for row in ROWS} == classes


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ({"name": "L3", "weight": 1.0}, ValueError, "L1, L1Ball"),
        ({"weight": 1.0}, ValueError, "None"),
        ({"name": ["L1"]}, ValueError, "L1"),
        ({"name": "Regularizer"}, ValueError, "no regularizer"),
        ({"name": "_Interval"}, ValueError, "no regularizer"),
        ({"name": "L1"}, ValueError, "weight"),
        ({"name": "L1", "weight": 1.0, "extra": 2}, ValueError, "extra"),
        ({"name": "L1", "weight": "0.1"}, TypeError, "real number"),
        ({"name": "L1", "weight": True}, TypeError, "real number"),
        ({"name": "L1", "weight": "inf"}, ValueError, "finite"),
        ("L1", TypeError, "mapping"),
        (None, TypeError, "mapping"),
    ],
)
def test_a_wrong_spec_is_refused(spec: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        from_spec(spec)


def test_infinite_bounds_are_words_in_json_and_floats_keep_every_bit() -> None:
    box = Box(-math.inf, 0.1 + 2.0**-55)
    text = json.dumps(box.spec(), allow_nan=False)
    assert '"-inf"' in text
    assert from_spec(json.loads(text)) == box
    assert from_spec({"name": "L1", "weight": 1}) == L1(1.0)
    assert isinstance(L1(1).weight, float)


def test_one_name_has_one_meaning() -> None:
    with pytest.raises(TypeError, match="taken by"):
        type("L1", (Regularizer,), {"value": None, "prox": None})
    assert from_spec(L1(0.5).spec()) == L1(0.5)


def test_a_class_that_is_no_dataclass_or_has_other_fields_has_no_spec() -> None:
    class _Plain(NonNegative.__mro__[1]):  # type: ignore[misc]
        bounds = (0.0, 1.0)

    with pytest.raises(TypeError, match="dataclass"):
        _Plain().spec()

    @dataclasses.dataclass(frozen=True)
    class _Callable(NonNegative):
        f: Any = None

    with pytest.raises(TypeError, match="'f'"):
        _Callable(f=len).spec()


@each_set
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 3), (1, 4), (4, 1), (1, 1)])
def test_registering_and_assigning_start_from_the_projection(c: Constraint, shape: tuple[int, int]) -> None:
    weight, other = torch.randn(2, *shape).unbind()
    layer = nn.Linear(shape[1], shape[0])
    layer.weight = nn.Parameter(weight.clone())
    parametrize.register_parametrization(layer, "weight", c.parametrization(layer.weight))
    # gram_norm, inside the map of the spectral ball, overestimates by at most n^(1/2^7)
    loss = min(shape) ** (1 / 2**7) - 1 if isinstance(c, SpectralBall) else 1e-14
    for wanted in (weight, other):
        expected = c.project(wanted)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=loss, atol=1e-15)
        assert layer.parametrizations.weight.original.is_contiguous()
        assert layer.weight.is_contiguous()
        layer.weight = other


@each_set
def test_a_parametrized_layer_stays_in_the_set_while_it_trains(c: Constraint) -> None:
    layer = constrained(c)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    start = layer.weight.detach().clone()
    x, y = torch.randn(8, 4), 5 * torch.randn(8, 3)
    for _ in range(10):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(c.project(layer.weight), layer.weight, rtol=1e-12, atol=1e-12)
    assert not torch.equal(layer.weight, start) or c.project(start + 1).equal(c.project(start - 1))


@each_set
def test_a_parametrized_layer_can_be_copied_loaded_and_called_functionally(c: Constraint) -> None:
    layer = constrained(c)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.1 * torch.randn(3, 4))
    x = torch.randn(2, 4)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    fresh = constrained(c)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert torch.equal(torch.func.functional_call(constrained(c), state, x), layer(x))
    kept = pickle.loads(pickle.dumps(layer.parametrizations.weight[0]))
    assert torch.equal(kept(layer.parametrizations.weight.original), layer.weight)
    layer.eval()
    assert torch.equal(twin(x), layer(x))


@each_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_parametrization_keeps_the_dtype(c: Constraint, dtype: torch.dtype) -> None:
    layer = constrained(c, dtype)
    assert layer.weight.dtype == dtype
    assert layer.weight.isfinite().all()
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@each_set
def test_a_parametrization_works_on_the_meta_device(c: Constraint) -> None:
    with torch.device("meta"):
        layer = constrained(c)
    assert layer.weight.is_meta
    assert layer.weight.shape == (3, 4)
    layer = layer.to_empty(device="cpu")
    source = constrained(c)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, source.weight)


@each_set
def test_only_the_orthogonal_map_has_a_buffer_and_nothing_is_trained_in_it(c: Constraint) -> None:
    module = c.parametrization(torch.zeros(3, 4))
    assert [name for name, _ in module.named_buffers()] == (["base"] if isinstance(c, Orthogonal) else [])
    assert not list(module.parameters())
    assert repr(c) in repr(module)


@pytest.mark.parametrize(
    "c", [Box(-0.5, 0.1), L2Ball(1.3), SpectralBall(0.9), Orthogonal(), Orthogonal("cayley")], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_parametrization_compiles_without_a_graph_break(c: Constraint, dtype: torch.dtype) -> None:
    layer = constrained(c, dtype)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(3, 4).to(dtype))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 4, dtype=dtype)
    assert torch.equal(compiled(x), layer(x))


@each_set
def test_a_projected_weight_survives_the_loop_with_any_optimizer(c: Constraint) -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (weight * torch.randn(3, 3)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            weight.copy_(c.project(weight))
        assert c.violation(weight) == 0.0
        assert same_bits(c.project(weight), weight)


def test_default_map_is_the_projection() -> None:
    x = torch.randn(5)
    assert torch.equal(NonNegative().map(x), NonNegative().project(x))


def test_value_is_zero_or_infinite(device: torch.device) -> None:
    value: Tensor = L2Ball(1.0).value(torch.full((2,), 3.0, device=device))
    assert value.item() == math.inf
    assert value.device.type == device.type
