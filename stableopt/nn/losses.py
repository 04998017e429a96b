r"""Losses that ask for a margin, because a certified radius is a margin divided by a Lipschitz constant."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MarginCrossEntropy"]


class MarginCrossEntropy(nn.Module):
    r"""Cross-entropy of logits that must beat the others by a margin.

    .. math:: \ell(z, y) = \tfrac{1}{t}\,\mathrm{CE}\bigl(t\,(z - o\,e_y),\; y\bigr)

    averaged over the batch, with the temperature :math:`t` and the offset :math:`o`. A model with a Lipschitz limit of 1 cannot
    scale its logits up, so plain cross-entropy never gets small on it: the temperature sets the scale at which a margin counts as
    large. A sample is certified up to the l2 radius :math:`\varepsilon` at Lipschitz constant 1 if its margin exceeds
    :math:`\sqrt2\,\varepsilon`; an offset of that size asks for it. As :math:`t \to \infty` the loss tends to
    :math:`\max(0, \max_{j \ne y} z_j - z_y + o)`.

    Args:
        temperature: :math:`t > 0`, in units of one over logits.
        offset: :math:`o`, in units of logits; 0 gives plain cross-entropy at a temperature.

    Raises:
        ValueError: if ``temperature`` is not positive and finite or ``offset`` is not finite; in ``forward``, if the shapes do not
            fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.

    References:
        Prach and Lampert, *Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks*, 2022, section 5.

    Examples:
        >>> loss = MarginCrossEntropy(temperature=2.0, offset=0.5)
        >>> z, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> shifted = torch.tensor([[0.5, 0.0]])
        >>> bool(torch.isclose(loss(z, y), F.cross_entropy(2.0 * shifted, y) / 2.0))
        True
    """

    def __init__(self, temperature: float = 16.0, offset: float = 0.5) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {temperature!r}.")
        if not math.isfinite(offset):
            raise ValueError(f"offset must be finite, got {offset!r}.")
        self.temperature = float(temperature)
        self.offset = float(offset)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the mean loss of the logits ``input``, shape ``(N, C)``, for the labels ``target``, shape ``(N,)``."""
        if input.ndim != 2 or target.ndim != 1 or len(input) != len(target):
            raise ValueError(
                f"MarginCrossEntropy needs logits of shape (N, C) and labels of shape (N,), "
                f"got {tuple(input.shape)} and {tuple(target.shape)}."
            )
        if target.is_floating_point() or target.dtype in {torch.bool, torch.complex64, torch.complex128}:
            raise TypeError(f"the target must hold integer class labels, got dtype {target.dtype}.")
        classes = torch.arange(input.shape[1], device=input.device)
        # on an accelerator the check would wait for the device; there torch itself asserts on labels out of range
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_labels(target, input.shape[1])
        margin = input - self.offset * (classes == target.unsqueeze(1)).to(input.dtype)
        margin = margin - margin.detach().amax(1, keepdim=True)  # so that the temperature cannot overflow large logits
        return F.cross_entropy(self.temperature * margin, target.long()) / self.temperature

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"temperature={self.temperature}, offset={self.offset}"


def _check_labels(target: Tensor, classes: int) -> None:
    if bool(((target < 0) | (target >= classes)).any()):
        low, high = int(target.min()), int(target.max())
        raise ValueError(f"labels must lie in 0 ... {classes - 1}, got labels from {low} to {high}.")
