r"""State-space layers with a gain that is limited by construction, and a guard for the eigenvalues of others."""

from stableopt.nn.statespace.capped import CappedLinear
from stableopt.nn.statespace.diagonal import DiagonalStateSpace
from stableopt.nn.statespace.eigenvalues import discretize, stable_eigenvalues
from stableopt.nn.statespace.gain import LinearSystem
from stableopt.nn.statespace.peak import peak_gain
from stableopt.nn.statespace.stack import StateSpaceBlock, StateSpaceStack

__all__ = [
    "CappedLinear",
    "DiagonalStateSpace",
    "LinearSystem",
    "StateSpaceBlock",
    "StateSpaceStack",
    "discretize",
    "peak_gain",
    "stable_eigenvalues",
]
