"""What is known about each layer of a model in training: norms against limits, steps of blocks, growth along the data, kinks."""

from __future__ import annotations

from stableopt.lyapunov.layers.branch import is_residual
from stableopt.lyapunov.layers.cfl import StepLaw, step_law
from stableopt.lyapunov.layers.kinks import kink_distance
from stableopt.lyapunov.layers.norms import LayerNorms, NormEstimator
from stableopt.lyapunov.layers.probe import LayerProbe, LayerReading

__all__ = [
    "LayerNorms",
    "LayerProbe",
    "LayerReading",
    "NormEstimator",
    "StepLaw",
    "is_residual",
    "kink_distance",
    "step_law",
]
