r"""Blocks made of rotations and of symplectic shears: isometries with damping, and growth within a budget."""

from stableopt.nn.isometric.euler import SkewEulerBlock
from stableopt.nn.isometric.hamiltonian import HamiltonianBlock
from stableopt.nn.isometric.skew import SkewBlock

__all__ = ["HamiltonianBlock", "SkewBlock", "SkewEulerBlock"]
