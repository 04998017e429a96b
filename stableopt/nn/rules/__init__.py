r"""The Lipschitz rules of torch's layers and of ours, and the bound of a whole model.

Each rule bounds the smallest :math:`L` with :math:`\|f(x) - f(y)\| \le L\|x - y\|` for all inputs, for the stored numbers and in
real arithmetic. A module that has no rule is refused, and so is an option of a layer that a rule does not cover.
"""

from stableopt.nn.rules import affine, normalization, pooling, refusals, spatial  # noqa: F401 importing them registers rules
from stableopt.nn.rules.activations import GELU_SLOPE, GELU_TANH_SLOPE, SILU_SLOPE
from stableopt.nn.rules.model import lipschitz, rule_bound

__all__ = ["GELU_SLOPE", "GELU_TANH_SLOPE", "SILU_SLOPE", "lipschitz", "rule_bound"]
