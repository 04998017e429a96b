"""Alarms whose rate of false ones is stated together with the assumption under which it holds."""

from stableopt.lyapunov.alarms.alarms import Alarms
from stableopt.lyapunov.alarms.detector import EDetector
from stableopt.lyapunov.alarms.losses import Level, Relapse, Sublevel
from stableopt.lyapunov.alarms.sample import Alarm, Channel, Sample
from stableopt.lyapunov.alarms.steps import Increase, Leap, NonFinite

__all__ = [
    "Alarm",
    "Alarms",
    "Channel",
    "EDetector",
    "Increase",
    "Leap",
    "Level",
    "NonFinite",
    "Relapse",
    "Sample",
    "Sublevel",
]
