r"""What the blocks of this package contract by at the moment, for a pair that spends it (:class:`CompensatedPair`)."""

from __future__ import annotations

from torch import Tensor

from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import TOKEN_MAX
from stableopt.nn.residual.gradient import GradientBlock
from stableopt.nn.training_constants import training_constant

__all__: list[str] = []


@training_constant.register(GradientBlock)
def _gradient(module: GradientBlock, norm: str) -> Tensor | float:
    r"""Return :math:`1 - \tau m`; with a step of at most :math:`2/(2m + \|A\|^2)` the other end of the spectrum is no larger."""
    if norm not in {"l2", TOKEN_MAX}:
        raise UncertifiableError(f"a GradientBlock is no contraction in {norm!r}, only in 'l2' and 'token_max'.")
    return 1.0 - module.step_size() * module.strong if module.strong else 1.0
