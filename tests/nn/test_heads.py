"""Laws of the head with unit rows, of the constants of margins and of the radii."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.linalg import Bound
from stableopt.nn import lipschitz, lipschitz_rule
from stableopt.nn.heads import UnitRowLinear, margin_constants, margin_radii
from stableopt.nn.uniform import uniform_bound
from tests.nn import module_laws as laws
from tests.nn.module_laws import EPS, NORMS


def head(n: int = 5, classes: int = 3) -> UnitRowLinear:
    """One with generic rows."""
    module = UnitRowLinear(n, classes)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("norm", NORMS)
def test_the_constant_is_the_norm_of_the_normalised_matrix(norm: str) -> None:
    for n, classes in ((5, 3), (2, 7), (1, 1)):
        module = head(n, classes)
        laws.check_pairs(module, (n,), norm)
        laws.check_jacobians(module, (n,), norm)
        assert laws.attained(module, torch.randn(1, n), norm) == pytest.approx(1.0, rel=1e-10)


def test_copies_devices_and_gradients() -> None:
    laws.check_copies(head(), (5,))
    laws.check_devices_and_dtypes(head(), (5,))
    laws.check_gradients(head(), (5,))
    laws.check_gradients(head(), (2, 5))


@given(n=st.integers(1, 6), classes=st.integers(1, 5), exponent=st.integers(-300, 300), seed=st.integers(0, 30))
def test_every_row_has_norm_one_at_every_scale(n: int, classes: int, exponent: int, seed: int) -> None:
    module = UnitRowLinear(n, classes)
    with torch.no_grad():
        module.weight.copy_(torch.randn(classes, n, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent)
    W = module.unit_weight().detach()
    torch.testing.assert_close(W.norm(dim=1), torch.ones(classes), rtol=0, atol=8 * EPS)
    cosine = nn.functional.cosine_similarity(W, module.weight.detach() * 10.0**-exponent)
    torch.testing.assert_close(cosine, torch.ones(classes))


def test_rows_of_zeros_stay_zero_with_finite_gradients() -> None:
    module = UnitRowLinear(3, 2)
    nn.init.zeros_(module.weight)
    module(torch.randn(4, 3)).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.isfinite().all()
    assert lipschitz(module).upper == 0.0


def test_the_plain_layer_computes_the_same_and_checkpoints_load_both_ways() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = head().to(dtype)
        x = torch.randn(6, 5, dtype=dtype)
        plain = module.to_linear()
        assert type(plain) is nn.Linear
        assert plain.weight.dtype == dtype
        assert torch.equal(plain(x), module(x))
        assert lipschitz(plain) == lipschitz(module)
    module.load_state_dict(nn.Linear(5, 3).to(dtype).state_dict(), strict=True)
    assert UnitRowLinear(2, 3, bias=False).to_linear().bias is None
    state = torch.random.get_rng_state()
    module.to_linear()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unit_rows_are_not_a_unit_norm() -> None:
    """The trap: parallel rows have norm 1 each and the matrix has the root of their number."""
    module = UnitRowLinear(3, 9, bias=False)
    nn.init.ones_(module.weight)
    assert lipschitz(module).upper == pytest.approx(3.0)
    assert float(margin_constants(module.unit_weight()).max()) == 0.0
    orthogonal = UnitRowLinear(9, 4)
    K = margin_constants(orthogonal.unit_weight())
    torch.testing.assert_close(K, math.sqrt(2) * (1 - torch.eye(4)), rtol=1e-13, atol=0)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(margin_constants(opposite)[0, 1]) == pytest.approx(2.0, rel=1e-13)  # the largest that unit rows allow


@pytest.mark.parametrize("norm", NORMS)
def test_unit_rows_are_bounded_whatever_training_does(norm: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = UnitRowLinear(4, 9, bias=False).to(dtype)
        uniform = uniform_bound(module, norm).upper
        for scale in (1e-30, 1.0, 1e30):
            nn.init.normal_(module.weight, std=scale)
            assert laws.constant(module, norm) <= uniform
        rows = {"l2": torch.ones(4), "linf": torch.ones(4), "l1": torch.tensor([1.0, 0.0, 0.0, 0.0])}[norm]
        with torch.no_grad():
            module.weight.copy_(rows.expand(9, 4))
        assert uniform * (1 - 30 * torch.finfo(dtype).eps) <= laws.constant(module, norm) <= uniform


def exact_constant(u: list[float], v: list[float], norm: str) -> Fraction:
    """The dual norm of the difference of two rows; squared in l2."""
    d = [abs(Fraction(a) - Fraction(b)) for a, b in zip(u, v, strict=True)]
    return {"l2": sum(e * e for e in d), "linf": sum(d), "l1": max(d)}[norm]


@given(
    n=st.integers(1, 6),
    exponent=st.integers(-1070, 1020),
    near=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 50),
)
def test_a_margin_constant_is_never_below_the_exact_one(
    n: int, exponent: int, near: bool, dtype: torch.dtype, seed: int
) -> None:
    if dtype != torch.float64:
        exponent = max(-130, min(120, exponent))
    generator = torch.Generator().manual_seed(seed)
    W = torch.rand(3, n, generator=generator) - 0.5
    if near:
        W[1] = W[0] * (1 + 1e-9)
    W = (W * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)).to(dtype)
    rows = W.double().tolist()
    largest = float(W.double().abs().max())
    for norm in NORMS:
        K = margin_constants(W, norm)
        assert torch.equal(K, K.mT)
        assert not K.diagonal().any()
        for i in range(3):
            for j in range(3):
                exact, value = exact_constant(rows[i], rows[j], norm), Fraction(float(K[i, j]))
                power = 2 if norm == "l2" else 1
                assert value**power >= exact
                slack = Fraction(1) + (n + 10) * Fraction(1, 2**51)
                above = value - 4 * Fraction(largest) * n * Fraction(1, 2**500) - Fraction(1, 2**1074)
                assert above <= 0 or above**power <= exact * slack**power or i == j


def test_the_rounding_of_long_rows_is_counted() -> None:
    """Among so many sums of many terms some are rounded down by several units, and the constants still hold."""
    W = torch.rand(24, 300) - 0.5
    rows = W.tolist()
    for norm, power in (("l2", 2), ("linf", 1)):
        K = margin_constants(W, norm)
        for i in range(24):
            for j in range(i):
                assert Fraction(float(K[i, j])) ** power >= exact_constant(rows[i], rows[j], norm)


@pytest.mark.parametrize("norm", NORMS)
def test_the_constant_of_a_margin_is_attained(norm: str) -> None:
    """Move along the direction that Hoelder's inequality makes an equality."""
    module = head(6, 4)
    W = module.unit_weight().detach()
    K = margin_constants(W, norm)
    for i, j in ((0, 1), (2, 3)):
        d = W[i] - W[j]
        direction = {"l2": d, "linf": d.sign(), "l1": torch.where(d.abs() == d.abs().max(), d, 0.0)}[norm]
        direction = direction / torch.linalg.vector_norm(direction, laws.ORDER[norm])
        x = torch.randn(6)
        z, moved = module(x[None])[0].detach(), module((x - direction)[None])[0].detach()
        change = (z[i] - z[j]) - (moved[i] - moved[j])
        assert float(change) == pytest.approx(float(K[i, j]), rel=1e-12)


def test_pairs_are_tighter_than_the_norm_of_the_matrix() -> None:
    for _ in range(20):
        W = torch.randn(5, 7)
        assert float(margin_constants(W).max()) <= math.sqrt(2) * float(torch.linalg.matrix_norm(W, 2)) * (1 + 1e-13)
    assert margin_constants(torch.zeros(2, 3)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert margin_constants(torch.zeros(0, 3)).shape == (0, 0)


def test_no_class_overtakes_within_the_radius_and_one_does_just_past_it() -> None:
    module = head(6, 4).requires_grad_(False)
    W = module.unit_weight()
    K = margin_constants(W)
    x = torch.randn(200, 6)
    z = module(x)
    radius = margin_radii(z, K)
    best = z.argmax(1)
    for _ in range(20):
        d = torch.randn_like(x)
        y = x + 0.999 * radius[:, None] * d / d.norm(dim=1, keepdim=True)
        assert torch.equal(module(y).argmax(1), best)
    margins = z.gather(1, best[:, None]) - z
    ratios = (margins / K[best]).masked_fill(torch.nn.functional.one_hot(best, 4).bool(), math.inf)
    rival = ratios.argmin(1)
    d = W[rival] - W[best]
    d = d / d.norm(dim=1, keepdim=True)
    assert torch.equal(module(x + radius[:, None] * 0.9999 * d).argmax(1), best)
    past = module(x + radius[:, None] * 1.0001 * d)
    assert (past.gather(1, rival[:, None]) > past.gather(1, best[:, None])).all()


def test_the_radius_is_the_smallest_quotient_rounded_down() -> None:
    K = margin_constants(torch.randn(4, 3))
    z = torch.randn(30, 4)
    for L in (1.0, 0.25, 3.0, Bound(2.0, 3.0)):
        radius = margin_radii(z, K, L)
        upper = L.upper if isinstance(L, Bound) else L
        for row, r in zip(z.tolist(), radius.tolist(), strict=True):
            y = max(range(4), key=row.__getitem__)
            exact = min(
                (Fraction(row[y]) - Fraction(row[j])) / (Fraction(float(K[y, j])) * Fraction(upper))
                for j in range(4)
                if j != y
            )
            assert Fraction(r) <= exact
            assert float(exact) * (1 - 1e-14) <= r


def test_radii_at_the_ends_of_the_range_stay_below_the_exact_ones() -> None:
    K = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for margin, constant, L in (
        (1e308, 1e-200, 1e200),
        (1e-300, 1e20, 1e-10),
        (1e-200, 1e-200, 1e-200),
        (1e308, 1e-10, 1e-10),
        (5e-324, 2.0, 1.0),
        (1.0, 1e-200, 1e-200),
    ):
        r = margin_radii(torch.tensor([[margin, 0.0]]), K * constant, L)
        exact = Fraction(margin) / (Fraction(constant) * Fraction(L))
        assert Fraction(float(r)) <= exact
        if 1e-290 < float(min(exact, Fraction(1e300))) < 1e299:
            assert float(r) >= float(exact) * (1 - 1e-13)


def test_ties_nan_and_wrong_labels_have_no_radius() -> None:
    K = margin_constants(torch.eye(3))
    nan, inf = math.nan, math.inf
    z = torch.tensor([[1.0, 1.0, 0.0], [nan, 1.0, 0.0], [2.0, 1.0, nan], [inf, 0.0, 0.0], [3.0, 1.0, 0.0]])
    radius = margin_radii(z, K)
    assert radius[:4].tolist() == [0.0] * 4
    assert float(radius[4]) == pytest.approx(math.sqrt(2))
    labeled = margin_radii(z[4:].repeat(2, 1), K, target=torch.tensor([0, 1]))
    assert labeled.tolist() == [radius[4], 0.0]


def test_equal_rows_never_overtake_and_a_single_class_is_safe() -> None:
    W = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert margin_radii(torch.tensor([[2.0, 1.0]]), margin_constants(W)).tolist() == [math.inf]
    assert margin_radii(torch.tensor([[1.0, 1.0]]), margin_constants(W)).tolist() == [0.0]  # a tie is a tie
    assert margin_radii(torch.zeros(2, 1), torch.zeros(1, 1)).tolist() == [math.inf, math.inf]
    assert margin_radii(torch.zeros(0, 3), torch.ones(3, 3)).shape == (0,)


def test_float32_logits_and_constants_give_float64_radii_without_gradient() -> None:
    z = torch.randn(3, 4, dtype=torch.float32, requires_grad=True)
    radius = margin_radii(z, margin_constants(torch.eye(4, dtype=torch.float32)))
    assert radius.dtype == torch.float64
    assert not radius.requires_grad


@pytest.mark.parametrize(
    ("logits", "constants", "options", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 3), {}, ValueError, "logits"),
        (torch.zeros(1, 3), torch.zeros(2, 2), {}, ValueError, "constants"),
        (torch.zeros(1, 2), -torch.ones(2, 2), {}, ValueError, "at least 0"),
        (torch.zeros(1, 2), torch.full((2, 2), math.nan), {}, ValueError, "at least 0"),
        (torch.zeros(1, 2), torch.ones(2, 2), {"lipschitz": 0.0}, ValueError, "positive and finite"),
        (torch.zeros(1, 2), torch.ones(2, 2), {"lipschitz": math.inf}, ValueError, "positive and finite"),
        (torch.zeros(1, 2), torch.ones(2, 2), {"lipschitz": math.nan}, ValueError, "positive and finite"),
        (torch.zeros(1, 2), torch.ones(2, 2), {"target": torch.tensor([2])}, ValueError, "labels must lie in 0 ... 1"),
        (torch.zeros(1, 2), torch.ones(2, 2), {"target": torch.tensor([-1])}, ValueError, "from -1"),
        (
            torch.zeros(1, 2),
            torch.ones(2, 2),
            {"target": torch.tensor([0, 1])},
            ValueError,
            "target must have the shape",
        ),
        (torch.zeros(1, 2), torch.ones(2, 2), {"target": torch.tensor([0.0])}, TypeError, "integer class labels"),
    ],
)
def test_wrong_arguments_of_radii_are_refused(logits, constants, options, error, message) -> None:
    with pytest.raises(error, match=message):
        margin_radii(logits, constants, **options)


def test_wrong_weights_are_refused() -> None:
    for bad in (
        torch.zeros(3),
        torch.tensor([[math.nan]]),
        torch.tensor([[math.inf]]),
        torch.ones(2, 2, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="finite matrix"):
            margin_constants(bad)
    with pytest.raises(ValueError, match="norm must be"):
        margin_constants(torch.eye(2), "l3")
    with pytest.raises(
        TypeError, match=r"weight must be float64, 32, 16 or bfloat16, got torch\.float8_e4m3fn.*weight\.float"
    ):
        margin_constants(torch.eye(2).to(torch.float8_e4m3fn))
    for bad in (0, 1.0, True):
        with pytest.raises(ValueError, match="in_features must be an integer"):
            UnitRowLinear(bad, 2)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="out_features must be an integer"):
            UnitRowLinear(2, bad)  # type: ignore[arg-type]
    for name in ("weight", "bias"):
        module = head()
        with torch.no_grad():
            getattr(module, name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN or inf"):
            lipschitz_rule(module, "l2")
