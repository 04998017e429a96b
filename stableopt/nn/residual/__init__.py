r"""Residual blocks :math:`h^+ = h + \tau f(h)` whose step obeys the discrete CFL law of their class (T3)."""

from stableopt.nn.residual import contractions as _contractions  # noqa: F401 it registers
from stableopt.nn.residual.averaged import AveragedResidual
from stableopt.nn.residual.cfl import CFLBlock, cfl
from stableopt.nn.residual.compensated import CompensatedPair
from stableopt.nn.residual.conv_gradient import ConvGradientBlock
from stableopt.nn.residual.dissipative import DissipativeBlock, DissipativeField
from stableopt.nn.residual.fields import Field, FieldBound, GradientField, damped_bound, field_bound
from stableopt.nn.residual.gradient import FoldedBlock, GradientBlock
from stableopt.nn.residual.infinity import InfNormBlock, InfNormField
from stableopt.nn.residual.runge_kutta import RUNGE_KUTTA, RungeKuttaBlock
from stableopt.nn.residual.sll import SLL, FoldedSLL
from stableopt.nn.residual.stack import ResidualStack

__all__ = [
    "AveragedResidual",
    "CFLBlock",
    "cfl",
    "CompensatedPair",
    "ConvGradientBlock",
    "damped_bound",
    "DissipativeBlock",
    "DissipativeField",
    "Field",
    "field_bound",
    "FieldBound",
    "FoldedBlock",
    "FoldedSLL",
    "GradientBlock",
    "GradientField",
    "InfNormBlock",
    "InfNormField",
    "ResidualStack",
    "RUNGE_KUTTA",
    "RungeKuttaBlock",
    "SLL",
]
