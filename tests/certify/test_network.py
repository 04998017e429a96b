"""A program as a module: what it computes, moves, saves, compiles and exports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.certify.network import CertifiedNetwork, flatten
from stableopt.certify.operations import lowering
from stableopt.certify.program import Builder, Program

CONV: dict[str, Any] = {"dims": 2, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros",
                        "transposed": False, "output_padding": [0, 0]}  # fmt: skip


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).float()


def program(of: nn.Sequential) -> Program:
    graph = Builder((2, 4, 4))
    v = graph.add("conv", graph.input, weight=of[0].weight, bias=of[0].bias, **CONV)
    v = graph.add("activation", v, name="relu")
    v = graph.add("pool", v, name="avg", dims=2, kernel=[2, 2], stride=[2, 2], padding=[0, 0])
    v = graph.add("reshape", v, shape=[16])
    graph.add("linear", v, weight=of[4].weight, bias=of[4].bias, transposed=False)
    return graph.program()


@pytest.mark.parametrize("plain", [False, True])
def test_it_computes_the_network(plain: bool) -> None:
    source, x = model(), torch.randn(5, 2, 4, 4, dtype=torch.float32)
    network = CertifiedNetwork(program(source), plain=plain)
    torch.testing.assert_close(network(x), source(x))
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def test_its_numbers_are_copies_and_its_state_loads() -> None:
    source = program(model())
    network = CertifiedNetwork(source)
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert float(source.tensors["0.weight"].abs().max()) > 0
    other = CertifiedNetwork(source)
    network.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert copy.deepcopy(network).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_can_be_cast_and_moved(dtype: torch.dtype) -> None:
    network = CertifiedNetwork(program(model())).to(dtype)
    assert network(torch.randn(2, 2, 4, 4, dtype=dtype)).dtype == dtype
    assert network.to("meta")(torch.randn(2, 2, 4, 4, dtype=dtype, device="meta")).shape == (2, 3)


def test_gradients_of_the_input_pass_through() -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float32, requires_grad=True)
    CertifiedNetwork(program(model()))(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0


def test_it_can_be_exported() -> None:
    network, x = CertifiedNetwork(program(model())), torch.randn(2, 2, 4, 4, dtype=torch.float32)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), network(x))


@pytest.mark.slow
def test_it_can_be_compiled() -> None:
    network, x = CertifiedNetwork(program(model())), torch.randn(2, 2, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), network(x))


def test_names_with_dots_and_names_of_attributes_are_kept_apart() -> None:
    one = torch.ones(1)
    tensors = {"a.b": one, "a__b": 2 * one, "shape": 3 * one, "forward": 4 * one}
    nodes = [{"op": "affine", "in": [k], "scale": None, "bias": name, "axis": -1} for k, name in enumerate(tensors)]
    network = CertifiedNetwork(Program(tuple(nodes), tensors, (1,)))
    assert float(network(torch.zeros(1, 1))) == 10.0
    assert network.tensors().keys() == tensors.keys()


def test_composites_run_as_what_they_stand_for() -> None:
    @lowering("test_twice")
    def _twice(_node: dict[str, Any]) -> list[dict[str, Any]]:
        doubled = {"op": "sum", "in": [0, 0], "factors": [1.0, 1.0]}
        return [doubled, {"op": "sum", "in": [0, 1], "factors": [1.0, 1.0]}]

    @lowering("test_nested")
    def _nested(_node: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"op": "test_twice", "in": [1]}, {"op": "sum", "in": [0, 2], "factors": [1.0, 1.0]}]

    nodes = (
        {"op": "scale", "in": [0], "factor": 10.0},
        {"op": "test_nested", "in": [0, 1]},
        {"op": "test_twice", "in": [2]},
    )
    assert [node["op"] for node in flatten(nodes, 1)] == ["scale", *["sum"] * 5]
    assert float(CertifiedNetwork(Program(nodes, {}, (1,)))(torch.ones(1, 1))) == 3 * (1 + 3 * 10)


def test_inputs_of_another_shape_are_refused() -> None:
    network = CertifiedNetwork(program(model()))
    for x in (torch.zeros(2, 4, 4), torch.zeros(1, 2, 4, 5), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="expected inputs"):
            network(x)
    assert "operations=5" in repr(network)
