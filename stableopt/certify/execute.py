r"""Run the operations of a program in torch, in the dtype and on the device of the tensors given."""

# ruff: noqa: F401 importing the modules registers their operations

from __future__ import annotations

import stableopt.certify.execute_activations
import stableopt.certify.execute_blocks
import stableopt.certify.execute_fold
import stableopt.certify.execute_gates
import stableopt.certify.execute_layout
import stableopt.certify.execute_sequences
import stableopt.certify.execute_weighted
import stableopt.certify.execute_windows
from stableopt.certify.operations import Operation, apply, is_composite, lower, lowering, operation, run

__all__ = ["Operation", "apply", "is_composite", "lower", "lowering", "operation", "run"]
