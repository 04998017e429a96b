"""What is done about alarms: warn, raise, skip a step, shrink the learning rates, go back to a snapshot."""

from __future__ import annotations

from stableopt.lyapunov.policies.enforcer import Enforcer
from stableopt.lyapunov.policies.policy import Policy
from stableopt.lyapunov.policies.rollback import Checkpoints, Restoration

__all__ = ["Checkpoints", "Enforcer", "Policy", "Restoration"]
