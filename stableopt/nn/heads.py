r"""Last layers for margins, and the certified radii that follow from a margin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, Real, inf_norm, one_norm, spectral_norm, upper
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.householder import unit_rows
from stableopt.nn.precision import full_precision
from stableopt.nn.uniform import uniform_rule

__all__ = ["UnitRowLinear", "margin_constants", "margin_radii"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class UnitRowLinear(nn.Module):
    r"""Linear layer whose rows have norm 1.

    .. math:: x \mapsto \hat W x + b, \qquad \hat w_i = w_i / \|w_i\|_2

    A margin :math:`z_i - z_j` has the constant :math:`\|\hat w_i - \hat w_j\|_2 \le 2`, and :math:`\sqrt2` for orthogonal rows,
    however many classes there are. A bound through the norm of the matrix, :math:`\sqrt2\,\|\hat W\|_2`, is larger in general:
    parallel rows have :math:`\|\hat W\|_2 = \sqrt C` and a difference of 0. Give :meth:`unit_weight` to :func:`margin_constants`.

    Args:
        in_features: number :math:`n` of features.
        out_features: number :math:`C` of classes.
        bias: whether to add a learned :math:`b`.

    Raises:
        ValueError: if a size is no integer of at least 1.

    Note:
        Parameters ``weight`` and ``bias`` have the shapes of :class:`torch.nn.Linear`, so its checkpoints load. Unit rows do not
        make the layer 1-Lipschitz: :func:`stableopt.nn.lipschitz` gives the norm of the normalised matrix. Zero rows stay zero.

    References:
        Singla, Singla and Feizi, *Improved Deterministic l2 Robustness on CIFAR-10 and CIFAR-100*, 2022 (last-layer normalisation).

    Examples:
        >>> head = UnitRowLinear(2, 2, bias=False)
        >>> _ = head.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.0, -2.0]])})
        >>> head(torch.tensor([[5.0, 5.0]])).round(decimals=4).tolist()
        [[7.0, -5.0]]
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}.")
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthonormal rows (or columns, if there are more classes than features) and set the bias to 0."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def unit_weight(self) -> Tensor:
        """Return the matrix that ``forward`` uses, in the dtype of the parameter.

        Examples:
            >>> UnitRowLinear(3, 2).unit_weight().norm(dim=1).round(decimals=4).tolist()
            [1.0, 1.0]
        """
        with full_precision(self.weight):
            return unit_rows(self.weight).to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the logits; the features are the last dimension of the input."""
        return F.linear(input, self.unit_weight(), self.bias)

    def to_linear(self) -> nn.Linear:
        """Return a plain :class:`torch.nn.Linear` that computes the same function, bit for bit.

        Examples:
            >>> head, x = UnitRowLinear(3, 2), torch.ones(1, 3)
            >>> torch.equal(head.to_linear()(x), head(x))
            True
        """
        classes, features = self.weight.shape
        plain = nn.Linear(features, classes, bias=self.bias is not None, device="meta")  # draws no random numbers
        plain.weight = nn.Parameter(self.unit_weight().detach().clone())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        classes, features = self.weight.shape
        return f"{features}, {classes}, bias={self.bias is not None}"


def margin_constants(weight: Tensor, norm: str = "l2") -> Tensor:
    r"""Bound the Lipschitz constant of each margin of a linear head, for every pair of classes.

    .. math:: K_{ij} = \|w_i - w_j\|_*, \qquad |(z_i - z_j)(x) - (z_i - z_j)(y)| \le K_{ij}\,\|x - y\|

    with the dual norm: l2 for l2, l1 for linf, linf for l1. By Hölder's inequality this is the smallest constant. It is at most
    :math:`\sqrt2\,\|W\|_2` in l2, and often far smaller.

    Args:
        weight: :math:`W`, shape ``(C, n)``, finite: of a Linear, or ``unit_weight()`` of a :class:`UnitRowLinear`.
        norm: of the features, ``"l2"``, ``"linf"`` or ``"l1"``.

    Returns:
        Shape ``(C, C)``, float64, symmetric, 0 for equal rows. Each entry is at least the constant of the stored numbers, all
        rounding counted, and above it by a relative amount of at most :math:`(n + 10)\,2^{-51}`, plus
        :math:`2^{-500}\sqrt n` times the largest entry of the weight.

    Raises:
        ValueError: if the weight is no finite matrix or the norm is unknown. TypeError: if it is in another floating-point dtype
            than float64, 32, 16 and bfloat16.

    References:
        Tsuzuku, Sato and Sugiyama, *Lipschitz-Margin Training*, 2018 (margins); Leino et al., 2021 (constants per pair).

    Examples:
        >>> K = margin_constants(torch.eye(2))
        >>> bool(0 <= K[0, 1] - math.sqrt(2) < 1e-14)
        True
    """
    if norm not in (dual := {"l2": 2.0, "linf": 1.0, "l1": math.inf}):
        raise ValueError(f"norm must be 'l2', 'linf' or 'l1', got {norm!r}.")
    if weight.is_floating_point() and weight.dtype not in _DTYPES:
        raise TypeError(
            f"weight must be float64, 32, 16 or bfloat16, got {weight.dtype}; convert it with weight.float()."
        )
    if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(
            f"weight must be a finite matrix of shape (C, n), got {weight.dtype} of shape {tuple(weight.shape)}."
        )
    W = weight.detach().double()
    size = float(W.abs().max()) if W.numel() else 0.0
    if size == 0.0:
        return torch.zeros(len(W), len(W), dtype=torch.float64, device=W.device)
    equal = torch.cdist(W, W, math.inf) == 0.0  # with gradual underflow a difference is 0 only of equal numbers
    exponent = math.frexp(size)[1]
    halves = exponent // 2, exponent - exponent // 2  # 2**exponent alone may not be a float
    W = W * 2.0 ** -halves[0] * 2.0 ** -halves[1]  # exact, and now below 1
    K = torch.cdist(W, W, dual[norm], compute_mode="donot_use_mm_for_euclid_dist")
    # n + 3 roundings, each at most 2^-53 relative; what underflowed in a square or in the scaling adds less than 2^-501 per entry
    K = (
        (K * (1.0 + (W.shape[1] + 8) * 2.0**-52) + math.sqrt(W.shape[1]) * 2.0**-501)
        * 2.0 ** halves[0]
        * 2.0 ** halves[1]
    )
    K = torch.nextafter(
        torch.maximum(K, K.mT), torch.full_like(K, math.inf)
    )  # a subnormal result may have been rounded down
    return K.masked_fill(equal, 0.0)


def margin_radii(logits: Tensor, constants: Tensor, lipschitz: Real = 1.0, target: Tensor | None = None) -> Tensor:
    r"""Return how far each input can move before the predicted class can change.

    .. math:: r = \min_{j \ne y} \frac{\max(0, z_y - z_j)}{L\, K_{yj}}

    with the largest logit :math:`z_y`, the constants :math:`K` of the head and the bound :math:`L` of the model in front of it. The
    radius is in the norm of the constants, in units of the input of that model.

    Args:
        logits: shape ``(N, C)``.
        constants: :math:`K`, shape ``(C, C)``, from :func:`margin_constants`.
        lipschitz: :math:`L > 0`, a number or a bound; of a bound the upper end counts.
        target: labels, shape ``(N,)``; a sample whose prediction is another class then has the radius 0.

    Returns:
        Shape ``(N,)``, float64: 0 for a tie or NaN; infinity if no class can overtake, as with a single class.

    Raises:
        ValueError: if the shapes do not fit, a label is no class, a constant is negative or NaN, or :math:`L` is not positive and
        finite. TypeError: if the target does not hold integer labels.

    Note:
        It is the radius of the exact network at these logits: the rounding in computing them is not counted, which
        :meth:`stableopt.certify.Certificate.radius` does. The division itself is rounded down.

    References:
        Tsuzuku, Sato and Sugiyama, *Lipschitz-Margin Training*, 2018.

    Examples:
        >>> K = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> margin_radii(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), K).round(decimals=6).tolist()
        [1.0, 0.0]
    """
    L = upper(lipschitz)
    if not 0.0 < L < math.inf:
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz!r}.")
    if logits.ndim != 2 or constants.shape != (logits.shape[-1], logits.shape[-1]):
        raise ValueError(
            f"margin_radii needs logits (N, C) and constants (C, C), got {tuple(logits.shape)} and {tuple(constants.shape)}."
        )
    K = constants.detach().to(logits.device, torch.float64)
    if not bool((K >= 0).all()):
        raise ValueError("the margin constants must be at least 0; build them with margin_constants().")
    z = logits.detach().double()
    if not z.numel():
        return z.new_zeros(len(z))
    best = z.argmax(1)
    others = torch.ones_like(z, dtype=torch.bool).scatter_(1, best[:, None], False)
    margin = _down(z.gather(1, best[:, None]) - z)
    larger, smaller = (
        K[best].clamp_min(L),
        K[best].clamp_max(L),
    )  # in this order no quotient under- or overflows on the way
    reach = torch.where(smaller == 0, math.inf, _down(_down(margin / larger) / smaller))
    reach = torch.where(margin > 0, reach, 0.0)  # also for NaN
    radius = torch.where(others, reach, math.inf).amin(1)
    radius = torch.where(z.isfinite().all(1), radius, 0.0)
    return radius if target is None else torch.where(best == _labels(target, z), radius, 0.0)


def _down(x: Tensor) -> Tensor:
    """Return the next float towards 0, for infinity the largest one: not above the exact result that was rounded to ``x``."""
    return torch.nextafter(x, torch.zeros_like(x))


def _labels(target: Tensor, logits: Tensor) -> Tensor:
    if target.is_floating_point() or target.dtype in {torch.bool, torch.complex64, torch.complex128}:
        raise TypeError(f"the target must hold integer class labels, got dtype {target.dtype}.")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"the target must have the shape {tuple(logits.shape[:1])}, got {tuple(target.shape)}.")
    if bool(((target < 0) | (target >= logits.shape[1])).any()):
        raise ValueError(
            f"labels must lie in 0 ... {logits.shape[1] - 1}, got labels from {int(target.min())} to {int(target.max())}."
        )
    return target.to(logits.device)


@lipschitz_rule.register(UnitRowLinear)
def _unit_row_linear(module: UnitRowLinear, norm: str) -> Bound:
    """Bound the normalised matrix as computed, which is the one that ``forward`` uses."""
    weight = module.unit_weight().detach()
    bad = module.bias is not None and not bool(module.bias.isfinite().all())
    if bad or not bool(module.weight.isfinite().all()):
        raise ValueError("no bound holds for a UnitRowLinear with NaN or infinite parameters.")
    return {"l2": spectral_norm, "linf": inf_norm, "l1": one_norm}[norm](weight)


@uniform_rule.register(UnitRowLinear)
def _unit_row_linear_uniform(module: UnitRowLinear, norm: str) -> Bound:
    r"""Bound :math:`C` rows of norm 1 by :math:`\sqrt C` in l2 (equal rows), :math:`\sqrt n` in linf and :math:`C` in l1."""
    C, n = module.weight.shape
    slack = (n + 16) * torch.finfo(module.weight.dtype).eps  # of the norm of a row, its quotients, and their rounding
    size = {"l2": Bound.point(C).sqrt(), "linf": Bound.point(n).sqrt(), "l1": Bound.point(C)}[norm]
    return Bound(0.0, (size * (1.0 + slack)).upper)
