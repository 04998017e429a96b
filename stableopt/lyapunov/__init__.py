"""The energy of a run, watched at each step and recorded without touching the run, and the profile of its sensitivities.

:mod:`stableopt.lyapunov.profile` has the parts of the Learning Stability Profile.
"""

from __future__ import annotations

from stableopt.lyapunov.alarms import (
    Alarm,
    Alarms,
    Channel,
    EDetector,
    Increase,
    Leap,
    Level,
    NonFinite,
    Relapse,
    Sample,
    Sublevel,
)
from stableopt.lyapunov.budget import Every
from stableopt.lyapunov.curvature import CurvatureProbe, CurvatureReading
from stableopt.lyapunov.diagnosis import Diagnosis
from stableopt.lyapunov.doctor import diagnose
from stableopt.lyapunov.events import KINDS, POLICIES, Event
from stableopt.lyapunov.layers import (
    LayerNorms,
    LayerProbe,
    LayerReading,
    NormEstimator,
    StepLaw,
    is_residual,
    kink_distance,
    step_law,
)
from stableopt.lyapunov.monitor import Monitor
from stableopt.lyapunov.policies import Checkpoints, Policy
from stableopt.lyapunov.profile import Profile, ProfileReading, Twin
from stableopt.lyapunov.record import ACTIONS, VERDICTS, StepRecord
from stableopt.lyapunov.sinks import (
    CSVSink,
    JSONLSink,
    MemorySink,
    Sink,
    TensorBoardSink,
    WandbSink,
    iter_records,
    read_records,
    scalars,
    truncate_records,
    verify_chain,
)

__all__ = [
    "ACTIONS",
    "KINDS",
    "POLICIES",
    "VERDICTS",
    "Alarm",
    "Alarms",
    "CSVSink",
    "Channel",
    "Checkpoints",
    "CurvatureProbe",
    "CurvatureReading",
    "Diagnosis",
    "EDetector",
    "Event",
    "Every",
    "Increase",
    "JSONLSink",
    "LayerNorms",
    "LayerProbe",
    "LayerReading",
    "Leap",
    "Level",
    "MemorySink",
    "Monitor",
    "NonFinite",
    "NormEstimator",
    "Policy",
    "Profile",
    "ProfileReading",
    "Relapse",
    "Sample",
    "Sink",
    "StepLaw",
    "StepRecord",
    "Sublevel",
    "TensorBoardSink",
    "Twin",
    "WandbSink",
    "diagnose",
    "is_residual",
    "iter_records",
    "kink_distance",
    "read_records",
    "scalars",
    "step_law",
    "truncate_records",
    "verify_chain",
]
