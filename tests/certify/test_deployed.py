"""Predictions with radii: tight where the arithmetic is exact, 0 with a reason elsewhere, refused where nothing holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.program import Builder
from stableopt.certify.runtime import RUNTIMES
from stableopt.errors import CertificateError
from tests.certify.falsify import Claims, claims


def linear(weight: Tensor, bias: Tensor | None = None, norm: str = "l2") -> Claims:
    graph = Builder((weight.shape[1],), norm)
    graph.add("linear", graph.input, weight=weight, bias=bias, transposed=False)
    return claims(graph)


def dense(seed: int = 0, dtype: torch.dtype = torch.float32, norm: str = "l2") -> Claims:
    torch.manual_seed(seed)
    graph = Builder((6,), norm)
    v = graph.add(
        "linear", graph.input, weight=torch.randn(8, 6).to(dtype), bias=torch.randn(8).to(dtype), transposed=False
    )
    v = graph.add("activation", v, name="relu")
    graph.add("linear", v, weight=torch.randn(4, 8).to(dtype), bias=torch.randn(4).to(dtype), transposed=False)
    return claims(graph)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_a_linear_classifier_has_nearly_its_true_radius(runtime: str, norm: str) -> None:
    weight = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.25, -1.0]])  # numbers of every format
    x = torch.randn(50, 2).float()
    answer = CertifiedModel(linear(weight, norm=norm), runtime).predict(x)
    y = x.double() @ weight.T
    best = y.argmax(1)
    rate = (
        (weight[best][:, None] - weight).norm(dim=2) if norm == "l2" else (weight[best][:, None] - weight).abs().sum(2)
    )
    true = ((y.gather(1, best[:, None]) - y) / rate).nan_to_num(nan=math.inf).amin(1)
    sure = true > 0.1
    unit = RUNTIMES[runtime].results.unit + RUNTIMES[runtime].operands.unit
    assert answer.labels[sure].equal(best[sure])
    assert bool((answer.radii <= true * (1 + 1e-12)).all())
    assert bool((answer.radii >= true * (1 - 20 * unit) - 20 * unit * x.norm(dim=1) - 1e-8).all())


def test_finer_runtimes_have_larger_radii() -> None:
    claim, x = dense(dtype=torch.bfloat16), torch.randn(40, 6).bfloat16().double()
    radii = [CertifiedModel(claim, name).predict(x).radii for name in ("float64", "float32", "float16", "bfloat16")]
    for finer, coarser in itertools.pairwise(radii):
        assert bool((finer >= coarser).all())
    assert float((radii[1] / radii[0])[radii[0] > 0.01].median()) > 0.9999
    assert float((radii[3] > 0).double().mean()) > 0.3


@pytest.mark.parametrize("runtime", ["float32", "float16", "bfloat16"])
def test_each_reason_for_a_radius_of_zero(runtime: str) -> None:
    model = CertifiedModel(linear(torch.tensor([[1.0, 0.0], [0.0, 1.0]])), runtime)
    x = torch.tensor(
        [[3.0, 1.0], [1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [3.3e38, -3.3e38], [1.0 + 2.0**-23, 1.0]]
    )
    answer = model.predict(x, torch.tensor([0, 0, 0, 0, 0, 0]))
    words = list(answer.reasons)
    last = "the margin is below the rounding" if runtime == "float32" else "a tie"
    assert words == ["", "a tie", "the input is not finite", "the input is not finite", "overflow", last]
    assert (answer.radii > 0).tolist() == [True, False, False, False, False, False]
    assert model.predict(x[:1], torch.tensor([1])).reasons == ("another class",)
    assert float(model.predict(x[:1], torch.tensor([1])).radii) == 0.0


def test_single_classes_and_equal_rows() -> None:
    assert (
        CertifiedModel(linear(torch.ones(1, 2)), "float32").predict(torch.zeros(2, 2)).reasons
        == ("a single class",) * 2
    )
    claim = linear(torch.ones(2, 2), torch.tensor([1.0, 0.0]))
    answer = CertifiedModel(claim, "float64").predict(torch.zeros(1, 2))
    assert float(answer.radii) > 1e10  # limited by the rounding of large inputs only
    assert math.isfinite(float(answer.radii))


def test_a_margin_that_only_rounding_makes_is_not_certified() -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], dtype=torch.float64)
    x = torch.tensor([[0.1, 0.7, 0.1]], dtype=torch.float64)
    for runtime in RUNTIMES:
        assert float(CertifiedModel(linear(weight), runtime).predict(x).radii) == 0.0


def test_the_shift_of_all_outputs_costs_what_it_must() -> None:
    weight, x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0]])
    radii = [
        float(CertifiedModel(linear(weight, torch.full((2,), b)), "float32").predict(x).radii)
        for b in (0.0, 1e4, 1e6, 1e8)
    ]
    assert radii[0] > radii[1] > radii[2] > 0 == radii[3]


def test_rounded_weights_have_their_own_bounds() -> None:
    """Under autocast a float32 weight is another weight: the margins and the constants are those of the rounded network."""
    weight = torch.tensor([[1.0, 2.0**-9 * 1.9], [0.0, 1.0]])
    x = torch.tensor([[2.0, 0.5]])
    model = CertifiedModel(linear(weight), "bfloat16")
    ran = weight.bfloat16().double()
    assert model.network.tensors()["0.weight"].equal(ran.float())
    answer, y = model.predict(x), x @ ran.T
    true = float((y[0, 0] - y[0, 1]) / (ran[0] - ran[1]).norm())
    assert 0.8 * true < float(answer.radii) <= true


def test_a_weight_that_grows_by_rounding_gets_a_larger_bound() -> None:
    weight = torch.full((1, 1), 1.0 + 2.0**-8 * 1.2)  # bfloat16 rounds it up to 1 + 2^-7
    graph = Builder((1,))
    v = graph.add("linear", graph.input, weight=weight, bias=None, transposed=False)
    graph.add("linear", v, weight=torch.tensor([[1.0], [-1.0]]), bias=None, transposed=False)
    claim = claims(graph)
    for runtime, least in (("float32", 1.0), ("bfloat16", 1.0 + 2.0**-7)):
        first = CertifiedModel(claim, runtime)._analysis.states(torch.ones(1, 1).double())[1]
        assert float(first.value[0, 0]) <= first.k1
        assert first.k1 >= least


def test_blocks_whose_weights_the_runtime_rounds_are_refused() -> None:
    torch.manual_seed(0)
    A = torch.randn(3, 2, dtype=torch.float32) * 0.3
    operator = {"op": "linear", "weight": A, "bias": None, "transposed": False}
    fields: dict[str, Any] = {"operator": operator, "activation": {"op": "activation", "name": "tanh"}, "steps": None, "step": 0.5,
                              "decay": 1.0, "skew": None, "free": None, "times": 2}  # fmt: skip
    for dtype, refused in ((torch.float32, True), (torch.bfloat16, False)):
        graph = Builder((2,))
        v = graph.add("euler", graph.input, **fields | {"operator": operator | {"weight": A.to(dtype)}})
        nodes = [graph.nodes[0] | {"bound": 1.0}]
        graph.add("linear", v, weight=torch.eye(2), bias=None, transposed=False)
        nodes.append(graph.nodes[1] | {"bound": 1.0})
        claim = Claims(dataclasses.replace(graph.program(), nodes=tuple(nodes)), 1.0, None)
        x = torch.randn(4, 2)
        assert bool((CertifiedModel(claim, "float32").predict(x).radii > 0).all())
        if refused:
            with pytest.raises(CertificateError, match="dtype of the runtime"):
                CertifiedModel(claim, "bfloat16").predict(x)
        else:
            assert float(CertifiedModel(claim, "bfloat16").predict(x).radii.max()) > 0


def test_another_runtime_is_refused() -> None:
    model, x = CertifiedModel(dense(), "float32"), torch.randn(2, 6)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(CertificateError, match="float32 products"):
            model.predict(x)
        with pytest.raises(CertificateError, match="float32 products"):
            CertifiedModel(dense(), "float32")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(model.predict(x).radii) == 2
    with torch.autocast("cpu", torch.bfloat16):  # an autocast around the call does not reach the network
        assert model.predict(x).logits.dtype == torch.float32


def test_a_changed_network_is_refused() -> None:
    x = torch.randn(2, 6)
    model = CertifiedModel(dense(), "float32")
    with torch.no_grad():
        next(model.network.parameters())[0, 0] += 1e-6
    with pytest.raises(CertificateError, match="changed"):
        model.predict(x)
    model = CertifiedModel(dense(), "float32")
    model.network.nodes[1]["name"] = "abs"
    with pytest.raises(CertificateError, match="changed"):
        model.predict(x)
    model = CertifiedModel(dense(), "float32")
    model.network.double()
    with pytest.raises(CertificateError, match="changed"):
        model.predict(x)


def test_a_run_outside_the_model_of_rounding_is_noticed() -> None:
    model, x = CertifiedModel(dense(), "float32"), torch.randn(20, 6)
    honest = model.run
    model.run = lambda z: honest(z) * (1 + 1e-3)  # pyright: ignore[reportAttributeAccessIssue] a library that is wrong
    answer = model.predict(x)
    assert float(answer.radii.max()) == 0.0
    assert set(answer.reasons) == {"the run is farther from the exact network than its runtime allows"}


def test_radii_in_the_maximum_norm() -> None:
    model, x = CertifiedModel(dense(), "float64"), torch.randn(20, 6)
    plain, converted = model.predict(x).radii, model.predict(x, norm="linf").radii
    torch.testing.assert_close(converted * math.sqrt(6), plain, rtol=1e-12, atol=0)
    assert bool((converted * math.nextafter(math.sqrt(6), 9) <= plain).all())
    other = CertifiedModel(dense(norm="linf"), "float64")
    assert other.predict(x, norm="linf").radii.equal(other.predict(x).radii)
    for claim, norm in ((other, "l2"), (model, "l1")):
        with pytest.raises(ValueError, match="radii in"):
            claim.predict(x, norm=norm)


def test_networks_without_a_dense_last_layer() -> None:
    graph = Builder((3,))
    v = graph.add("linear", graph.input, weight=torch.eye(3), bias=None, transposed=False)
    graph.add("scale", graph.add("activation", v, name="relu"), factor=0.5)
    for runtime in ("float32", "bfloat16"):
        r = CertifiedModel(claims(graph), runtime).predict(torch.tensor([[3.0, 1.0, 0.0]])).radii
        assert 0.9 * math.sqrt(2) < float(r) <= math.sqrt(2)  # the margin 1 over 0.5 sqrt 2


def test_batches_are_split_without_a_seam() -> None:
    model, x = CertifiedModel(dense(), "float32"), torch.randn(600, 6)
    whole = model.predict(x)
    assert len(whole.reasons) == 600
    torch.testing.assert_close(whole.radii[100:200], model.predict(x[100:200]).radii, rtol=1e-5, atol=1e-9)
    assert model.predict(x[:0]).radii.shape == (0,)


@pytest.mark.parametrize(
    ("x", "labels", "error"),
    [
        (torch.zeros(2, 5), None, ValueError),
        (torch.zeros(6), None, ValueError),
        (torch.zeros(2, 6).long(), None, TypeError),
        ([[0.0] * 6], None, TypeError),
        (torch.zeros(2, 6), torch.zeros(3).long(), ValueError),
        (torch.zeros(2, 6), torch.zeros(2), ValueError),
        (torch.zeros(2, 6), [0, 1], ValueError),
    ],
)
def test_wrong_inputs_are_refused(x: Any, labels: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        CertifiedModel(dense(), "float32").predict(x, labels)


def test_outputs_that_are_no_classes_are_refused() -> None:
    graph = Builder((2, 2))
    graph.add("scale", graph.input, factor=1.0)
    with pytest.raises(ValueError, match="classes"):
        CertifiedModel(claims(graph), "float32").predict(torch.zeros(1, 2, 2))
