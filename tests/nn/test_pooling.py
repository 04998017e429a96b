"""Laws of the poolings over disjoint windows and of the downsampling without loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz_rule
from stableopt.nn.pooling import InvertibleDownsampling, L2NormPool, ScaledAvgPool, root_down
from tests.nn import module_laws as laws
from tests.nn.catalogue import jacobian
from tests.nn.module_laws import NORMS

ROWS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("scaled 1d", lambda: ScaledAvgPool(3, dims=1), (2, 6)),
    ("scaled 2d", lambda: ScaledAvgPool(2), (2, 4, 6)),
    ("scaled 2d oblong", lambda: ScaledAvgPool((1, 3)), (1, 2, 7)),
    ("scaled 3d", lambda: ScaledAvgPool(2, dims=3), (1, 2, 4, 2)),
    ("l2 1d", lambda: L2NormPool(3, dims=1), (2, 7)),
    ("l2 2d", lambda: L2NormPool((2, 3)), (2, 5, 6)),
    ("l2 3d", lambda: L2NormPool(2, dims=3), (1, 2, 2, 4)),
    ("down 1d", lambda: InvertibleDownsampling(3, dims=1), (2, 6)),
    ("down 2d", lambda: InvertibleDownsampling(2), (2, 4, 6)),
    ("down 2d oblong", lambda: InvertibleDownsampling((3, 1)), (2, 3, 2)),
    ("down 3d", lambda: InvertibleDownsampling((1, 2, 2), dims=3), (1, 3, 2, 4)),
]
GLOBAL: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("scaled global", lambda: ScaledAvgPool(None), (2, 3, 4)),
    ("l2 global", lambda: L2NormPool(None, dims=1), (2, 5)),
]


def cases(rows: list = ROWS) -> list[object]:
    return [pytest.param(make, shape, id=name) for name, make, shape in rows]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("make", "shape"), cases())
def test_the_constant_holds_and_is_attained(make: Callable[[], nn.Module], shape: tuple, norm: str) -> None:
    module = make()
    laws.check_pairs(module, shape, norm)
    laws.check_jacobians(module, shape, norm)
    assert laws.attained(module, torch.ones(1, *shape), norm) == pytest.approx(1.0, rel=1e-13) or (
        isinstance(module, L2NormPool) and norm == "l1"
    )
    if isinstance(module, L2NormPool):  # in l1 at a window with one entry
        x = torch.zeros(1, *shape)
        x.view(-1)[0] = 1.0
        assert laws.attained(module, x, "l1") == pytest.approx(1.0, rel=1e-13)


@pytest.mark.parametrize(("make", "shape"), cases(ROWS + GLOBAL))
def test_copies_devices_and_gradients(make: Callable[[], nn.Module], shape: tuple) -> None:
    laws.check_copies(make(), shape)
    laws.check_devices_and_dtypes(make(), shape)
    laws.check_gradients(make(), shape)


@pytest.mark.parametrize(("make", "shape"), cases(GLOBAL))
def test_a_window_over_the_whole_image_has_the_constant_that_needs_no_size(make: Callable, shape: tuple) -> None:
    module = make()
    for norm in ("l2", "l1"):
        laws.check_pairs(module, shape, norm)
        laws.check_jacobians(module, shape, norm)
    assert laws.attained(module, torch.ones(1, *shape), "l2") == pytest.approx(1.0, rel=1e-13)
    with pytest.raises(UncertifiableError, match="number of pixels, which the module does not know"):
        lipschitz_rule(module, "linf")
    for pixels in (4, 100):  # the growth that the message states
        x = torch.ones(1, 1, *([1] * (module.dims - 1)), pixels)
        assert laws.matrix_norm(jacobian(module, x), "linf") == pytest.approx(math.sqrt(pixels))


@given(k=st.integers(1, 5), m=st.integers(1, 5), seed=st.integers(0, 20))
def test_scaled_and_plain_averages_differ_by_the_root_of_the_window(k: int, m: int, seed: int) -> None:
    x = torch.randn(2, 3, 2 * k + 1, 3 * m, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ScaledAvgPool((k, m))(x), F.avg_pool2d(x, (k, m)) * math.sqrt(k * m))
    torch.testing.assert_close(L2NormPool((k, m))(x), F.lp_pool2d(x, 2.0, (k, m)))
    assert lipschitz_rule(ScaledAvgPool((k, m)), "l2").upper <= 1.0
    assert lipschitz_rule(ScaledAvgPool((k, m)), "l2").lower >= 1.0 - 2.0**-50
    assert lipschitz_rule(ScaledAvgPool((k, m)), "l1").upper == pytest.approx(1 / math.sqrt(k * m), rel=1e-14)
    assert lipschitz_rule(ScaledAvgPool((k, m)), "linf").upper == pytest.approx(math.sqrt(k * m), rel=1e-14)


def test_a_window_of_one_scale_more_is_past_the_limit() -> None:
    """Two sides: the scaled average keeps the norm of a constant image; a factor k in place of its root would not."""
    x = torch.ones(1, 1, 4, 4)
    assert float(ScaledAvgPool(2)(x).norm()) == float(x.norm())
    assert float((4 * F.avg_pool2d(x, 2)).norm()) == 2 * float(x.norm())


def test_the_factor_is_never_above_the_root() -> None:
    for k in [*range(1, 400), 10**9 + 7, 2**52 - 1]:
        root = Fraction(root_down(k))
        assert root * root <= k
        assert root * root >= k * (1 - Fraction(1, 2**50))


def test_the_l2_pool_keeps_the_norm_and_has_a_finite_gradient_at_zero() -> None:
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(L2NormPool(2)(x).norm(), x.norm())
    torch.testing.assert_close(L2NormPool(None)(x), x.flatten(2).norm(dim=2))
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    L2NormPool(2)(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.tolist() == torch.zeros(1, 1, 2, 2).tolist()
    half = torch.full((1, 1, 2, 2), 2e4, dtype=torch.float16)  # its square overflows in float16
    assert float(L2NormPool(2)(half)) == 4e4


def test_what_is_left_over_at_the_end_is_dropped_as_torch_does() -> None:
    x = torch.randn(1, 1, 5, 7)
    torch.testing.assert_close(ScaledAvgPool(2)(x), 2 * F.avg_pool2d(x, 2))
    assert ScaledAvgPool(2)(x).shape == (1, 1, 2, 3)


def test_inputs_without_batch_dimension_work() -> None:
    x = torch.randn(3, 4, 6)
    for module in (ScaledAvgPool(2), L2NormPool(2), InvertibleDownsampling(2)):
        torch.testing.assert_close(module(x), module(x[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_downsampling_is_the_pixel_unshuffle_of_torch(k: int) -> None:
    x = torch.randn(2, 3, 2 * k, 3 * k)
    down = InvertibleDownsampling(k)
    torch.testing.assert_close(down(x), F.pixel_unshuffle(x, k), rtol=0, atol=0)
    torch.testing.assert_close(down.inverse(down(x)), x, rtol=0, atol=0)
    torch.testing.assert_close(down.inverse(down(x)), F.pixel_shuffle(down(x), k), rtol=0, atol=0)


@given(
    block=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    dims=st.integers(1, 3),
    lead=st.sampled_from([(), (2,), (2, 3)]),
)
def test_downsampling_is_inverted_bit_for_bit(block: tuple, dims: int, lead: tuple) -> None:
    sizes = block[:dims]
    x = torch.randn(*lead, 2, *(2 * k for k in sizes))
    down = InvertibleDownsampling(sizes, dims)
    y = down(x)
    assert y.shape == (*lead, 2 * math.prod(sizes), *([2] * dims))
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    assert torch.equal(down.inverse(y), x)
    first = (*[0] * len(lead), slice(None), *[0] * dims)  # one output pixel holds one block of the input
    corner = x[(*[0] * len(lead), slice(None), *(slice(0, k) for k in sizes))]
    assert torch.equal(y[first], corner.flatten())


@pytest.mark.parametrize("kind", [ScaledAvgPool, L2NormPool, InvertibleDownsampling])
def test_wrong_arguments_and_images_are_refused(kind: type) -> None:
    for bad in (0, -1, 2.0, True, (2,), (2, 2, 2), (2, 0), "2"):
        with pytest.raises(ValueError, match="integer sizes >= 1"):
            kind(bad)
    for dims in (0, 4, True, 2.5):
        with pytest.raises(ValueError, match="dims must be 1, 2 or 3"):
            kind(2, dims=dims)
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        kind(2)(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"at least|divisible"):
        kind(3)(torch.zeros(1, 1, 2, 6))


def test_downsampling_refuses_what_it_cannot_invert() -> None:
    with pytest.raises(ValueError, match="divisible by it"):
        InvertibleDownsampling(2)(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="channels divisible by 4, got 6"):
        InvertibleDownsampling(2).inverse(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="got None"):
        InvertibleDownsampling(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("exponent", [-320, -200, -30, 30, 200, 300])
def test_the_l2_pool_neither_over_nor_underflows(exponent: int) -> None:
    x = torch.tensor([[3.0, 4.0, 0.0, -2.0]]) * 10.0**exponent
    torch.testing.assert_close(L2NormPool(2, dims=1)(x), torch.tensor([[5.0, 2.0]]) * 10.0**exponent, rtol=1e-4, atol=0)
    single = torch.full((1, 1, 2, 2), 1e30, dtype=torch.float32)
    assert L2NormPool(2)(single).item() == pytest.approx(2e30)
    assert L2NormPool(2, dims=1)(torch.zeros(0, 1, 4)).shape == (0, 1, 2)
    assert L2NormPool(2, dims=1)(torch.tensor([[math.nan, 1.0, math.inf, 1.0]])).isfinite().tolist() == [[False, False]]
