r"""Residual blocks :math:`h^+ = h + \tau f(h)` whose step obeys the discrete CFL law of their class (T3)."""

from stableopt.nn.residual.averaged import AveragedResidual
from stableopt.nn.residual.gradient import FoldedBlock, GradientBlock
from stableopt.nn.residual.sll import SLL, FoldedSLL

__all__ = ["SLL", "AveragedResidual", "FoldedBlock", "FoldedSLL", "GradientBlock"]
