"""Laws of the transport losses: the formula, the distance that bounds them, the gradient, the radius that they ask for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from stableopt.nn import HKRLoss, KRLoss, margin_constants, margin_radii


def literal_kr(z: list[list[float]], y: list[int]) -> float:
    """One against the others, one mean at a time; a class that is missing, or alone, does not count."""
    found = []
    for k in range(len(z[0])):
        own = [row[k] for row, label in zip(z, y, strict=True) if label == k]
        others = [row[k] for row, label in zip(z, y, strict=True) if label != k]
        if own and others:
            found.append(sum(own) / len(own) - sum(others) / len(others))
    return -sum(found) / max(1, len(found))


def literal_hinge(row: list[float], label: int, m: float) -> float:
    others = [max(0.0, m / 2 + v) for j, v in enumerate(row) if j != label]
    return max(0.0, m / 2 - row[label]) + sum(others) / len(others)


@settings(max_examples=30)
@given(
    n=st.integers(1, 6), classes=st.integers(2, 4), alpha=st.floats(0, 1), m=st.floats(0.1, 3), seed=st.integers(0, 99)
)
def test_they_are_the_formulas(n: int, classes: int, alpha: float, m: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(n, classes, generator=generator), torch.randint(0, classes, (n,), generator=generator)
    kr = literal_kr(z.tolist(), y.tolist())
    hinge = sum(literal_hinge(row, label, m) for row, label in zip(z.tolist(), y.tolist(), strict=True)) / n
    assert float(KRLoss()(z, y)) == pytest.approx(kr, abs=1e-13)
    assert float(HKRLoss(alpha, m)(z, y)) == pytest.approx((1 - alpha) * kr + alpha * hinge, abs=1e-13)


def test_one_output_is_the_two_class_formula() -> None:
    f, y = torch.randn(7), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    kr = f[y == 0].mean() - f[y == 1].mean()
    hinge = (0.75 - (2 * y - 1) * f).relu().mean()
    for shape in ((7,), (7, 1)):
        torch.testing.assert_close(KRLoss()(f.reshape(shape), y), kr)
        torch.testing.assert_close(HKRLoss(0.3, 1.5)(f.reshape(shape), y), 0.7 * kr + 0.3 * hinge)


def test_it_is_at_least_minus_the_distance_and_equal_for_the_best_function() -> None:
    inside, outside = torch.randn(5, 3) + 1.0, torch.randn(5, 3)
    x, y = torch.cat([inside, outside]), torch.tensor([1] * 5 + [0] * 5)
    cost = torch.cdist(inside, outside)
    rows, columns = linear_sum_assignment(cost)
    distance = float(cost[rows, columns].mean())  # W1 of two sets of equal size is the best matching
    for w in torch.nn.functional.normalize(torch.randn(50, 3)):
        assert float(KRLoss()(x @ w, y)) >= -distance - 1e-12
    line = torch.tensor(
        [0.0, 1.0, 2.0, 5.0, 6.0, 7.0]
    )  # on a line with the classes apart the identity is the best function
    assert float(KRLoss()(line, torch.tensor([0, 0, 0, 1, 1, 1]))) == pytest.approx(-5.0)


def test_a_constant_does_not_matter_and_the_gradient_is_a_constant() -> None:
    y = torch.tensor([0, 2, 2, 1])
    z = torch.randn(4, 4, requires_grad=True)
    torch.testing.assert_close(KRLoss()(z + 3.0, y), KRLoss()(z, y))
    (g,) = torch.autograd.grad(KRLoss()(z, y), z)
    expected = torch.zeros(4, 4)
    for k in range(3):  # class 3 is not there
        for i in range(4):
            n = int((y == k).sum())
            expected[i, k] = (-1 / n if y[i] == k else 1 / (4 - n)) / 3
    torch.testing.assert_close(g, expected)


def test_a_batch_of_one_class_has_no_distance() -> None:
    z, y = torch.randn(3, 2, requires_grad=True), torch.tensor([1, 1, 1])
    for loss in (KRLoss(), HKRLoss(0.0)):
        value = loss(z, y)
        (g,) = torch.autograd.grad(value, z)
        assert float(value.detach()) == 0.0
        assert not g.any()
    assert float(KRLoss()(z[:, 0].detach(), y)) == 0.0


def test_no_hinge_is_left_exactly_where_the_margins_are_there() -> None:
    m, y = 2.0, torch.tensor([0, 1])
    z = torch.tensor([[1.0, -1.0, -1.0], [-4.0, 1.5, -1.0]])
    assert float(HKRLoss(1.0, m)(z, y)) == 0.0
    r = margin_radii(z, margin_constants(torch.eye(3)), 1.0, y)
    assert bool((r >= m / math.sqrt(2) * (1 - 1e-12)).all())
    assert float(HKRLoss(1.0, m)(z - 1e-6, y)) > 0.0  # below m/2
    assert float(HKRLoss(1.0, m)(z + 1e-6, y)) > 0.0  # the others above -m/2


@pytest.mark.parametrize("loss", [KRLoss, lambda reduction: HKRLoss(0.4, 1.3, reduction=reduction)])
def test_the_reductions_are_those_of_the_samples(loss: object) -> None:
    make = loss if loss is not KRLoss else lambda reduction: KRLoss(reduction=reduction)
    z, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    each = make("none")(z, y)  # type: ignore[operator]
    assert each.shape == (6,)
    torch.testing.assert_close(make("mean")(z, y), each.mean())  # type: ignore[operator]
    torch.testing.assert_close(make("sum")(z, y), each.sum())  # type: ignore[operator]


def test_the_gradients_are_right() -> None:
    z, y = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    assert torch.autograd.gradcheck(lambda v: KRLoss()(v, y), z)
    assert torch.autograd.gradcheck(lambda v: HKRLoss(0.6, 0.9)(v, y), z)


def test_half_precision_compilation_and_int32_labels_work() -> None:
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for loss in (KRLoss(), HKRLoss(0.5)):
        expected = loss(z, y)
        for half in (torch.float16, torch.bfloat16):
            found = loss(z.to(half), y)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0.05)
        torch.testing.assert_close(loss(z, y.int()), expected)
        torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(z, y), expected)
    assert str(HKRLoss(0.5, 2.0)) == "HKRLoss(alpha=0.5, margin=2.0)"


@pytest.mark.parametrize("loss", [KRLoss(), HKRLoss()])
@pytest.mark.parametrize(
    ("z", "y", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, "labels of shape"),
        (torch.zeros(2), torch.tensor([0]), ValueError, "one output and one label"),
        (torch.zeros(1, 3, 2), torch.tensor([0]), ValueError, "logits of shape"),
        (torch.zeros(1, 3), torch.zeros(1), TypeError, "integer class labels"),
        (torch.zeros(2, 1), torch.tensor([0, 2]), ValueError, r"0 ... 1, got labels from 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), ValueError, "got labels from -1"),
    ],
)
def test_what_does_not_fit_is_refused(
    loss: torch.nn.Module, z: torch.Tensor, y: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss(z, y)


def test_arguments_out_of_range_are_refused() -> None:
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha must lie from 0 to 1"):
            HKRLoss(bad)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="margin must be positive and finite"):
            HKRLoss(0.5, bad)
    with pytest.raises(ValueError, match="reduction must be"):
        KRLoss(reduction="all")
