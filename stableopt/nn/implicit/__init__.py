r"""Implicit blocks :math:`y = x + hf(y)`, which know no limit of the step (T3): their solvers, derivatives and residuals."""

from stableopt.nn.implicit.backward_euler import BackwardEulerBlock
from stableopt.nn.implicit.equation import Equation
from stableopt.nn.implicit.proximal import ProximalBlock
from stableopt.nn.implicit.resolvent import ResolventBlock
from stableopt.nn.implicit.solvers import Anderson, Fista, ForwardBackward, Solver

__all__ = [
    "Anderson",
    "BackwardEulerBlock",
    "Equation",
    "Fista",
    "ForwardBackward",
    "ProximalBlock",
    "ResolventBlock",
    "Solver",
]
