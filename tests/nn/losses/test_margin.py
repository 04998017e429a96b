"""Laws of the margin loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stableopt.nn import MarginCrossEntropy


def literal(z: torch.Tensor, y: torch.Tensor, t: float, o: float) -> float:
    """The formula, one sample and one exponential at a time."""
    total = 0.0
    for row, label in zip(z.tolist(), y.tolist(), strict=True):
        shifted = [t * (v - (o if j == label else 0.0)) for j, v in enumerate(row)]
        total += (math.log(sum(math.exp(s) for s in shifted)) - shifted[label]) / t
    return total / len(z)


@given(t=st.floats(0.1, 30), o=st.floats(-1, 2), seed=st.integers(0, 50))
def test_it_is_the_formula(t: float, o: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(4, 3, generator=generator), torch.randint(0, 3, (4,), generator=generator)
    assert float(MarginCrossEntropy(t, o)(z, y)) == pytest.approx(literal(z, y, t, o), rel=1e-12, abs=1e-13)


def test_without_offset_and_temperature_it_is_cross_entropy() -> None:
    z, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(MarginCrossEntropy(1.0, 0.0)(z, y), F.cross_entropy(z, y))


def test_it_tends_to_the_hinge_of_the_margin() -> None:
    z, y, o = torch.tensor([[1.0, 0.2, -3.0], [0.0, 0.9, 0.0]]), torch.tensor([0, 1]), 0.85
    hinge = torch.stack([0.2 - 1.0 + torch.tensor(o), torch.tensor(0.0)]).mean()  # max(0, max_j z_j - z_y + o)
    assert float(MarginCrossEntropy(1e4, o)(z, y)) == pytest.approx(float(hinge), abs=math.log(3) / 1e4)


def test_the_gradient_is_bounded_for_huge_logits() -> None:
    for dtype, size in ((torch.float32, 1e38), (torch.float64, 1e308), (torch.float16, 6e4)):
        z = torch.tensor([[size, -size, 0.0], [-size, size, 1.0]], dtype=dtype, requires_grad=True)
        loss = MarginCrossEntropy(16.0, 0.5)(z, torch.tensor([0, 0]))
        loss.backward()
        assert loss.dtype == (torch.float32 if dtype is torch.float16 else dtype)
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert float(z.grad.abs().sum()) <= 2 + 1e-3  # per sample |softmax - onehot|_1 <= 2, and a mean


def test_the_gradient_is_right() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    loss = MarginCrossEntropy(5.0, 0.3)
    assert torch.autograd.gradcheck(lambda v: loss(v, torch.tensor([1, 0, 3])), z)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        MarginCrossEntropy(bad, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_offset_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="offset must be finite"):
        MarginCrossEntropy(1.0, bad)


@pytest.mark.parametrize(
    ("z", "y", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, "labels of shape"),
        (torch.zeros(3), torch.tensor([0]), ValueError, "logits of shape"),
        (torch.zeros(1, 3), torch.zeros(1, 3), ValueError, "labels of shape"),
        (torch.zeros(1, 3), torch.zeros(1), TypeError, "integer class labels"),
        (torch.zeros(1, 3), torch.tensor([True]), TypeError, "integer class labels"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"0 ... 2, got labels from 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-100, 0]), ValueError, "got labels from -100"),
    ],
)
def test_what_does_not_fit_is_refused(z: torch.Tensor, y: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MarginCrossEntropy(1.0, 0.0)(z, y)


def test_int32_labels_and_compilation_work() -> None:
    loss = MarginCrossEntropy(2.0, 0.1)
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = loss(z, y)
    torch.testing.assert_close(loss(z, y.int()), expected)
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(z, y), expected)
    assert str(loss) == "MarginCrossEntropy(temperature=2.0, offset=0.1)"


def test_the_reductions_are_those_of_the_samples() -> None:
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    each = MarginCrossEntropy(2.0, 0.1, reduction="none")(z, y)
    assert each.shape == (4,)
    torch.testing.assert_close(MarginCrossEntropy(2.0, 0.1)(z, y), each.mean())
    torch.testing.assert_close(MarginCrossEntropy(2.0, 0.1, reduction="sum")(z, y), each.sum())
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        MarginCrossEntropy(reduction="max")
