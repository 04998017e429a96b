r"""The dual of the Wasserstein distance as a loss, alone and with a hinge: for models with a Lipschitz limit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stableopt.nn.losses.batch import (
    check_labels,
    check_logits,
    check_number,
    check_reduction,
    reduced,
    require_number,
    require_tensors,
)
from stableopt.nn.precision import wide

__all__ = ["HKRLoss", "KRLoss"]


class KRLoss(nn.Module):
    r"""The Kantorovich–Rubinstein dual: how far the mean outputs of the classes are apart, negative.

    For one output and the labels 0 and 1,

    .. math:: \ell = -\Bigl(\frac1{n_1}\sum_{y_i=1} f(x_i) - \frac1{n_0}\sum_{y_i=0} f(x_i)\Bigr),

    which is at least :math:`-L\,W_1` with the 1-Wasserstein distance of the two classes if :math:`f` has the Lipschitz constant
    :math:`L`, and equal to it for the best such :math:`f`. For :math:`C \ge 2` outputs it is the mean of this over the classes,
    each against all the others. The gradient is a constant for each sample: it pulls forever, so the loss needs a Lipschitz limit.

    Args:
        reduction: ``"mean"``; ``"none"`` gives the part of each sample, such that their mean is the loss, and ``"sum"`` their sum.

    Raises:
        ValueError: if the reduction is unknown; in ``forward``, if the shapes do not fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.

    Note:
        A class that a batch does not hold, or that a batch holds alone, has no distance to the others and does not take part. A
        constant added to all outputs changes nothing. The loss is computed, and returned, in at least float32.

    References:
        Serrurier et al., *Achieving Robustness in Classification Using Optimal Transport with Hinge Regularization*, 2021.

    Examples:
        >>> f, y = torch.tensor([3.0, 1.0, -1.0]), torch.tensor([1, 1, 0])
        >>> KRLoss()(f, y)  # 2 above, -1 below
        tensor(-3.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the loss of outputs of shape ``(N,)``, ``(N, 1)`` or ``(N, C)`` for labels of shape ``(N,)``."""
        z, own = _batch(input, target, "KRLoss")
        return reduced(_kr(z, own), self.reduction)


class HKRLoss(nn.Module):
    r"""The Kantorovich–Rubinstein dual with a hinge, which makes a classifier of it.

    .. math:: \ell = (1 - \alpha)\, \mathrm{KR} + \alpha\, \mathrm{hinge}

    with :class:`KRLoss`. For one output and :math:`s = \pm1` for the labels 1 and 0, the hinge of a sample is
    :math:`\max(0, m/2 - s f)`; for :math:`C \ge 2` outputs

    .. math:: \max(0, m/2 - z_y) + \frac1{C-1} \sum_{j \ne y} \max(0, m/2 + z_j).

    Where it is 0, every margin is at least :math:`m`: with a model of the constant :math:`L` the radius is at least
    :math:`m/(\sqrt2 L)` in l2, and :math:`m/(2L)` for one output.

    Args:
        alpha: :math:`\alpha`, from 0 to 1; the paper's weight of the hinge is :math:`\alpha/(1-\alpha)`.
        margin: :math:`m > 0`, in units of logits.
        reduction: ``"mean"``; ``"none"`` gives the part of each sample, such that their mean is the loss, and ``"sum"`` their sum.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the shapes do not fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.

    Note:
        See :class:`KRLoss` for classes that a batch does not hold. Without a Lipschitz limit the loss has no lower bound for
        :math:`\alpha < 1`.

    References:
        Serrurier et al., *Achieving Robustness in Classification Using Optimal Transport with Hinge Regularization*, 2021.

    Examples:
        >>> f, y = torch.tensor([3.0, 1.0, -1.0]), torch.tensor([1, 1, 0])
        >>> HKRLoss(alpha=1.0, margin=4.0)(f, y)  # hinges 0, 1 and 1
        tensor(0.6667)
    """

    def __init__(self, alpha: float = 0.95, margin: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        require_number("alpha", alpha)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie from 0 to 1, got {alpha!r}.")
        self.alpha = float(alpha)
        self.margin = check_number("margin", margin, positive=True)
        self.reduction = check_reduction(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the loss of outputs of shape ``(N,)``, ``(N, 1)`` or ``(N, C)`` for labels of shape ``(N,)``."""
        z, own = _batch(input, target, "HKRLoss")
        below = (self.margin / 2.0 - torch.where(own, z, -z)).relu()
        hinge = below.sum(1) if z.shape[1] == 1 else torch.where(own, below, below / (z.shape[1] - 1)).sum(1)
        return reduced((1.0 - self.alpha) * _kr(z, own) + self.alpha * hinge, self.reduction)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"alpha={self.alpha}, margin={self.margin}"


def _batch(output: Tensor, target: Tensor, owner: str) -> tuple[Tensor, Tensor]:
    """Return the outputs in shape ``(N, K)`` and which samples belong to each of the K classes."""
    require_tensors(output, target, owner)
    z = wide(output)
    if z.ndim == 1 or (z.ndim == 2 and z.shape[1] == 1):
        if target.ndim != 1 or len(target) != len(z):
            shapes = f"{tuple(output.shape)} and {tuple(target.shape)}"
            raise ValueError(f"{owner} needs one output and one label for each sample, got {shapes}.")
        check_labels(target, 2)
        return z.reshape(-1, 1), (target == 1).unsqueeze(1)
    check_logits(z, target, owner)
    return z, target.unsqueeze(1) == torch.arange(z.shape[1], device=z.device)


def _kr(z: Tensor, own: Tensor) -> Tensor:
    r"""Return :math:`-\frac{N}{K}\sum_k a_{ik} z_{ik}`: :math:`a = 1/n_k` for a sample of class k, else :math:`-1/(N-n_k)`."""
    N, inside = len(z), own.sum(0)
    both = (inside > 0) & (inside < N)  # the classes that have a distance to the others in this batch
    weight = torch.where(own, 1.0 / inside.clamp_min(1).to(z.dtype), -1.0 / (N - inside).clamp_min(1).to(z.dtype))
    weight = torch.where(both, weight, torch.zeros_like(weight)) / both.sum().clamp_min(1).to(z.dtype)
    return -N * (weight * z).sum(1)
