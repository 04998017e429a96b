"""Numbers with a guarantee: enclosures, operator norms, logarithmic norms, and the estimates used while training.

A *proved* quantity is a :class:`Bound` that counts all rounding of the stored numbers. What is named an estimate proves nothing.
"""

from stableopt.linalg.bound import Bound, Real, lower, round_down, round_up, upper
from stableopt.linalg.conv import conv_norm, conv_symbol_norm
from stableopt.linalg.conv_geometry import padding_multiplicity
from stableopt.linalg.conv_gram import gram_conv_norm
from stableopt.linalg.conv_power import conv_power_start, conv_power_step
from stableopt.linalg.estimate import gram_norm, power_step
from stableopt.linalg.proved import frobenius_norm, inf_norm, log_norm, one_norm, spectral_norm

__all__ = [
    "Bound",
    "Real",
    "conv_norm",
    "conv_power_start",
    "conv_power_step",
    "conv_symbol_norm",
    "frobenius_norm",
    "gram_conv_norm",
    "gram_norm",
    "inf_norm",
    "log_norm",
    "lower",
    "one_norm",
    "padding_multiplicity",
    "power_step",
    "round_down",
    "round_up",
    "spectral_norm",
    "upper",
]
