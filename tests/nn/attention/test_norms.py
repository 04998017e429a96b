"""A normalization that only shrinks has the constant 1, attained at 0; those of torch have their true constants for tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import BoundedNorm, LayerCentering, lipschitz, uniform_bound
from tests.nn.attention.oracles import token_norm
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.module_laws import check_copies, check_devices_and_dtypes, check_gradients, check_jacobians, check_pairs

EPS = torch.finfo(torch.float64).eps


def drawn(dim: int, radius: float = 1.0, scale: float = 1.0) -> BoundedNorm:
    layer = BoundedNorm(dim, radius)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(dim))  # type: ignore[union-attr]
    return layer


@settings(max_examples=15)
@given(
    dim=st.integers(1, 7), radius=st.sampled_from([0.1, 1.0, 5.0]), scale=st.sampled_from([1e-3, 0.5, 3.0, 1e300]),
    size=st.sampled_from([0.0, 0.1, 1.0, 30.0]), seed=st.integers(0, 50),
)  # fmt: skip
def test_its_jacobian_has_the_eigenvalues_of_the_docstring(
    dim: int, radius: float, scale: float, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = BoundedNorm(dim, radius, affine=False), size * torch.randn(1, dim)
    s = math.sqrt(1 + float(x.square().sum()) / (dim * radius**2))
    J = jacobian(layer, x)
    torch.testing.assert_close(J, J.T)
    expected = torch.tensor(sorted([1 / s**3, *[1 / s] * (dim - 1)]))
    torch.testing.assert_close(torch.linalg.eigvalsh(J), expected)
    scaled = drawn(dim, radius, scale)
    for norm in ("l2", "linf", "l1"):
        bound, uniform = lipschitz(scaled, norm).upper, uniform_bound(scaled, norm)
        assert operator_norm(jacobian(scaled, x), norm) <= bound * (1 + 64 * EPS)
        assert uniform is not None
        assert bound <= uniform.upper
    assert lipschitz(scaled).upper <= 1.0
    assert uniform_bound(scaled).upper == 1.0  # type: ignore[union-attr]


def test_the_constant_is_the_largest_gain_and_attained_at_zero() -> None:
    layer = BoundedNorm(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -0.75, 0.1]))  # type: ignore[union-attr]
    assert lipschitz(layer) == lipschitz(layer, "token_max")
    assert (lipschitz(layer).lower, lipschitz(layer).upper) == (0.75, 0.75)
    assert operator_norm(jacobian(layer, torch.zeros(1, 3)), "l2") == pytest.approx(0.75)
    with torch.no_grad():
        layer.weight.mul_(4.0)  # type: ignore[union-attr]
    assert layer.gain().tolist() == pytest.approx([2 / 3, -1.0, 0.4 / 3])  # type: ignore[union-attr]
    assert operator_norm(jacobian(layer, torch.zeros(1, 3)), "l2") == pytest.approx(1.0)


def test_it_is_an_rms_norm_with_an_eps_of_one() -> None:
    x = 3 * torch.randn(4, 6)
    twin = nn.RMSNorm(6, eps=2.5**2)
    torch.testing.assert_close(BoundedNorm(6, 2.5)(x), 2.5 * twin(x))
    for norm in ("l2", "linf", "l1"):
        assert lipschitz(BoundedNorm(6, 2.5), norm).upper == pytest.approx(2.5 * lipschitz(twin, norm).upper)
    assert bool((BoundedNorm(6, 2.5)(1e3 * x).square().mean(-1).sqrt() < 2.5).all())


def test_the_factor_of_center_norm_breaks_the_constant() -> None:
    """C11c: x - mean has the constant 1; the factor D/(D-1) of LipsFormer makes it D/(D-1)."""
    J = jacobian(LayerCentering(4), torch.randn(1, 4))
    assert operator_norm(J, "l2") == pytest.approx(1.0)
    assert operator_norm(4 / 3 * J, "l2") == pytest.approx(4 / 3)
    assert lipschitz(LayerCentering(4), "token_max").upper == 1.0
    assert uniform_bound(LayerCentering(4), "token_max").upper == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make", [BoundedNorm, LayerCentering, lambda d: nn.LayerNorm(d, eps=0.1), lambda d: nn.RMSNorm(d, eps=0.1)]
)
def test_for_tokens_the_constant_is_that_of_one_token(make: type[nn.Module]) -> None:
    layer = make(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    bound = lipschitz(layer, "token_max").upper
    assert bound == lipschitz(layer, "l2").upper
    for size in (0.0, 0.1, 1.0):
        assert token_norm(layer, size * torch.randn(1, 3, 4)) <= bound * (1 + 64 * EPS)


@pytest.mark.parametrize("layer", [nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3)), LayerCentering((2, 3))])
def test_statistics_of_several_tokens_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UncertifiableError, match=r"(several|over) tokens, for which no token_max bound is known"):
        lipschitz(layer, "token_max")


def test_layer_norm_has_the_constant_316_for_tokens() -> None:
    assert lipschitz(nn.LayerNorm(8), "token_max").upper == pytest.approx(1e5**0.5)


def test_the_laws_of_every_module() -> None:
    for layer in (drawn(5, 2.0), BoundedNorm(5, affine=False)):
        for norm in ("l2", "linf", "l1"):
            check_jacobians(layer, (5,), norm)
            check_pairs(layer, (5,), norm)
    check_copies(drawn(4, 2.0), (3, 4))
    check_devices_and_dtypes(drawn(5, 2.0), (5,))
    check_gradients(drawn(5, 2.0, 0.3), (5,))


def test_huge_tokens_keep_the_size_of_the_radius() -> None:
    for dtype, size in ((torch.float32, 1e38), (torch.float64, 1e300), (torch.float16, 6e4)):
        layer = BoundedNorm(4, 2.0).to(dtype)
        y = layer(torch.full((1, 4), size, dtype=dtype))
        torch.testing.assert_close(y, torch.full_like(y, 2.0))
        assert bool(layer(torch.full((1, 4), -size, dtype=dtype)).isfinite().all())


def test_bad_input_is_refused() -> None:
    for arguments, message in (
        ((0,), "dim must be"),
        ((2, 0.0), "radius must lie between"),
        ((2, math.inf), "radius must lie between"),
    ):
        with pytest.raises(ValueError, match=message):
            BoundedNorm(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"BoundedNorm\(3\) got an input of shape \(2, 4\)"):
        BoundedNorm(3)(torch.randn(2, 4))
    layer = BoundedNorm(3)
    nn.init.constant_(layer.weight, math.inf)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinite"):
        lipschitz(layer)


def test_second_derivatives_are_finite_at_a_token_of_zeros() -> None:
    x = torch.zeros(1, 3, 4, requires_grad=True)
    (first,) = torch.autograd.grad((BoundedNorm(4)(x) * torch.randn(1, 3, 4)).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()
    assert torch.autograd.gradgradcheck(BoundedNorm(4), (torch.zeros(1, 4, requires_grad=True),))
