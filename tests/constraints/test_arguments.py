"""What a user may pass to a constructor, and the sentence that refuses the rest."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from stableopt.constraints import L1, Box, L2Ball, L2Squared, LinfBall, Orthogonal, Regularizer, SpectralBall
from stableopt.constraints.arguments import check_matrix, check_number, check_step

ONE_NUMBER = [L1, L2Squared, LinfBall, L2Ball, SpectralBall]


@pytest.mark.parametrize("cls", ONE_NUMBER)
@pytest.mark.parametrize("value", [-1.0, -5e-324, math.nan, math.inf, -math.inf])
def test_a_number_out_of_range_is_refused(cls: type[Regularizer], value: float) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} needs a finite number"):
        cls(value)


@pytest.mark.parametrize("cls", [*ONE_NUMBER, lambda v: Box(v, 1.0), lambda v: Box(0.0, v)])
@pytest.mark.parametrize("value", [True, False, "1", None, 1j, [1.0], torch.tensor(1.0)])
def test_what_is_not_a_real_number_is_refused(cls: type[Regularizer], value: object) -> None:
    with pytest.raises(TypeError, match="real number"):
        cls(value)  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", ONE_NUMBER)
def test_every_real_number_becomes_a_plain_float(cls: type[Regularizer]) -> None:
    for value in (1, np.float64(1.0), np.float32(1.0), np.int64(1), Fraction(1)):
        made = cls(value)  # type: ignore[call-arg]
        assert made == cls(1.0)
        assert type(next(v for k, v in made.spec().items() if k != "name")) is float


@pytest.mark.parametrize("cls", ONE_NUMBER)
def test_zero_is_allowed_where_it_makes_sense(cls: type[Regularizer]) -> None:
    if cls is SpectralBall:
        with pytest.raises(ValueError, match="> 0"):
            cls(0.0)  # type: ignore[call-arg]
    else:
        assert cls(0.0) == cls(0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "bounds",
    [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf), (-math.inf, -math.inf), (0.1, 0.1 - 2e-17)],
)
def test_an_empty_box_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Box needs"):
        Box(*bounds)


def test_an_unknown_map_of_the_orthogonal_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="expm, cayley"):
        Orthogonal("svd")


def test_messages_name_the_owner_the_argument_and_the_value() -> None:
    with pytest.raises(ValueError, match=r"^L1 needs a finite number >= 0 as weight, got -2\.0\.$"):
        check_number("L1", "weight", -2, low=0.0)
    with pytest.raises(ValueError, match=r"SpectralBall .* shape \(3,\)\. Do this\."):
        check_matrix("SpectralBall", torch.ones(3), "Do this.")
    with pytest.raises(TypeError, match="floating tensor as step"):
        check_step("L1", torch.tensor(True), torch.ones(2), diagonal=True)


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4), (2, 3, 3, 3)])
@pytest.mark.parametrize("c", [SpectralBall(1.0), Orthogonal()], ids=repr)
def test_only_matrices_have_a_spectral_norm(c: SpectralBall | Orthogonal, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    for call in (c.project, c.violation, c.map, c.value, c.prox, c.parametrization):
        with pytest.raises(ValueError, match="two dimensions"):
            call(x)
