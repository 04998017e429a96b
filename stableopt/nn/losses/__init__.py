r"""Losses that ask for a margin, because a certified radius is a margin divided by a Lipschitz constant.

:class:`MarginCrossEntropy`, :class:`KRLoss` and :class:`HKRLoss` see the logits only and go with a model that has a fixed limit.
:class:`GloRoLoss`, :class:`CertifiedMarginLoss` and :class:`CertificateRegularizer` also see the proved constants of the present
weights (:class:`MarginBounds`), so they fit any model that has a constant.
"""

from stableopt.nn.losses.bounds import MarginBounds
from stableopt.nn.losses.certified import CertificateRegularizer, CertifiedMarginLoss, GloRoLoss
from stableopt.nn.losses.kantorovich import HKRLoss, KRLoss
from stableopt.nn.losses.margin import MarginCrossEntropy

__all__ = [
    "CertificateRegularizer",
    "CertifiedMarginLoss",
    "GloRoLoss",
    "HKRLoss",
    "KRLoss",
    "MarginBounds",
    "MarginCrossEntropy",
]
