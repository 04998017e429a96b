"""The energy of a run, watched at each step and recorded without touching the run."""

from __future__ import annotations

from stableopt.lyapunov.budget import Every
from stableopt.lyapunov.events import KINDS, POLICIES, Event
from stableopt.lyapunov.layers import LayerNorms, NormEstimator
from stableopt.lyapunov.monitor import Monitor
from stableopt.lyapunov.record import ACTIONS, VERDICTS, StepRecord
from stableopt.lyapunov.sinks import JSONLSink, Sink, read_records, truncate_records

__all__ = [
    "ACTIONS",
    "KINDS",
    "POLICIES",
    "VERDICTS",
    "Event",
    "Every",
    "JSONLSink",
    "LayerNorms",
    "Monitor",
    "NormEstimator",
    "Sink",
    "StepRecord",
    "read_records",
    "truncate_records",
]
