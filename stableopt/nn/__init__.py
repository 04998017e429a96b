r"""Models whose amplification of perturbations is limited by construction, and the rules that prove it.

:func:`stabilize` gives a model a Lipschitz limit for the whole training, :func:`constrain` keeps a single parameter in a set,
:func:`lipschitz` proves a bound for a model as it is. :class:`GroupSort` and :class:`GradientBlock` are layers that waste none of
it, :class:`MarginCrossEntropy` is the loss that goes with it.
"""

from stableopt.nn.activations import GroupSort, Scale
from stableopt.nn.blocks import FoldedBlock, GradientBlock
from stableopt.nn.constrain import constrain, parameter_groups
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.layers import layers
from stableopt.nn.losses import MarginCrossEntropy
from stableopt.nn.rules import lipschitz
from stableopt.nn.stabilize import NormLimit, layer_limit, stabilize

__all__ = [
    "FoldedBlock",
    "GradientBlock",
    "GroupSort",
    "MarginCrossEntropy",
    "NormLimit",
    "Scale",
    "constrain",
    "layer_limit",
    "layers",
    "lipschitz",
    "lipschitz_rule",
    "parameter_groups",
    "stabilize",
]
