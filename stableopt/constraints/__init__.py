"""Penalties and sets with a proximal operator, a projection, and feasibility of the numbers that are stored."""

from stableopt.constraints.attached import attach, attached
from stableopt.constraints.balls import L2Ball, Sphere
from stableopt.constraints.base import Constraint, Parametrization, Regularizer, from_spec
from stableopt.constraints.birkhoff import DoublyStochastic
from stableopt.constraints.combine import Product, Scaled, SeparableSum, Translated, Weighted, WithRidge
from stableopt.constraints.cones import HalfSpace, Hyperplane, SecondOrderCone
from stableopt.constraints.elementwise import ElasticNet, Entropy, Hinge, Huber, LogBarrier
from stableopt.constraints.group_trees import GroupLasso, SparseGroup, TreeGroups
from stableopt.constraints.groups import L2
from stableopt.constraints.intersection import DykstraResult, Intersection, dykstra
from stableopt.constraints.isotonic import Monotone
from stableopt.constraints.l1 import InfNormBall, L1Ball, LinfNorm, OneNormBall
from stableopt.constraints.lowrank import AlmostOrthogonal, Rank
from stableopt.constraints.manifolds import Orthogonal, Stiefel
from stableopt.constraints.moved import AffineImage
from stableopt.constraints.nonconvex import L0, MCP, SCAD, Lq
from stableopt.constraints.ordered import SLOPE, KSupport
from stableopt.constraints.penalties import L1, L2Squared, WeightedL1
from stableopt.constraints.reuse import forget, project_tracked
from stableopt.constraints.rounding import round_down_to, round_up_to, toward_zero
from stableopt.constraints.sets import Box, LinfBall, NonNegative
from stableopt.constraints.simplex import CappedSimplex, Max, Simplex, SumLargest
from stableopt.constraints.sparsity import Sparsity
from stableopt.constraints.spectra import NuclearBall, NuclearNorm, SpectralNorm
from stableopt.constraints.spectral import SpectralBall
from stableopt.constraints.symmetric import PSD, Hurwitz
from stableopt.constraints.tv import TV1D, FusedLasso

__all__ = [
    "Regularizer",
    "Constraint",
    "Parametrization",
    "from_spec",
    # penalties, entry by entry
    "L1",
    "WeightedL1",
    "L2Squared",
    "ElasticNet",
    "Huber",
    "Hinge",
    "LogBarrier",
    "Entropy",
    "L0",
    "Lq",
    "MCP",
    "SCAD",
    # penalties of vectors
    "L2",
    "GroupLasso",
    "SparseGroup",
    "TreeGroups",
    "LinfNorm",
    "Max",
    "SumLargest",
    "SLOPE",
    "KSupport",
    "TV1D",
    "FusedLasso",
    # penalties of matrices
    "NuclearNorm",
    "SpectralNorm",
    # sets of vectors
    "Box",
    "NonNegative",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "Sphere",
    "Simplex",
    "CappedSimplex",
    "HalfSpace",
    "Hyperplane",
    "SecondOrderCone",
    "Monotone",
    "Sparsity",
    # sets of matrices
    "SpectralBall",
    "NuclearBall",
    "InfNormBall",
    "OneNormBall",
    "Rank",
    "PSD",
    "Hurwitz",
    "Orthogonal",
    "Stiefel",
    "AlmostOrthogonal",
    "DoublyStochastic",
    # combinations
    "AffineImage",
    "Product",
    "Intersection",
    "DykstraResult",
    "dykstra",
    "SeparableSum",
    "Translated",
    "Scaled",
    "Weighted",
    "WithRidge",
    # the rest
    "forget",
    "project_tracked",
    "attach",
    "attached",
    "round_down_to",
    "round_up_to",
    "toward_zero",
]
