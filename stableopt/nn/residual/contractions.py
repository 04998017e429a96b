r"""What the blocks of this package contract by at the moment, for a pair that spends it (:class:`CompensatedPair`)."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.errors import UncertifiableError
from stableopt.linalg import gram_norm
from stableopt.nn.dispatch import TOKEN_MAX, check_forward
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.dissipative import DissipativeBlock, DissipativeField
from stableopt.nn.residual.gradient_step import GradientStep
from stableopt.nn.residual.infinity import InfNormBlock
from stableopt.nn.residual.steps import rounding_slack
from stableopt.nn.training_constants import training_constant

__all__: list[str] = []


@training_constant.register(GradientStep)
def _gradient(module: GradientStep, norm: str) -> Tensor | float:
    r"""Return :math:`1 - \tau m`; a step below its limit makes the other end of the spectrum no larger."""
    _require(norm, {"l2", TOKEN_MAX}, module)
    return _less(module.damping()) if module.strong else 1.0


@training_constant.register(DissipativeBlock)
def _dissipative(module: DissipativeBlock, norm: str) -> Tensor | float:
    r"""Return :math:`\sqrt{(1 - \tau\gamma)^2 + \tau^2s^2} + \tau\rho` with Gram bounds in :math:`\gamma, s, \rho`.

    The law holds with any upper bound of the curvature, and it grows with s.
    """
    _require(norm, {"l2", TOKEN_MAX}, module)
    field = module.field
    if not isinstance(field, DissipativeField):
        raise UncertifiableError(f"the field of a DissipativeBlock was replaced by a {type(field).__name__}.")
    check_forward(field, DissipativeField)
    tau, weight, skew = module.step_size(), wide(field.weight), wide(field.rotation())
    with full_precision(weight):
        half = (gram_norm(weight) * (1.0 + rounding_slack(weight))).square() / 2.0
        s = gram_norm(skew) * (1.0 + rounding_slack(skew))
    rho = half + field.free
    gamma = rho + field.current_rate()
    factor = torch.linalg.vector_norm(torch.stack([1.0 - tau * gamma, tau * s])) + tau * rho
    lost = 16.0 * torch.finfo(factor.dtype).eps
    return factor * (1.0 + lost) + lost * (1.0 + tau * gamma)  # the difference loses a part of its terms, not of itself


@training_constant.register(InfNormBlock)
def _inf_norm(module: InfNormBlock, norm: str) -> Tensor | float:
    r"""Return :math:`1 - \min_i \tau_i m`."""
    _require(norm, {"linf"}, module)
    return _less(wide(module.step_sizes()).amin() * module.field.rate) if module.field.rate else 1.0


def _less(damping: Tensor) -> Tensor:
    """Return one less the damping, and more than the rounding of both."""
    return 1.0 - damping + 4.0 * torch.finfo(damping.dtype).eps


def _require(norm: str, norms: set[str], module: object) -> None:
    if norm not in norms:
        raise UncertifiableError(
            f"a {type(module).__name__} is known not to expand in {' and '.join(sorted(norms))}, and {norm!r} was asked for."
        )
