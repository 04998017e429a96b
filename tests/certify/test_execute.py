"""Each operation of a program computes what the torch layer, or ours, computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt.nn as ours
from stableopt.certify.execute import apply, is_composite, lower
from stableopt.certify.execute_weighted import convolve, plain_convolve
from stableopt.nn.attention import BoundedNorm

Case = tuple[dict[str, Any], nn.Module]


def activation(name: str, **settings: Any) -> dict[str, Any]:
    return {"op": "activation", "name": name, **settings}


ELEMENTWISE: list[Case] = [
    (activation("identity"), nn.Identity()), (activation("relu"), nn.ReLU()), (activation("abs"), ours.Abs()),
    (activation("hardtanh", min=-1.0, max=2.0), nn.Hardtanh(-1, 2)), (activation("leaky_relu", slope=-0.3), nn.LeakyReLU(-0.3)),
    (activation("softshrink", lambd=0.4), nn.Softshrink(0.4)), (activation("hardsigmoid"), nn.Hardsigmoid()),
    (activation("hardswish"), nn.Hardswish()), (activation("softsign"), nn.Softsign()), (activation("tanh"), nn.Tanh()),
    (activation("sigmoid"), nn.Sigmoid()), (activation("tanhshrink"), nn.Tanhshrink()),
    (activation("softplus", beta=2.0), nn.Softplus(2.0, threshold=100)), (activation("logsigmoid"), nn.LogSigmoid()),
    (activation("elu", alpha=1.3), nn.ELU(1.3)), (activation("celu", alpha=1.3), nn.CELU(1.3)), (activation("selu"), nn.SELU()),
    (activation("gelu"), nn.GELU()), (activation("gelu_tanh"), nn.GELU("tanh")), (activation("silu"), nn.SiLU()),
    (activation("mish"), nn.Mish()), (activation("soft_abs", delta=0.2), ours.SoftAbs(0.2)),
    (activation("threshold", min=0.3), nn.Threshold(0.3, 0.3)), ({"op": "scale", "factor": -1.5}, ours.Scale(-1.5)),
]  # fmt: skip
ON_IMAGES: list[Case] = [
    ({"op": "groupsort", "group_size": 2, "axis": 0}, ours.GroupSort(2)),
    ({"op": "groupsort", "group_size": 4, "axis": 0}, ours.GroupSort(4)),
    ({"op": "l2pool", "dims": 2, "kernel": [2, 3], "stride": [2, 3]}, ours.L2NormPool((2, 3))),
    (
        {"op": "pool", "name": "avg", "dims": 2, "kernel": [2, 3], "stride": [1, 2], "padding": [1, 1]},
        nn.AvgPool2d((2, 3), (1, 2), 1),
    ),
    (
        {"op": "pool", "name": "max", "dims": 2, "kernel": [2, 3], "stride": [1, 2], "padding": [1, 1]},
        nn.MaxPool2d((2, 3), (1, 2), 1),
    ),
    ({"op": "softmax", "axis": 0}, nn.Softmax(1)),
    ({"op": "softmax", "axis": -1}, nn.Softmax(-1)),
    ({"op": "ball", "radius": 2.0, "center": None}, ours.BallProjection(2.0)),
    ({"op": "center"}, ours.LayerCentering(6, bias=False)),
    ({"op": "reshape", "shape": [144]}, nn.Flatten()),
    ({"op": "pad", "before": [0, 1, 2], "after": [0, 2, 0]}, nn.ZeroPad2d((2, 0, 1, 2))),
    ({"op": "permute", "order": [2, 0, 1]}, nn.Identity()),
]


def close(node: dict[str, Any], expected: Tensor, x: Tensor, tensors: dict[str, Tensor] | None = None) -> None:
    torch.testing.assert_close(apply({**node, "in": [0]}, tensors or {}, [x]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ELEMENTWISE, ids=lambda c: c[0].get("name", "scale"))
def test_elementwise_operations(case: Case) -> None:
    node, module = case
    x = torch.cat([torch.randn(40) * 3, torch.tensor([0.0, -0.0, 3.0, -3.0, 30.0, -30.0])])[None]
    close(node, module(x), x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = apply({**node, "in": [0]}, {}, [x.to(dtype)])
        assert low.dtype == dtype
        assert bool(
            ((low.double() - module(x.to(dtype).double())).abs() <= 2 * torch.finfo(dtype).eps * (1 + x.abs())).all()
        )


@pytest.mark.parametrize("case", ON_IMAGES, ids=lambda c: c[0]["op"])
def test_operations_on_images(case: Case) -> None:
    node, module = case
    x = torch.randn(3, 4, 6, 6) * 3
    close(node, module(x) if node["op"] != "permute" else x.permute(0, 3, 1, 2), x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert apply({**node, "in": [0]}, {}, [x.to(dtype)]).dtype == dtype


def test_operations_with_tensors_of_their_own() -> None:
    x, v = torch.randn(3, 4, 6, 6) * 3, torch.randn(5, 8) * 3
    slopes, zigzag, spline = nn.PReLU(4), ours.NActivation(4), ours.LinearSpline(4)
    turn, wide, norm = ours.Householder(4), ours.Householder(8, 4), BoundedNorm(8, radius=0.7, affine=False)
    for module in (slopes, zigzag, spline, turn, wide):
        for value in module.parameters():
            nn.init.normal_(value)
    with torch.no_grad():
        close(activation("prelu", weight="w", axis=0), slopes(x), x, {"w": slopes.weight})
        close(activation("zigzag", thresholds="w", axis=0), zigzag(x), x, {"w": zigzag.thresholds})
        tensors = {"s": spline.limited_slopes(), "b": spline.bias}
        close(activation("spline", slopes="s", bias="b", span=spline.span, axis=0), spline(x), x, tensors)
        close({"op": "householder", "vectors": "v", "axis": 0}, turn(x), x, {"v": turn.direction})
        close({"op": "householder", "vectors": "v", "axis": -1}, wide(v), v, {"v": wide.direction})
        close({"op": "bounded_norm", "radius": 0.7}, norm(v), v)
        close({"op": "affine", "scale": "s", "bias": "b", "axis": 0}, x * v[0, :4, None, None] + v[1, :4, None, None], x,
              {"s": v[0, :4], "b": v[1, :4]})  # fmt: skip
        close({"op": "affine", "scale": None, "bias": "b", "axis": None}, x + x[1], x, {"b": x[1]})
        close({"op": "linear", "weight": "w", "bias": None, "transposed": True}, v @ x[0, 0, :, :].repeat(2, 1)[:8], v,
              {"w": x[0, 0, :, :].repeat(2, 1)[:8]})  # fmt: skip
        close(
            {"op": "ball", "radius": 1.0, "center": "c"},
            v[:1] + (v - v[:1]) / (v - v[:1]).norm(dim=1, keepdim=True).clamp_min(1.0),
            v,
            {"c": v[0]},
        )
        close(
            {"op": "ball", "radius": 1.0, "center": None, "axis": -1},
            x / x.norm(dim=-1, keepdim=True).clamp_min(1.0),
            x,
        )


def test_operations_that_move_entries() -> None:
    x = torch.randn(3, 4, 6)
    close({"op": "slice", "axis": 1, "start": 1, "stop": 6, "step": 2}, x[:, :, 1:6:2], x)
    close({"op": "mean", "axis": 0}, x.mean(1), x)
    both = apply({"op": "concat", "in": [0, 0], "axis": -1}, {}, [x, x])
    assert both.equal(torch.cat([x, x], -1))
    added = apply({"op": "sum", "in": [0, 0, 0], "factors": [1.0, 0.5, -2.0]}, {}, [x, x, x])
    torch.testing.assert_close(added, -0.5 * x)
    with pytest.raises(ValueError, match="slice"):
        apply({"op": "slice", "in": [0], "axis": 1, "start": 1, "stop": 7}, {}, [x])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_and_their_adjoints(dims: int) -> None:
    options = itertools.product([False, True], ["zeros", "circular"], [1, 2], [1, 2], [1, 2], [0, 1])
    for transposed, mode, groups, stride, dilation, padding in options:
        node = {
            "dims": dims,
            "stride": [stride] * dims,
            "padding": [padding] * dims,
            "dilation": [dilation] * dims,
            "groups": groups,
            "padding_mode": mode,
            "transposed": transposed,
            "output_padding": [(stride - 1) * transposed] * dims,
        }
        W, x = torch.randn(4, 2, *[3] * dims), torch.randn(2, 4 if transposed else 2 * groups, *[6] * dims)
        b = torch.randn(2 * groups if transposed else 4)
        torch.testing.assert_close(plain_convolve(node, W, b, x), convolve(node, W, b, x))
        if not transposed:
            y = torch.randn_like(convolve(node, W, None, x))
            rest = [(6 + 2 * padding - 2 * dilation - 1) % stride] * dims
            back = convolve(node | {"transposed": True, "output_padding": rest}, W, None, y)
            torch.testing.assert_close((back * x).sum(), (y * convolve(node, W, None, x)).sum())


def test_zeros_stay_exact_and_nothing_is_divided_by_zero() -> None:
    x = torch.zeros(2, 4, 2)
    for node in (
        {"op": "l2pool", "dims": 1, "kernel": [2], "stride": [2]},
        {"op": "ball", "radius": 1.0, "center": None},
    ):
        assert float(apply({**node, "in": [0]}, {}, [x]).abs().max()) == 0.0
    assert apply({"op": "householder", "in": [0], "vectors": "v", "axis": 0}, {"v": torch.zeros(2, 2)}, [x + 1]).equal(
        x + 1
    )


def test_unknown_operations_are_refused() -> None:
    for node in (
        {"op": "teleport"},
        activation("teleport"),
        {"op": "pool", "name": "teleport", "kernel": [], "stride": [], "padding": []},
    ):
        with pytest.raises(ValueError, match="teleport"):
            apply({**node, "in": [0]}, {}, [torch.ones(1, 2)])


def test_a_simple_operation_stands_for_itself() -> None:
    node = {"op": "sum", "in": [4, 7], "factors": [1.0, 1.0]}
    assert not is_composite(node)
    assert lower(node) == [node | {"in": [0, 1]}]
