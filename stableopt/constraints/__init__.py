"""Penalties and sets with a proximal operator, a projection, and feasibility of the numbers that are stored."""

from stableopt.constraints.attached import attach, attached
from stableopt.constraints.base import Constraint, Parametrization, Regularizer, from_spec
from stableopt.constraints.manifolds import Orthogonal
from stableopt.constraints.penalties import L1, L2Squared
from stableopt.constraints.rounding import round_down_to, round_up_to, toward_zero
from stableopt.constraints.sets import Box, L2Ball, LinfBall, NonNegative
from stableopt.constraints.spectral import SpectralBall

__all__ = [
    "Regularizer",
    "Constraint",
    "Parametrization",
    "from_spec",
    "L1",
    "L2Squared",
    "Box",
    "NonNegative",
    "LinfBall",
    "L2Ball",
    "SpectralBall",
    "Orthogonal",
    "attach",
    "attached",
    "round_down_to",
    "round_up_to",
    "toward_zero",
]
