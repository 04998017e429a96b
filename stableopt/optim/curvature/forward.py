"""Forward over reverse: tangents are carried through one evaluation of the loss and through its gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version

from stableopt.optim.curvature.base import Curvature
from stableopt.optim.modules import buffers_put_back

__all__ = ["Forward"]


class Forward(Curvature):
    r"""By the tangent of the gradient: :math:`Hv = \frac{d}{dt}\, g(\theta + t v)|_{t=0}`, one evaluation for each product.

    No graph of a gradient is built, so it needs little more memory than training. The parameters themselves carry the tangents,
    so whatever the loss reaches them by (modules, lists, packed weights of an LSTM) sees them; values and version counters stay,
    and the tangents end with the product, also after an error. Fused kernels are left out as in :class:`Exact`.

    Raises:
        RuntimeError: at a product, if something has no forward derivative: ``mse_loss`` and ``huber_loss``, spectral
            normalization in training, weight normalization, a custom function without ``jvp``.

    Note:
        ``torch.no_grad`` inside the loss does not stop tangents, ``detach`` does. Where a loss hides a dependence from autograd
        with ``no_grad``, this product and a difference see it, and the exact one does not.
        The forward derivative of some gradients is silently wrong in torch (that of ``torch.linalg.solve``), which
        :func:`stableopt.optim.curvature.asymmetry` reveals; :class:`stableopt.optim.curvature.Choice` looks once.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with Forward(lambda: (w**3).sum(), [w]) as product:
        ...     product([torch.ones(1)])
        [tensor([6.])]
    """

    name = "forward"

    def _open(self) -> None:
        with (
            warnings.catch_warnings(),
            forward_ad.dual_level(),
        ):  # the first dual tensor loads formulas that torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))

    def _product(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        with forward_ad.dual_level(), buffers_put_back(self.loss):
            for p, x in zip(self.parameters, v, strict=True):
                # the tangent goes onto p itself: it is copied to itself, and no graph that others have built takes it for a change
                with torch.no_grad(), same_version(p):
                    p.copy_(forward_ad.make_dual(p.detach(), x.detach().to(p.dtype)))
            tangents = [None if g is None else _tangent(g) for g in self._gradients(twice=False)]
        torch.clear_autocast_cache()  # casts of the weights carry these tangents
        return tangents

    @classmethod
    def refuses(cls, error: Exception) -> bool:
        """Say whether an error means that there is no product this way: what has no forward derivative says so in many words."""
        return isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)


def _tangent(gradient: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(gradient).tangent
    if tangent is None:
        raise RuntimeError(
            "the gradient of a parameter has no tangent: it is constant, or it comes from a backward that drops tangents; use "
            "method='difference'"
        )
    return tangent.detach()
