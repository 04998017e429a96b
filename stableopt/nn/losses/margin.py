r"""Cross-entropy at a temperature, with a fixed offset of the margins."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.nn.losses.batch import check_logits, check_number, check_reduction
from stableopt.nn.precision import wide

__all__ = ["MarginCrossEntropy"]


class MarginCrossEntropy(nn.Module):
    r"""Cross-entropy of logits that must beat the others by a margin.

    .. math:: \ell(z, y) = \tfrac{1}{t}\,\mathrm{CE}\bigl(t\,(z - o\,e_y),\; y\bigr)

    averaged over the batch, with the temperature :math:`t` and the offset :math:`o`. A model with a Lipschitz limit of 1 cannot
    scale its logits up, so plain cross-entropy never gets small on it: the temperature sets the scale at which a margin counts as
    large. A sample is certified up to the l2 radius :math:`\varepsilon` at Lipschitz constant 1 if its margin exceeds
    :math:`\sqrt2\,\varepsilon`; an offset of that size asks for it. As :math:`t \to \infty` the loss tends to
    :math:`\max(0, \max_{j \ne y} z_j - z_y + o)`. The gradient, :math:`\mathrm{softmax}(t(z - o e_y)) - e_y`, has a 1-norm of at
    most 2 at every temperature.

    Args:
        temperature: :math:`t > 0`, in units of one over logits.
        offset: :math:`o`, in units of logits; 0 gives plain cross-entropy at a temperature.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Raises:
        ValueError: if ``temperature`` is not positive and finite, ``offset`` is not finite or the reduction is unknown; in
            ``forward``, if the shapes do not fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.

    Note:
        Logits in half precision give a loss in float32.

    References:
        Prach and Lampert, *Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks*, 2022, section 5.

    Examples:
        >>> loss = MarginCrossEntropy(temperature=2.0, offset=0.5)
        >>> z, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> shifted = torch.tensor([[0.5, 0.0]])
        >>> bool(torch.isclose(loss(z, y), F.cross_entropy(2.0 * shifted, y) / 2.0))
        True
    """

    def __init__(self, temperature: float = 16.0, offset: float = 0.5, *, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, positive=True)
        if not math.isfinite(offset):
            raise ValueError(f"offset must be finite, got {offset!r}.")
        self.offset = float(offset)
        self.reduction = check_reduction(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the loss of the logits ``input``, shape ``(N, C)``, for the labels ``target``, shape ``(N,)``."""
        check_logits(input, target, "MarginCrossEntropy")
        z = wide(input)
        classes = torch.arange(z.shape[1], device=z.device)
        margin = z - self.offset * (classes == target.unsqueeze(1)).to(z.dtype)
        margin = margin - margin.detach().amax(1, keepdim=True)  # so that the temperature cannot overflow large logits
        return F.cross_entropy(self.temperature * margin, target.long(), reduction=self.reduction) / self.temperature

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"temperature={self.temperature}, offset={self.offset}"
