"""Torch's optimizers with prox or projection inside the step, a Lyapunov energy, and a guard that enforces its decrease."""

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.edge import EdgeLR
from stableopt.optim.family import SGD, Adam, AdamW, Lion, Muon, NAdam, RAdam, RMSprop
from stableopt.optim.ledger import StabilityLedger
from stableopt.optim.limits import energy_limit, max_lr, sharpness_limit
from stableopt.optim.orthogonalize import POLAR_NORM, orthogonalize
from stableopt.optim.report import Action, StepReport, Verdict, energy_tolerance, verdict_of
from stableopt.optim.rules import (
    Adaptive,
    AdaptiveNesterov,
    HeavyBall,
    Rectified,
    RootMeanSquare,
    SignDescent,
    SpectralDescent,
    UpdateRule,
    rule_for,
)
from stableopt.optim.settings import GuardMode, GuardSettings
from stableopt.optim.sharpness import Sharpness, SharpnessReading
from stableopt.optim.trial import RandomState, as_loss, evaluate_again
from stableopt.optim.wrap import guard

__all__ = [
    "POLAR_NORM",
    "SGD",
    "Action",
    "Adam",
    "AdamW",
    "Adaptive",
    "AdaptiveNesterov",
    "EdgeLR",
    "GuardMode",
    "GuardSettings",
    "GuardedOptimizer",
    "HeavyBall",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "RandomState",
    "Rectified",
    "RootMeanSquare",
    "Sharpness",
    "SharpnessReading",
    "SignDescent",
    "SpectralDescent",
    "StabilityLedger",
    "StepReport",
    "UpdateRule",
    "Verdict",
    "as_loss",
    "energy_limit",
    "energy_tolerance",
    "evaluate_again",
    "guard",
    "max_lr",
    "orthogonalize",
    "rule_for",
    "sharpness_limit",
    "verdict_of",
]
