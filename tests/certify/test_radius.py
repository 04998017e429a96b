"""No certified input is broken, the radius of a linear classifier is the true one, and the error bound is an upper bound."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.certify import certify
from stableopt.certify.radius import evaluate, radii
from stableopt.nn import GradientBlock, GroupSort
from tests.certify.models import models, rich_model


def test_a_linear_classifier_has_its_true_radius() -> None:
    layer = nn.Linear(5, 3)
    x = torch.randn(200, 5)
    r = certify(layer, (5,)).radius(x)
    W, b = layer.weight.detach(), layer.bias.detach()
    z = x @ W.T + b
    best = z.argmax(1)
    true = torch.full((200,), math.inf)
    for j in range(3):
        distance = (z.gather(1, best[:, None])[:, 0] - z[:, j]) / (W[best] - W[j]).norm(dim=1)
        true = torch.where(best == j, true, torch.minimum(true, distance))
    assert bool((r <= true).all())
    assert bool((r >= true * (1 - 1e-6)).all())


def exact_logits(cert_tensors: dict[str, torch.Tensor], nodes: tuple[dict, ...], x: list[Fraction]) -> list[Fraction]:
    """A dense network with rectifiers, in rational arithmetic."""
    for node in nodes:
        if node["op"] == "linear":
            W, b = cert_tensors[node["weight"]], cert_tensors[node["bias"]]
            x = [
                sum(Fraction(float(w)) * v for w, v in zip(row, x, strict=True)) + Fraction(float(c))
                for row, c in zip(W, b, strict=True)
            ]
        else:
            x = [max(v, Fraction(0)) for v in x]
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_no_certified_input_is_broken(dtype: torch.dtype, offset: float) -> None:
    """Walk along the gradient to the decision boundary by bisection in rational arithmetic: it is never nearer than r."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        model[4].bias.add_(offset)  # the same to all logits: the classes stay, the rounding grows
    cert = certify(model, (3,))
    tensors = {name: value.double() for name, value in cert._tensors.items()}
    plain, closest = cert.module().double(), math.inf
    x = torch.randn(12, 3, requires_grad=True)
    z = plain(x)
    best, second = z.topk(2).indices.T
    (gradient,) = torch.autograd.grad((z.gather(1, best[:, None]) - z.gather(1, second[:, None])).sum(), x)
    r, x = cert.radius(x), x.detach()
    for i in range(len(x)):
        origin = [Fraction(float(v)) for v in x[i]]
        way = [-Fraction(float(v)) for v in gradient[i]]
        length = math.sqrt(float(sum(v * v for v in way)))

        def label(t: Fraction, origin: list[Fraction] = origin, way: list[Fraction] = way) -> int:
            logits = exact_logits(tensors, cert.layers, [a + t * b for a, b in zip(origin, way, strict=True)])
            return max(range(3), key=logits.__getitem__)

        first, low, high = label(Fraction(0)), Fraction(0), Fraction(1, 64)
        if r[i] > 0:
            assert first == int(best[i])
        while label(high) == first and high < 4096:
            high *= 2
        if high >= 4096 or length == 0:
            continue
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if label(middle) == first else (low, middle)
        assert float(high) * length * (1 + 1e-12) >= float(r[i])
        closest = min(closest, float(high) * length / max(float(r[i]), 1e-300))
    assert closest < 50.0  # the attack comes near: the radii are not just zeros


@settings(max_examples=25)
@given(models())
def test_the_error_bound_covers_the_error(case: tuple[nn.Sequential, tuple[int, ...]]) -> None:
    """The same evaluation on inputs perturbed by rounding stays within the bounds (inputs scaled up to make errors visible)."""
    model, shape = case
    cert = certify(model, shape)
    x = 100.0 * torch.randn(3, *shape)
    tensors = {name: value.double() for name, value in cert._tensors.items()}
    y, error = evaluate(cert.layers, tensors, x)
    with torch.no_grad():
        reference = cert.module().double()(x)
    gap = (y - reference).flatten(1).norm(dim=1)
    assert bool((gap <= 2.0 * error + 1e-9 * any("softplus" in str(n) for n in cert.layers)).all())
    assert bool((error <= 1e-9 * (1.0 + reference.flatten(1).norm(dim=1)) * max(1.0, cert.lipschitz) * 100).all())


def test_the_error_bound_of_a_dense_network_against_sixty_digits() -> None:
    mpmath.mp.dps = 60
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 30), nn.Tanh(), GradientBlock(30, 10, activation="tanh", strong=0.3), nn.Linear(30, 4)
    )
    with torch.no_grad():
        model[3].weight.mul_(1e3)
    cert = certify(model, (40,))
    tensors = {name: value.double() for name, value in cert._tensors.items()}
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(1, 40) * 10.0 ** (seed - 2)
        y, error = evaluate(cert.layers, tensors, x)
        h = mpmath.matrix(x[0].tolist())
        for node in cert.layers:
            if node["op"] == "activation":
                h = h.apply(mpmath.tanh)
                continue
            W = mpmath.matrix(tensors[node["weight"]].tolist())
            b = mpmath.matrix(tensors[node["bias"]].tolist())
            if node["op"] == "linear":
                h = W * h + b
            else:
                force = W.T * (W * h + b).apply(mpmath.tanh)
                h = h - mpmath.mpf(node["step"]) * (mpmath.mpf(node["strong"]) * h + force)
        gap = float(mpmath.norm(mpmath.matrix(y[0].tolist()) - h))
        assert 0 < gap <= float(error[0])
        assert float(error[0]) < 1e5 * gap


def test_cancellation_is_counted() -> None:
    """Huge weights that cancel: the logits are wrong by about one, and nothing may be certified from them."""
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e17, 1.0, -1e17], [0.0, 0.0, 0.0]]))
    cert = certify(layer, (3,))
    assert float(cert.radius(torch.tensor([[1.0, 1.0, 1.0]]))[0]) == 0.0
    _, error = evaluate(cert.layers, {"weight": layer.weight.detach()}, torch.ones(1, 3))
    assert float(error[0]) > 3 * 2.0**-53 * 2e17  # through |W||x|, however small Wx is


@pytest.mark.parametrize("name", ["conv", "pool", "scale", "smooth", "block"])
def test_each_kind_of_layer_adds_its_own_error(name: str) -> None:
    from stableopt.nn import Scale

    u = 2.0**-53
    layer, shape, least = {
        "conv": (nn.Conv1d(1, 1, 3, padding=1), (1, 8), 3 * u),
        "pool": (nn.AvgPool1d(4), (1, 8), 4 * u),
        "scale": (Scale(0.3), (8,), u),
        "smooth": (nn.Tanh(), (8,), 4 * u),
        "block": (GradientBlock(8), (8,), 4 * u),
    }[name]
    if name == "conv":
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    cert = certify(layer, shape)
    x = torch.ones(1, *shape)
    tensors = {k: v.double() for k, v in cert._tensors.items()}
    y, error = evaluate(cert.layers, tensors, x)
    assert float(error) >= least * float(y.norm())
    assert float(error) < 1e-13


def test_exact_layers_add_nothing() -> None:
    model = nn.Sequential(nn.ReLU(), GroupSort(), nn.Flatten(), nn.Hardtanh())
    _, error = evaluate(certify(model, (4,)).layers, {}, torch.randn(3, 4))
    assert float(error.max()) < 1e-200


def test_errors_pass_through_the_bounds_of_later_layers() -> None:
    nodes = ({"op": "scale", "factor": 0.3, "bound": 0.3}, {"op": "flatten", "bound": 1e6})  # exact, but may amplify
    _, small = evaluate(nodes[:1], {}, torch.ones(1, 1))
    _, large = evaluate(nodes, {}, torch.ones(1, 1))
    assert 1e6 * float(small) <= float(large) <= 1.001e6 * float(small)


def test_the_unfolded_convolution_is_the_convolution() -> None:
    model, shape = rich_model(torch.float64)
    cert = certify(model, shape)
    x = torch.randn(4, *shape)
    y, error = evaluate(cert.layers, {k: v.double() for k, v in cert._tensors.items()}, x)
    with torch.no_grad():
        gap = (y - cert.module()(x)).norm(dim=1)
    assert bool((gap <= 2 * error).all())
    assert bool((error < 1e-12).all())


def test_ties_nan_infinity_and_overflow_have_radius_zero() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight)
    cert = certify(layer, (2,))
    x = torch.tensor([[1.0, 1.0], [math.nan, 0.0], [math.inf, 0.0], [0.0, 0.0], [2.0, 0.0], [1e308, -1e308]])
    r = cert.radius(x)
    assert r[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert float(r[4]) == pytest.approx(math.sqrt(2.0))
    assert math.isfinite(float(r[5])) or float(r[5]) == math.inf
    with torch.no_grad():
        layer.weight.mul_(1e300)
    assert float(certify(layer, (2,)).radius(torch.tensor([[1e300, 0.0]]))[0]) == 0.0


def test_a_tie_that_only_rounding_breaks_is_not_certified() -> None:
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]))
    cert = certify(layer, (3,))
    x = torch.tensor([[0.1, 0.7, 0.1]])  # the two logits are equal in exact arithmetic
    assert float(cert.radius(x)[0]) == 0.0


def test_the_radius_scales_with_the_weights_not_at_all() -> None:
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(9, 4)
    plain = certify(layer, (4,)).radius(x)
    for exponent in (-600, -20, 20, 600):
        scaled = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            scaled.weight.copy_(layer.weight * 2.0**exponent)
        torch.testing.assert_close(certify(scaled, (4,)).radius(x), plain, rtol=1e-12, atol=0)


def test_equal_rows_never_swap_and_single_classes_certify_nothing() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    assert certify(layer, (2,)).radius(torch.randn(3, 2)).tolist() == [math.inf] * 3
    with torch.no_grad():
        layer.bias.zero_()
    assert certify(layer, (2,)).radius(torch.randn(3, 2)).tolist() == [0.0] * 3
    assert certify(nn.Linear(2, 1), (2,)).radius(torch.randn(3, 2)).tolist() == [0.0] * 3


def test_without_a_dense_last_layer_the_constant_is_root_two_times_l() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight)
    cert = certify(nn.Sequential(layer, nn.ReLU()), (2,))
    assert cert.margin_constants is None
    assert float(cert.radius(torch.tensor([[3.0, 1.0]]))[0]) == pytest.approx(2.0 / math.sqrt(2.0), rel=1e-8)
    assert float(cert.radius(torch.tensor([[3.0, 1.0]]))[0]) < math.sqrt(2.0)


def test_the_default_dtype_has_no_say() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    cert, x = certify(model, (3,)), torch.randn(20, 3, dtype=torch.float64)
    r = cert.radius(x)
    torch.set_default_dtype(torch.float32)
    again = certify(model, (3,))
    assert again.certificate == cert.certificate
    assert again.radius(x).equal(r)


def test_a_model_on_any_device_gives_the_same_certificate(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    cert, x = certify(model, (3,)), torch.randn(5, 3)
    moved = certify(model.to(device), (3,))
    assert moved.certificate == cert.certificate
    assert moved.radius(x.to(device)).equal(cert.radius(x))


def test_wrong_predictions_count_nothing() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight)
    cert = certify(layer, (2,))
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    r = cert.radius(x, torch.tensor([0, 1]))
    assert float(r[0]) > 1.0
    assert float(r[1]) == 0.0
    edge = float(r[0])
    assert cert.certified_accuracy(x, torch.tensor([0, 1]), 0.0) == 0.5
    assert cert.certified_accuracy(x, torch.tensor([0, 1]), math.nextafter(edge, 0.0)) == 0.5
    assert cert.certified_accuracy(x, torch.tensor([0, 1]), edge) == 0.0  # the ball is closed, the guarantee open


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=5), st.floats(0, 10), st.floats(1e-3, 1e3))
def test_radii_are_rounded_down(values: list[float], error: float, constant: float) -> None:
    logits = torch.tensor([values])
    constants = constant * (1 - torch.eye(len(values)))
    label, r = radii(logits, torch.tensor([error]), constants)
    top, second = sorted(values, reverse=True)[:2]
    true = (Fraction(top) - Fraction(second) - 2 * Fraction(error)) / Fraction(constant)
    assert Fraction(float(r[0])) <= max(true, Fraction(0))
    assert float(r[0]) >= float(true) * (1 - 1e-9) - 1e-5 * error / constant
    assert values[int(label[0])] == top


def test_batches_are_split_without_a_seam() -> None:
    cert = certify(nn.Linear(3, 4), (3,))
    x = torch.randn(700, 3)
    assert cert.radius(x).equal(torch.cat([cert.radius(x[:100]), cert.radius(x[100:])]))
    assert cert.radius(x[:0]).shape == (0,)
    assert cert.radius(x.float()).dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "labels", "error"),
    [
        (torch.zeros(2, 4), None, ValueError), (torch.zeros(3), None, ValueError), (torch.tensor(1.0), None, ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), None, TypeError), ([[0.0] * 3], None, TypeError),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ValueError), (torch.zeros(2, 3), torch.zeros(2), ValueError),
        (torch.zeros(2, 3), [0, 1], ValueError),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused(x: object, labels: object, error: type[Exception]) -> None:
    cert = certify(nn.Linear(3, 2), (3,))
    with pytest.raises(error):
        cert.radius(x, labels)


def test_wrong_radii_of_interest_are_refused() -> None:
    cert = certify(nn.Linear(3, 2), (3,))
    for eps in (-1.0, math.nan):
        with pytest.raises(ValueError, match="eps"):
            cert.certified_accuracy(torch.zeros(1, 3), torch.tensor([0]), eps)
    with pytest.raises(ValueError, match="empty"):
        cert.certified_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match="classes"):
        certify(nn.ReLU(), (2, 2)).radius(torch.zeros(1, 2, 2))
