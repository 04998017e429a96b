"""Translated and scaled sets."""

from __future__ import annotations

import pytest
import torch

from stableopt.constraints import L1, AffineImage, Box, L1Ball, L2Ball, NonNegative, Simplex, SpectralBall, from_spec
from stableopt.errors import InfeasibleError
from tests.constraints.catalogue import DTYPES


def test_the_projection_is_that_of_the_set_seen_from_its_center() -> None:
    x = 3.0 * torch.randn(50, 4)
    moved = AffineImage(L2Ball(1.5, dims=1), scale=-2.0, offset=0.7)
    away = x - 0.7
    expected = 0.7 + away * (3.0 / away.norm(dim=1, keepdim=True)).clamp_max(1.0)
    torch.testing.assert_close(moved.project(x), expected, rtol=1e-14, atol=1e-14)


def test_a_moved_interval_is_an_interval() -> None:
    x = torch.linspace(-5, 5, 41)
    assert torch.equal(AffineImage(Box(-1.0, 2.0), 2.0, 0.5).project(x), Box(-1.5, 4.5).project(x))
    assert torch.equal(AffineImage(NonNegative(), -1.0, 0.5).project(x), Box(-float("inf"), 0.5).project(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_center_between_two_numbers_of_the_dtype_still_gives_members(dtype: torch.dtype) -> None:
    moved = AffineImage(L2Ball(0.37), offset=1000.0 / 3.0)
    x = (340 * torch.randn(200)).to(dtype)
    if dtype in {torch.bfloat16, torch.float16}:  # neighbors are 2 or 1/4 apart: no, or hardly a, number within 0.37
        moved = AffineImage(L2Ball(370.0), offset=1000.0 / 3.0)
    p = moved.project(x)
    assert moved.violation(p) == 0.0 < moved.violation(x)
    assert moved.project(p) is p
    distance = float((p.double() - 1000.0 / 3.0).norm())
    assert distance >= (0.36 if moved.constraint == L2Ball(0.37) else 340.0)


def test_a_matrix_near_a_pretrained_one() -> None:
    start = torch.randn(4, 3)
    near = AffineImage(SpectralBall(0.1), offset=tuple(start.flatten().tolist()))
    p = near.project(start + torch.randn(4, 3))
    assert float(torch.linalg.matrix_norm(p - start, 2)) == pytest.approx(0.1, rel=1e-12)
    assert near.violation(p) == 0.0 == near.violation(start)


def test_the_metric_goes_through() -> None:
    x, metric = torch.randn(6), torch.rand(6) + 0.5
    moved = AffineImage(L2Ball(0.8), 1.0, 0.3).prox(x, 1.0, metric)
    torch.testing.assert_close(moved, 0.3 + L2Ball(0.8).prox(x - 0.3, 1.0, metric), rtol=1e-14, atol=1e-14)


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(InfeasibleError, match="no number of dtype"):
        AffineImage(Simplex(1.0, dims=1), offset=0.1).project(torch.randn(200, 7))
    with pytest.raises(ValueError, match="one offset or as many"):
        AffineImage(L2Ball(1.0), offset=(1.0, 2.0)).project(torch.zeros(3))
    with pytest.raises(TypeError, match="needs a set"):
        AffineImage(L1(1.0))  # pyright: ignore[reportArgumentType]
    for scale in (0.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            AffineImage(L2Ball(1.0), scale)


def test_the_spec_keeps_set_and_numbers() -> None:
    moved = AffineImage(L1Ball(1.0, dims=1), -0.5, (1.0, 2.0))
    assert from_spec(moved.spec()) == moved
