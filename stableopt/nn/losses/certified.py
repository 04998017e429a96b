r"""Losses of the certificate itself: with the proved constants of the present weights, at every step of the training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.nn.losses.batch import check_logits, check_number, check_reduction, reduced
from stableopt.nn.losses.bounds import MarginBounds
from stableopt.nn.precision import wide

__all__ = ["CertificateRegularizer", "CertifiedMarginLoss", "GloRoLoss"]


class _OfConstants(nn.Module):
    """What the three losses share: the bounds of a model, the radius, the reduction."""

    def __init__(self, model: nn.Module, eps: float, norm: str, reduction: str, *, positive: bool) -> None:
        super().__init__()
        self.eps = check_number("eps", eps, positive=positive)
        self.reduction = check_reduction(reduction)
        self.bounds = MarginBounds(model, norm)  # no module: the parameters of the model are not those of the loss

    def _batch(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits in at least float32, the constants of each sample, and which logit is that of the label."""
        check_logits(logits, target, type(self).__name__)
        z, target = wide(logits), target.long()
        K = self.bounds(z.shape[1]).to(z.device)
        K = K.to(z.dtype) * (1.0 + 4.0 * torch.finfo(z.dtype).eps)  # a conversion and two products may round down
        return z, K[target], target.unsqueeze(1) == torch.arange(z.shape[1], device=z.device)

    def _shift(self, K: Tensor, eps: float | Tensor | None) -> Tensor:
        if eps is None:
            return self.eps * K
        if isinstance(eps, Tensor):
            if eps.ndim > 1 or (eps.ndim == 1 and len(eps) != len(K)):
                raise ValueError(f"eps must be a number or have the shape ({len(K)},), got {tuple(eps.shape)}.")
            return eps.to(K).reshape(-1, 1) * K
        return (eps if torch.compiler.is_compiling() else check_number("eps", eps, positive=False)) * K

    @torch.no_grad()
    def certified(self, input: Tensor, target: Tensor, eps: float | None = None) -> Tensor:  # noqa: A002 as in forward
        """Return which samples are classified rightly on the whole ball: those whose radius is *above* ``eps``.

        Args:
            input: logits of the model in evaluation mode, shape ``(N, C)``.
            target: labels, shape ``(N,)``.
            eps: the radius; None for that of the loss.

        Returns:
            Shape ``(N,)``, boolean; False for a tie and for NaN. The rounding in computing the logits is not counted.

        Examples:
            >>> loss = GloRoLoss(nn.Linear(2, 2), eps=0.0)
            >>> loss.certified(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0])).tolist()
            [True, False]
        """
        return self.bounds.radii(input, target) > (self.eps if eps is None else eps)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"eps={self.eps}, norm={self.bounds.norm}"


class CertifiedMarginLoss(_OfConstants):
    r"""Cross-entropy that no perturbation of size :math:`\varepsilon` can exceed.

    .. math:: \ell(x, y) = \tfrac1t\, \mathrm{CE}\bigl(t\,(z_j + \varepsilon K_{yj})_j,\; y\bigr)
        \;\ge\; \max_{\|x' - x\| \le \varepsilon} \tfrac1t\, \mathrm{CE}(t\, f(x'), y)

    with the proved constants :math:`K` of the margins at the present weights (:class:`MarginBounds`), because
    :math:`(z_j - z_y)(x') \le (z_j - z_y)(x) + \varepsilon K_{yj}` and cross-entropy grows with each :math:`z_j - z_y`. The
    gradient reaches the weights through the logits and through :math:`K`. A sample with :math:`\ell < (\log 2)/t` is certified at
    the radius :math:`\varepsilon`: the softmax of its label is above 1/2, so :math:`z_y > z_j + \varepsilon K_{yj}` for all others.

    Args:
        model: the model whose logits the loss gets: nested Sequentials, stabilized or not. It is kept, not copied.
        eps: :math:`\varepsilon \ge 0`, in units of the input of the model.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``, of the input.
        temperature: :math:`t > 0`, in units of one over logits.
        adaptive: shift each logit only up to the tie with the label, by :math:`\min(\varepsilon, \max(0, z_y - z_j)/K_{yj})`
            times :math:`K_{yj}`, the first factor without derivative: samples out of reach do not pull harder the larger
            :math:`\varepsilon` is. Then the loss is no bound of the worst case, but below :math:`(\log 2)/t` it still certifies.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the shapes do not fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.
        UncertifiableError: if the model has no Lipschitz constant in the norm.

    Note:
        The statement is about exact arithmetic and the map of evaluation, see :class:`MarginBounds`. A radius that most samples
        cannot reach makes a constant answer the best one: begin with a small one (a curriculum gives ``eps`` to each call), or
        take ``adaptive``. Scaling the last layer by :math:`2^k` and :math:`t` by :math:`2^{-k}` changes the loss by the factor
        :math:`2^k` alone. The loss is computed, and returned, in at least float32. A copy of the loss has a copy of the model.

    References:
        Hu, Zou, Wang, Leino and Fredrikson, *Unlocking Deterministic Robustness Certification on ImageNet*, 2023 (EMMA: adaptive).

    Examples:
        >>> head = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.constant_(head.weight[0].data, 1.0), nn.init.constant_(head.weight[1].data, -1.0)
        >>> x, y = torch.tensor([[3.0]]), torch.tensor([0])
        >>> worst = F.cross_entropy(head(x - 1.0), y)  # one step towards the boundary
        >>> bool(torch.isclose(CertifiedMarginLoss(head, eps=1.0)(head(x), y), worst, rtol=1e-4))
        True
    """

    def __init__(
        self, model: nn.Module, eps: float, norm: str = "l2", *, temperature: float = 1.0, adaptive: bool = False,
        reduction: str = "mean",
    ) -> None:  # fmt: skip
        super().__init__(model, eps, norm, reduction, positive=False)
        self.temperature = check_number("temperature", temperature, positive=True)
        self.adaptive = bool(adaptive)

    def forward(self, input: Tensor, target: Tensor, eps: float | Tensor | None = None) -> Tensor:  # noqa: A002 the name torch uses
        """Return the loss of the logits ``input``, shape ``(N, C)``.

        Args:
            input: the logits.
            target: labels, shape ``(N,)``.
            eps: another radius for this call, a number or one for each sample; None for that of the loss.
        """
        z, K, _ = self._batch(input, target)
        shift = self._shift(K, eps)
        if self.adaptive:
            gap = (z.gather(1, target.long().unsqueeze(1)) - z).detach().clamp_min(0.0)
            factor = gap / torch.where(K > 0, K, torch.ones_like(K)).detach()
            shift = torch.where(gap < shift.detach(), gap + factor * (K - K.detach()), shift)
        return _cross_entropy(z + shift, target, self.temperature, self.reduction)


class GloRoLoss(_OfConstants):
    r"""Cross-entropy with one more class, "not robust", whose logit is the largest that another class can reach.

    .. math:: z_\bot = \max_{j \ne y} (z_j + \varepsilon K_{yj}), \qquad
        \ell = \tfrac1t\, \mathrm{CE}\bigl(t\,(z_1, \dots, z_C, z_\bot),\; y\bigr)

    with the proved constants :math:`K` of the margins at the present weights (:class:`MarginBounds`), differentiable. A sample
    with :math:`\ell < (\log 2)/t` is certified at the radius :math:`\varepsilon`, since :math:`z_y > z_\bot`. At a tie
    :math:`z_y = z_\bot`, which is not certified, the loss is at least :math:`(\log 2)/t`.

    Args:
        model: the model whose logits the loss gets: nested Sequentials, stabilized or not. It is kept, not copied.
        eps: :math:`\varepsilon \ge 0`, in units of the input of the model.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``, of the input.
        temperature: :math:`t > 0`, in units of one over logits.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the shapes do not fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.
        UncertifiableError: if the model has no Lipschitz constant in the norm.

    Note:
        As in :class:`CertifiedMarginLoss`. The paper takes the predicted class in place of :math:`y`; the two agree where the
        prediction is right. Its code removes *all* largest logits before it looks for the next one, which certifies ties, and
        divides by norms plus a constant, which certifies small weights; both are done rightly here.

    References:
        Leino, Wang and Fredrikson, *Globally-Robust Neural Networks*, 2021, section 3.

    Examples:
        >>> head = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.constant_(head.weight[0].data, 1.0), nn.init.constant_(head.weight[1].data, -1.0)
        >>> loss, y = GloRoLoss(head, eps=1.0), torch.tensor([0])
        >>> z = head(torch.tensor([[3.0]]))  # 3 and -3; the constant is 2, so the third logit is -1
        >>> bool(torch.isclose(loss(z, y), F.cross_entropy(torch.tensor([[3.0, -3.0, -1.0]]), y), rtol=1e-4))
        True
    """

    def __init__(
        self, model: nn.Module, eps: float, norm: str = "l2", *, temperature: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(model, eps, norm, reduction, positive=False)
        self.temperature = check_number("temperature", temperature, positive=True)

    def forward(self, input: Tensor, target: Tensor, eps: float | Tensor | None = None) -> Tensor:  # noqa: A002 the name torch uses
        """Return the loss of the logits ``input``, shape ``(N, C)``.

        Args:
            input: the logits.
            target: labels, shape ``(N,)``.
            eps: another radius for this call, a number or one for each sample; None for that of the loss.
        """
        z, K, own = self._batch(input, target)
        bottom = (z + self._shift(K, eps)).masked_fill(own, -torch.inf).amax(1, keepdim=True)
        return _cross_entropy(torch.cat([z, bottom], dim=1), target, self.temperature, self.reduction)


class CertificateRegularizer(_OfConstants):
    r"""Penalty on certified radii below a target, to be added to any loss.

    .. math:: R = \max\bigl(0,\; 1 - r/\varepsilon\bigr), \qquad r = \min_{j \ne y} \frac{z_y - z_j}{K_{yj}}

    averaged over the batch, with the proved constants :math:`K` of the margins at the present weights (:class:`MarginBounds`),
    differentiable. It is 0 exactly if every sample has a signed radius :math:`r \ge \varepsilon`, and does not change if all
    weights of the last layer are scaled.

    Args:
        model: the model whose logits the penalty gets: nested Sequentials, stabilized or not. It is kept, not copied.
        eps: :math:`\varepsilon > 0`, in units of the input of the model.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``, of the input.
        correct_only: count wrongly classified samples as 1, without a gradient, so that the penalty is at most 1 and only
            enlarges radii that are there; else they are pulled as well, by an unbounded penalty.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the shapes do not fit or a label is no class.
        TypeError: in ``forward``, if the target does not hold integer class labels.
        UncertifiableError: if the model has no Lipschitz constant in the norm.

    Note:
        As in :class:`CertifiedMarginLoss`. Classes whose rows of the head are equal have no gradient, and the radius 0 or
        infinity.

    References:
        Singla, Singla and Feizi, *Improved Deterministic l2 Robustness on CIFAR-10 and CIFAR-100*, 2022 (regularization).

    Examples:
        >>> head = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.constant_(head.weight[0].data, 1.0), nn.init.constant_(head.weight[1].data, -1.0)
        >>> penalty = CertificateRegularizer(head, eps=4.0, reduction="none")
        >>> z = head(torch.tensor([[3.0], [5.0], [-4.0]]))  # the boundary is 0
        >>> penalty(z, torch.tensor([0, 0, 0])).round(decimals=4).tolist()
        [0.25, 0.0, 2.0]
    """

    def __init__(
        self, model: nn.Module, eps: float, norm: str = "l2", *, correct_only: bool = False, reduction: str = "mean"
    ) -> None:
        super().__init__(model, eps, norm, reduction, positive=True)
        self.correct_only = bool(correct_only)

    def forward(self, input: Tensor, target: Tensor, eps: float | None = None) -> Tensor:  # noqa: A002 the name torch uses
        """Return the penalty of the logits ``input``, shape ``(N, C)``.

        Args:
            input: the logits.
            target: labels, shape ``(N,)``.
            eps: another positive radius for this call; None for that of the penalty.
        """
        z, K, own = self._batch(input, target)
        margin = z.gather(1, target.long().unsqueeze(1)) - z
        equal = K == 0
        r = margin / torch.where(equal, torch.ones_like(K), K)
        r = torch.where(equal, torch.where(margin > 0, torch.inf, 0.0 * margin.detach()), r)
        r = r.masked_fill(own, torch.inf).amin(1)
        if self.correct_only:
            r = r.clamp_min(0.0)
        limit = (
            self.eps
            if eps is None
            else eps
            if torch.compiler.is_compiling()
            else check_number("eps", eps, positive=True)
        )
        return reduced((1.0 - r / limit).relu(), self.reduction)


def _cross_entropy(logits: Tensor, target: Tensor, temperature: float, reduction: str) -> Tensor:
    logits = logits - logits.detach().amax(1, keepdim=True)  # so that the temperature cannot overflow large logits
    return F.cross_entropy(temperature * logits, target.long(), reduction=reduction) / temperature
