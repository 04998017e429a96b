r"""Residual blocks :math:`h^+ = h + \tau f(h)` whose step obeys the discrete CFL law of their class (T3)."""

from stableopt.nn.residual import contractions as _contractions  # noqa: F401 it registers
from stableopt.nn.residual.averaged import AveragedResidual
from stableopt.nn.residual.compensated import CompensatedPair
from stableopt.nn.residual.gradient import FoldedBlock, GradientBlock
from stableopt.nn.residual.sll import SLL, FoldedSLL
from stableopt.nn.residual.stack import ResidualStack

__all__ = ["SLL", "AveragedResidual", "CompensatedPair", "FoldedBlock", "FoldedSLL", "GradientBlock", "ResidualStack"]
