"""Corners where a bound was once not one: each of these inputs broke a radius or a certificate."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from stableopt.certify import files
from stableopt.certify.certificate import Certificate
from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.execute_weighted import plain_convolve
from stableopt.certify.produce import _certificate
from stableopt.certify.program import Builder
from stableopt.certify.publish import publish
from stableopt.certify.rounding import Analysis
from stableopt.certify.runtime import RUNTIMES
from stableopt.certify.verifier.numbers import RejectedError, exact_log_norm, norm_at_most
from stableopt.errors import CertificateError, UncertifiableError


def certificate(graph: Builder) -> Certificate:
    return _certificate(publish(graph.program()), [], [], joint=False)


def test_tiny_weights_do_not_make_a_local_radius_unlimited() -> None:
    graph = Builder((2,))
    graph.add("linear", graph.input, weight=1e-170 * torch.eye(2), bias=None, transposed=False)
    radius = float(certificate(graph).local_radius(torch.tensor([[2.0, 1.0]])))
    assert 0.7071 < radius <= 2**-0.5


def test_taps_that_meet_on_a_circle_count_together_in_a_local_radius() -> None:
    graph = Builder((1, 1))
    one = {"stride": [1], "padding": [1], "dilation": [1], "groups": 1, "padding_mode": "circular", "transposed": False}
    value = graph.add(
        "conv", graph.input, dims=1, weight=torch.ones(1, 1, 3), bias=-2 * torch.ones(1), output_padding=[0], **one
    )
    value = graph.add("activation", value, name="relu")
    value = graph.add("reshape", value, shape=[1])
    graph.add("linear", value, weight=torch.tensor([[0.0], [1.0]]), bias=torch.tensor([0.0, -0.5]), transposed=False)
    radius = float(certificate(graph).local_radius(torch.zeros(1, 1, 1)))
    assert 0.8 < radius <= 2.5 / 3  # the function is relu(3 x - 2) - 1/2


@pytest.mark.parametrize("runtime", ["bfloat16", "float16"])
def test_a_dense_layer_after_a_permutation_stores_its_result_once(runtime: str) -> None:
    torch.manual_seed(0)
    graph, kind = Builder((16, 5)), RUNTIMES[runtime]
    weight = (torch.randn(16, 16) + 1).to(kind.autocast).double()
    bias = (-weight.sum(1) / 2).to(kind.autocast).double()  # nearly cancels
    value = graph.add("permute", graph.input, order=[1, 0])
    graph.add("linear", value, weight=weight, bias=bias, transposed=False)
    model, x = CertifiedModel(certificate(graph), runtime), torch.rand(8, 16, 5).to(kind.autocast).double()
    exact, q = x.mT @ weight.T + bias, x.mT @ weight.T.abs() + bias.abs()
    assert ((model.run(x) - exact).abs() <= kind.results.unit * exact.abs() + 2.0**-24 * (18 * q + 1)).all()


@pytest.mark.parametrize("runtime", ["bfloat16", "float16"])
def test_the_adjoint_on_a_circle_stores_its_result_once(runtime: str) -> None:
    torch.manual_seed(1)
    kind = RUNTIMES[runtime]
    node = {
        "op": "conv", "in": [0], "dims": 1, "weight": "w", "bias": None, "stride": [1], "padding": [2], "dilation": [1],
        "groups": 2, "padding_mode": "circular", "transposed": True, "output_padding": [0],
    }  # fmt: skip
    weight, x = (torch.randn(*s).to(kind.autocast).float() for s in ((4, 3, 5), (64, 4, 3)))
    with torch.autocast("cpu", dtype=kind.autocast):
        found = plain_convolve(node, weight, None, x).double()
    exact = plain_convolve(node, weight.double(), None, x.double())
    q = plain_convolve(node, weight.double().abs(), None, x.double().abs())
    assert ((found - exact).abs() <= kind.results.unit * exact.abs() + 2.0**-24 * (18 * q + 1)).all()
    moved = node | {"padding": [1]}
    with pytest.raises(CertificateError, match="circle"):
        Analysis([moved], {"w": weight.double()}, kind, "l2").run(x.double())


def test_reflections_that_a_runtime_rounds_keep_their_constant_in_the_maximum_norm() -> None:
    graph = Builder((4,), norm="linf")
    d = torch.tensor([[3.0, 1.1, 1.1, 1.1]], dtype=torch.float64) / 3**0.5
    value = graph.add("householder", graph.input, vectors=d, axis=-1)
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    graph.add("linear", value, weight=weight, bias=None, transposed=False)
    model, x = CertifiedModel(certificate(graph), "float32"), torch.tensor([[-1.0, 0.2, 0.2, 0.2]])
    found = model.predict(x)
    assert float(found.radii) > 0.05
    worst = x.double() + 0.999 * found.radii * torch.tensor([[-1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert model.run(worst).argmax(1) == found.labels


def test_a_method_without_weights_is_the_identity() -> None:
    graph = Builder((1,))
    operator = {"op": "linear", "weight": torch.ones(1, 1), "bias": None, "transposed": False}
    euler = {
        "op": "euler", "operator": operator, "steps": None, "step": 2.0, "decay": 1.0, "skew": None, "skew_bound": None,
        "free": None, "activation": {"op": "activation", "name": "identity"}, "times": 1,
    }  # fmt: skip
    graph.add("runge_kutta", graph.input, euler=euler, weights=[0.0], stages=[[]], times=1)
    found = certificate(graph)
    assert found.lipschitz == 1.0
    assert found.module().double()(torch.tensor([[0.0], [3.0]], dtype=torch.float64)).flatten().tolist() == [0.0, 3.0]


def test_a_softmax_along_the_batch_is_refused() -> None:
    graph = Builder((2, 3))
    graph.add("softmax", graph.input, axis=-2)
    assert certificate(graph).lipschitz == 0.5
    moved = replace(graph.program(), nodes=({"op": "softmax", "in": [0], "axis": -3, "bound": 0.5},))
    with pytest.raises(UncertifiableError, match="axis"):
        _certificate(moved, [], [], joint=False)


def test_what_is_not_finite_has_no_proof() -> None:
    for bad in (np.inf, np.nan):
        with pytest.raises(RejectedError, match="overflow"):
            norm_at_most(np.array([[[bad, 0.0], [0.0, 1.0]]]), Fraction(2) ** 1000)


def test_what_underflows_in_storage_grows_with_the_slope() -> None:
    nodes = [
        {"op": "linear", "in": [0], "weight": "w", "bias": None, "transposed": False, "bound": 2.0**-10},
        {"op": "activation", "in": [1], "name": "leaky_relu", "slope": 4096.0, "bound": 4096.0},
    ]
    weight = torch.tensor([[0.6 * 2.0**-10]]).half().double()
    analysis = Analysis(nodes, {"w": weight}, RUNTIMES["float16"], "l2")
    x = torch.tensor([[-(2.0**-14)]], dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.float16):
        y = torch.nn.functional.linear(x.float(), weight.float())
    found = torch.nn.functional.leaky_relu(y.float(), 4096.0).to(y.dtype).double()
    state = analysis.settled(analysis.run(x))
    assert 2.0**-24 < float((found - state.value).abs()) <= float(state.e0)


def test_logarithmic_norms_are_proved_in_integers_up_to_their_value() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 3, 20):
        for shift in (0.0, 0.7):
            A = rng.uniform(-0.3, 0.3, (n, n)) - shift * np.eye(n)
            top = float(np.linalg.eigvalsh(A + A.T)[-1])
            assert exact_log_norm(A, Fraction(top + 1e-8))
            assert not exact_log_norm(A, Fraction(top - 1e-13))


def test_the_bias_of_a_convolution_is_an_operand_too() -> None:
    graph = Builder((1, 4))
    settings = {"stride": [1], "padding": [1], "output_padding": [0], "dilation": [1], "groups": 1}
    weight, bias = torch.tensor([[[0.1, 0.2, 0.3]]]).float(), torch.tensor([1e5 + 0.3]).float()
    graph.add("conv", graph.input, dims=1, weight=weight, bias=bias, padding_mode="zeros", transposed=False, **settings)
    model = CertifiedModel(certificate(graph), "tf32")
    for value in model.network.tensors().values():
        assert not (value.view(torch.int32) & 0x1FFF).any()  # 11 significant bits: the hardware cuts nothing off


def test_a_machine_that_does_not_add_up_certifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Builder((2,))
    graph.add("linear", graph.input, weight=torch.eye(2), bias=None, transposed=False)
    found = certificate(graph)
    monkeypatch.setattr(files, "self_test", lambda _: (_ for _ in ()).throw(OSError("it does not add up")))
    files.check_machine.cache_clear()
    with pytest.raises(CertificateError, match="add up"):
        Certificate(found.certificate, found.weights)
    with pytest.raises(CertificateError, match="add up"):
        certificate(graph)
