"""What is known about update maps: the map itself, the limits of its stability, and the energy that it dissipates."""

from stableopt.optim.rules.adaptive import Adaptive
from stableopt.optim.rules.base import UpdateRule, step_sums, weighted_square
from stableopt.optim.rules.heavy_ball import HeavyBall
from stableopt.optim.rules.lookup import rule_for
from stableopt.optim.rules.nadam import AdaptiveNesterov
from stableopt.optim.rules.normalized import SignDescent, SpectralDescent
from stableopt.optim.rules.radam import Rectified
from stableopt.optim.rules.rmsprop import RootMeanSquare

__all__ = [
    "Adaptive",
    "AdaptiveNesterov",
    "HeavyBall",
    "Rectified",
    "RootMeanSquare",
    "SignDescent",
    "SpectralDescent",
    "UpdateRule",
    "rule_for",
    "step_sums",
    "weighted_square",
]
