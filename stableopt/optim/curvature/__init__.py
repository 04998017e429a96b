"""Products with the Hessian of a loss, without leaving a trace.

``base``: what they all share: the context, the evaluation of the loss, the real inner product.
``reverse``: autograd twice, from a loss or from a graph that somebody has built (:class:`Exact`, :class:`Graph`).
``forward``: tangents through one evaluation and its gradient (:class:`Forward`).
``difference``: two gradients (:class:`Difference`).
``choice``: which of them a loss allows (:class:`Choice`).
"""

from __future__ import annotations

from stableopt.optim.curvature.base import (
    Curvature,
    acceptable_asymmetry,
    asymmetry,
    asymmetry_of_rounding,
    dot,
    gradients,
    no_second_derivative,
)
from stableopt.optim.curvature.choice import METHODS, Choice, Method
from stableopt.optim.curvature.difference import Difference
from stableopt.optim.curvature.forward import Forward
from stableopt.optim.curvature.reverse import Exact, Graph

__all__ = [
    "METHODS",
    "Choice",
    "Curvature",
    "Difference",
    "Exact",
    "Forward",
    "Graph",
    "Method",
    "acceptable_asymmetry",
    "asymmetry",
    "asymmetry_of_rounding",
    "dot",
    "gradients",
    "no_second_derivative",
]
