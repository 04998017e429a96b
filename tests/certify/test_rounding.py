"""What any run computes stays within the analysis: operation by operation, in every runtime, on the whole ball."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopt.certify.execute import apply
from stableopt.certify.program import Builder
from stableopt.certify.rounding import Analysis, slope
from stableopt.certify.rounding_terms import Own, evaluate, gamma, ones, own_error, size, weight_norm
from stableopt.certify.runtime import RUNTIMES, Runtime
from stableopt.errors import CertificateError

CONV = {"dims": 1, "stride": [1], "padding": [1], "dilation": [1], "groups": 1, "padding_mode": "zeros", "transposed": False,
        "output_padding": [0]}  # fmt: skip
_PLAIN = ("relu", "abs", "tanh", "sigmoid", "gelu", "gelu_tanh", "silu", "mish", "selu", "hardswish", "hardsigmoid", "softsign",
          "logsigmoid", "tanhshrink")  # fmt: skip
ACTIVATIONS: list[dict[str, Any]] = [
    *({"name": name} for name in _PLAIN),
    {"name": "leaky_relu", "slope": -0.3},
    {"name": "elu", "alpha": 1.3},
    {"name": "celu", "alpha": 1.3},
    {"name": "softplus", "beta": 2.0},
    {"name": "hardtanh", "min": -0.5, "max": 0.3},
    {"name": "softshrink", "lambd": 0.3},
    {"name": "soft_abs", "delta": 0.1},
    {"name": "threshold", "min": 0.1},
]


def bounded(graph: Builder) -> list[dict[str, Any]]:
    """Return the operations with bounds from the analysis's own rules."""
    tensors = {name: value.double() for name, value in graph.tensors.items()}
    nodes = []
    for node in graph.nodes:
        if node["op"] in {"linear", "conv"}:
            bound = weight_norm(node, tensors[node["weight"]], graph.norm)
        elif node["op"] in {"pool", "l2pool"}:
            bound = 1.0
        else:
            bound = 1.0 if node["op"] in {"sum", "concat"} else slope(node, tensors, graph.norm)
        nodes.append({**node, "bound": bound})
    return nodes


def run(graph: Builder, runtime: Runtime, x: Tensor) -> list[Tensor]:
    """Return all values of an actual run."""
    values = [x.to(runtime.dtype)]
    tensors = {name: value.to(runtime.dtype) for name, value in graph.tensors.items()}
    kind = runtime.autocast
    with torch.no_grad(), torch.autocast("cpu", dtype=kind, enabled=kind is not None):
        for node in graph.nodes:
            values.append(evaluate(node, tensors, [values[k] for k in node["in"]]))
    return values


def exact(graph: Builder, x: Tensor) -> list[Tensor]:
    values, tensors = [x.double()], {name: value.double() for name, value in graph.tensors.items()}
    for node in graph.nodes:
        values.append(evaluate(node, tensors, [values[k] for k in node["in"]]))
    return values


def check(graph: Builder, runtime: Runtime, x: Tensor, radius: float) -> float:
    """Compare runs at x and at the rim of the ball with the bounds of every value; return the tightest ratio of error to bound."""
    tensors = {name: value.double() for name, value in graph.tensors.items()}
    analysis = Analysis(bounded(graph), tensors, runtime, graph.norm)
    states, best, center = analysis.states(x.double()), 0.0, exact(graph, x)
    for _ in range(2):
        delta = torch.randn_like(x.double())
        away = x.double() + radius * delta / (size(delta, graph.norm) * (1 + 1e-9)).reshape(-1, *[1] * (x.ndim - 1))
        for start, r in ((x.double(), 0.0), (away, radius)):
            pairs = zip(states, run(graph, runtime, start), exact(graph, start), strict=True)
            for number, (state, got, true) in enumerate(pairs):
                assert state.low == (got.dtype != runtime.dtype), (number, graph.nodes[number - 1])
                state = analysis.settled(state)
                error, limit = size(got.double() - true, graph.norm), state.e0 + state.e1 * r
                assert bool((error <= limit + state.d).all()), (
                    number,
                    graph.nodes[number - 1],
                    float((error / limit).max()),
                )
                moved = size(true - center[number], graph.norm)
                assert bool((moved <= (state.k0 + state.k1 * r) * (1 + 1e-9) + 1e-12).all()), (
                    number,
                    graph.nodes[number - 1],
                )
                best = max(best, float((error / limit.clamp_min(1e-300)).max()))
    return best


def low(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Return numbers that every runtime holds."""
    return (torch.randn(shape) * scale).bfloat16().clamp(-100, 100).to(torch.float32)


def everything(norm: str) -> Builder:
    """A network with every kind of operation."""
    graph = Builder((2, 8), norm)
    v = graph.add("affine", graph.input, scale=low((2,)), bias=low((2,)), axis=0)
    if norm != "token_max":
        v = graph.add("conv", v, weight=low((4, 2, 3), 0.5), bias=low((4,)), **CONV)
        v = graph.add("groupsort", v, group_size=2, axis=0)
        v = graph.add("conv", v, weight=low((4, 4, 3), 0.5), bias=None, **{**CONV, "transposed": True})
        v = graph.add("pool", v, name="max", dims=1, kernel=[2], stride=[2], padding=[0])
        v = graph.add("householder", v, vectors=low((2, 2)), axis=0) if norm == "l2" else v
        v = graph.add("pool", v, name="avg", dims=1, kernel=[2], stride=[2], padding=[0])
    else:
        v = graph.add("linear", v, weight=low((4, 8), 0.5), bias=low((4,)), transposed=False)
    w = graph.add("linear", v, weight=low((v.shape[-1], 6), 0.5), bias=None, transposed=True)
    a, b = (graph.add("activation", w, name=name) for name in ("relu", "tanh"))
    s = graph.add("sum", a, b, w, factors=[1.0, 0.3, -1.0])
    c = graph.add("concat", a, s, axis=-1)
    if norm != "token_max":
        c = graph.add("reshape", c, shape=[c.shape[0] * c.shape[1]])
        c = graph.add("slice", c, axis=0, start=1, stop=c.shape[0])
    else:
        c = graph.add("mean", c, axis=0)
    c = graph.add("center", c) if norm == "l2" else c
    c = graph.add("scale", c, factor=0.7)
    c = graph.add("linear", c, weight=low((10, c.shape[-1]), 0.3), bias=low((10,)), transposed=False)
    return graph


@pytest.mark.parametrize("norm", ["l2", "linf", "token_max"])
@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_every_value_of_a_network_stays_within_the_analysis(runtime: str, norm: str) -> None:
    for seed in (0, 2):
        torch.manual_seed(seed)
        graph = everything(norm)
        tightness = check(graph, RUNTIMES[runtime], torch.randn(5, 2, 8) * 10.0 ** (seed - 1), 10.0 ** (seed - 1))
        assert runtime == "float64" or tightness > 1e-3


@pytest.mark.parametrize("runtime", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fields", ACTIVATIONS, ids=lambda f: f["name"])
def test_activations_stay_within_the_analysis(fields: dict[str, Any], runtime: str) -> None:
    x = torch.cat([torch.randn(64) * 3, torch.linspace(-20, 20, 64), torch.linspace(-1e-3, 1e-3, 8)])
    odd = torch.full((1, 1), 0.703125)  # products with it have to be rounded when they are stored
    graph = Builder((1,))  # one sample per number, so that each is compared with its own bound
    value = graph.add("linear", graph.input, weight=odd, bias=None, transposed=False)
    value = graph.add("activation", value, **fields)
    graph.add("activation", graph.add("linear", value, weight=odd, bias=None, transposed=False), **fields)
    check(graph, RUNTIMES[runtime], x[:, None], 0.1)


def test_the_float64_evaluation_against_sixty_digits() -> None:
    mpmath.mp.dps = 60
    graph = Builder((20,))
    v = graph.add("linear", graph.input, weight=torch.randn(30, 20), bias=torch.randn(30), transposed=False)
    v = graph.add(
        "linear", graph.add("activation", v, name="tanh"), weight=torch.randn(4, 30) * 1e3, bias=None, transposed=False
    )
    analysis = Analysis(bounded(graph), {k: t.double() for k, t in graph.tensors.items()}, RUNTIMES["float64"], "l2")
    for seed in range(4):
        x = torch.randn(1, 20, dtype=torch.float64) * 10.0 ** (seed - 2)
        state, h = analysis.run(x), mpmath.matrix(x[0].tolist())
        W, b, V = (mpmath.matrix(t.double().tolist()) for t in graph.tensors.values())
        h = V * (W * h + b).apply(mpmath.tanh)
        gap = float(mpmath.norm(mpmath.matrix(state.value[0].tolist()) - h))
        assert 0 < gap <= float(state.d[0])
        assert float(state.d[0]) < 1e4 * gap


def test_the_rounding_grows_with_the_ball() -> None:
    """Around 0 nothing rounds; on the rim the sums of a Hadamard matrix cancel, and round more than the input did."""
    H = torch.ones(1, 1)
    for _ in range(10):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    node = {"op": "linear", "in": [0], "weight": "H", "bias": None, "transposed": False, "bound": 32.0}
    analysis = Analysis([node], {"H": H}, RUNTIMES["float32"], "l2")
    state = analysis.run(torch.zeros(1, 1024, dtype=torch.float64))
    x = (torch.rand(4, 1024) + 0.5).float()
    x = x / x.norm(dim=1, keepdim=True) * (1 - 1e-6)
    error = size((x @ H.float().T).double() - x.double() @ H.T, "l2")
    assert float(state.e0) < 1e-30
    assert bool((error <= state.e0 + state.e1).all())
    assert bool((error > 1.5 * 32.0 * 2.0**-24).all())  # so the rounding of the input alone would not cover it


def test_sums_in_the_worst_order_and_with_the_worst_roundings() -> None:
    """Adversarial accumulation: one large product first, then many that are rounded away."""
    n, u = 200, 2.0**-24
    weight = torch.full((1, n), 1.0)
    x = torch.full((1, n), u * 0.99, dtype=torch.float64)
    x[0, 0] = 1.0
    got = Fraction(0)
    for v in x[0].tolist():
        got = Fraction(float(torch.tensor(float(got + Fraction(v)), dtype=torch.float64).float()))
    true = sum((Fraction(v) for v in x[0].tolist()), Fraction(0))
    node = {"op": "linear", "in": [0], "weight": "w", "bias": None, "transposed": False, "bound": math.sqrt(n)}
    state = Analysis([node], {"w": weight.double()}, RUNTIMES["float32"], "l2").run(x)
    product = state.e0 - math.sqrt(n) * u * x.norm()
    assert abs(float(got - true)) <= float(product) * (1 + 1e-5)
    assert abs(float(got - true)) > 0.4 * float(product)  # the bound is not much larger than what can happen


def test_a_stored_rounding_keeps_signs_and_is_counted_once_after_a_rectifier() -> None:
    graph = Builder((1,))
    value = graph.add("linear", graph.input, weight=torch.ones(1, 1), bias=torch.full((1,), -100.0), transposed=False)
    graph.add("activation", value, name="relu")
    analysis = Analysis(bounded(graph), {k: t.double() for k, t in graph.tensors.items()}, RUNTIMES["bfloat16"], "l2")
    states = analysis.states(torch.ones(1, 1, dtype=torch.float64))
    before, after = (analysis.settled(state) for state in states[1:])
    assert float(before.e0) > 99 * 2.0**-8
    assert float(after.e0) < 2 * 2.0**-8  # the unit is off


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "softshrink", "lambd": 1.0},
        {"name": "hardtanh", "min": 0.5, "max": 2.0},
        {"name": "softplus", "beta": 1.0},
    ],
)
def test_a_stored_rounding_is_settled_before_an_activation_that_is_not_homogeneous(fields: dict[str, Any]) -> None:
    graph = Builder((1,))
    value = graph.add("linear", graph.input, weight=torch.ones(1, 1), bias=None, transposed=False)
    graph.add("activation", value, **fields)
    analysis = Analysis(bounded(graph), {k: t.double() for k, t in graph.tensors.items()}, RUNTIMES["bfloat16"], "l2")
    states = analysis.states(torch.full((1, 1), 1.0 + 2.0**-20, dtype=torch.float64))
    before, after = (analysis.settled(state) for state in states[1:])
    assert float(after.e0) >= float(before.e0)  # the slope is 1, and the result may be 0


def test_numbers_near_overflow_limit_the_radius() -> None:
    graph = Builder((1,))
    graph.add("scale", graph.input, factor=2.0)
    for runtime, largest in (("float32", 3.4e38), ("float64", 1.79e308)):
        analysis = Analysis(bounded(graph), {}, RUNTIMES[runtime], "l2")
        state = analysis.run(torch.tensor([[1.0], [largest / 3]], dtype=torch.float64))
        assert float(state.cap[0]) > 1e6
        assert float(state.cap[1]) == 0.0


def test_half_precision_overflows_where_float32_does_not() -> None:
    graph = Builder((1,))
    graph.add("linear", graph.input, weight=torch.full((1, 1), 100.0), bias=None, transposed=False)
    x = torch.tensor([[1.0], [1000.0]], dtype=torch.float64)
    for runtime, inside in (("float16", [True, False]), ("bfloat16", [True, True]), ("float32", [True, True])):
        state = Analysis(
            bounded(graph), {k: t.double() for k, t in graph.tensors.items()}, RUNTIMES[runtime], "l2"
        ).run(x)
        assert (state.cap > 0).tolist() == inside


def test_small_numbers_may_be_flushed() -> None:
    graph = Builder((1,))
    graph.add("linear", graph.input, weight=torch.ones(1, 1), bias=None, transposed=False)
    x = torch.full((1, 1), 1e-39, dtype=torch.float64)
    state = Analysis(bounded(graph), {k: t.double() for k, t in graph.tensors.items()}, RUNTIMES["float32"], "l2").run(
        x
    )
    assert float(state.e0) > 1e-39


def test_operations_without_a_rule_are_refused() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(CertificateError, match="teleport"):
        own_error({"op": "teleport"}, {}, [x], x, 1.0)
    with pytest.raises(CertificateError, match="teleport"):
        slope({"op": "teleport"}, {}, "l2")


@given(st.integers(0, 10**6), st.floats(1e-17, 1e-2))
@settings(max_examples=50)
def test_gamma_is_rounded_up(k: int, u: float) -> None:
    product = Fraction(k) * Fraction(u)
    if product < 1:
        assert Fraction(gamma(k, u)) >= product / (1 - product) or gamma(k, u) == math.inf
    else:
        assert gamma(k, u) == math.inf


def test_sizes_and_ones() -> None:
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]) * 1e200
    assert float(size(x, "linf")) == 4e200
    assert float(size(x, "token_max")) == pytest.approx(5e200)
    assert float(size(x, "l2")) == pytest.approx(math.sqrt(26) * 1e200)
    for norm in ("l2", "linf", "token_max"):
        assert ones(x, norm) >= float(size(torch.ones_like(x), norm)) * (1 - 1e-5)
        assert float(size(torch.full_like(x, math.nan), norm)) != 0.0


def test_exact_operations_add_nothing() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    for node in (
        {"op": "activation", "name": "relu"},
        {"op": "reshape", "shape": [2, 2]},
        {"op": "groupsort", "group_size": 2, "axis": 0},
    ):
        assert own_error(node, {}, [x], apply({**node, "in": [0]}, {}, [x]), 1.0) is None
    assert isinstance(own_error({"op": "scale", "factor": 2.0}, {}, [x], 2 * x, 2.0), Own)
