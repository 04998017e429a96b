"""Torch's optimizers with prox or projection inside the step, a Lyapunov energy, and a guard that enforces its decrease."""

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.family import SGD, AdamW
from stableopt.optim.report import Action, StepReport, Verdict, energy_tolerance, verdict_of
from stableopt.optim.rules import Adaptive, HeavyBall, UpdateRule, rule_for
from stableopt.optim.trial import RandomState, as_loss, evaluate_again

__all__ = [
    "SGD",
    "Action",
    "AdamW",
    "Adaptive",
    "GuardedOptimizer",
    "HeavyBall",
    "RandomState",
    "StepReport",
    "UpdateRule",
    "Verdict",
    "as_loss",
    "energy_tolerance",
    "evaluate_again",
    "rule_for",
    "verdict_of",
]
