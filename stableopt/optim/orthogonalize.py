r"""The polar factor of Muon's momentum, with a spectral norm that is at most 1 as stored.

An odd polynomial of a matrix, :math:`p(Y) = aY+b(YY^T)Y+c(YY^T)^2Y`, acts on its singular values alone. Here five of them, one
after the other, send every singular value of :math:`[10^{-3}, 1]` into :math:`[0.768, 1]` and all of [0, 1] into [0, 1]. The five
steps of ``torch.optim.Muon`` send them into [0.47, 1.2024].

*The polynomials.* Step k is the odd quintic nearest to 1 on :math:`[l_k, (1+s)u_k]`, where :math:`[l_k, u_k]` is what step k-1 has
made of :math:`[10^{-3}, 1]` and :math:`s = 1/64` is slack for rounding; the nearest one in every step is the nearest composite
(Amsel et al.). It oscillates between :math:`1-E_k` and :math:`1+E_k`; the last one is divided by :math:`1+E_k`.

*Rounding.* By Weyl, an error :math:`\Delta` of a step moves singular values by at most :math:`\|\Delta\|_2`. The slack bears an
error of 1/64 of the norm in every step, where float32 errs by 1e-6 to 1e-4. (bfloat16 can err by more: autocast is off here.) So
only the rounding of the last step and of the result counts. The last step is done in float64, with an error for an
:math:`m\times n` matrix (:math:`m \le n`) below :math:`256\,mn\,2^{-53}` in the Frobenius norm, in whatever order products are
summed: with
:math:`\|AB-\mathrm{fl}(AB)\|_F \le 1.01\,k\,2^{-53}\|A\|_F\|B\|_F`, k the inner dimension, and
:math:`\|Y\|_F \le \sqrt m(1+s)u_k`, the products, scalings and sums of each quintic of the table add up to less. Rounding the
result to float32 adds at most :math:`2^{-24}\|O\|_F \le 2^{-24}\sqrt m`. The result is shrunk by the sum of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stableopt.constraints.sharding import is_sharded, on_whole

__all__ = ["POLAR_NORM", "adjustment", "muon_step", "newton_schulz", "orthogonalize"]

POLAR_NORM = 1.0
"""No result of :func:`orthogonalize` has a larger spectral norm."""

SLACK = 1 / 64
"""The relative error in the spectral norm that every step may commit."""

QUINTICS = (
    (8.34067892051, -23.9695151837, 17.2416315923),
    (4.12093595333, -2.96946430705, 0.537633308544),
    (3.91406881474, -2.83033942689, 0.522588364906),
    (3.28035284399, -2.38972642751, 0.475215690481),
    (2.29137320769, -1.62532026862, 0.395825512177),
    (1.8788885404, -1.23944154464, 0.361034729082),
    (1.8605339028, -1.22120924275, 0.360675458212),
    (1.86052800783, -1.22122378926, 0.360695490394),
)
"""The coefficients (a, b, c) of each step; from the last one on they have converged."""

HEIGHTS = (
    1.991659345101,
    1.965630418091,
    1.865589977155,
    1.56486972618,
    1.13068468798,
    1.00166364272,
    1.00000052169,
    1.000000291211,
)
"""The largest value of each quintic on the interval it is made for, rounded up."""

_ERRORS = 256
"""What the roundings of a last step add up to, in units of mn times the unit roundoff, at most."""


@torch.no_grad()
def orthogonalize(x: Tensor, *, steps: int = 5, eps: float = 1e-7, finish: torch.dtype = torch.float64) -> Tensor:
    r"""Return O near the polar factor :math:`UV^T` of :math:`X = U\Sigma V^T`, with :math:`\|O\|_2 \le 1` as stored.

    Args:
        x: a real matrix ``(m, n)`` of any floating dtype; a DTensor is gathered once and comes back in its layout.
        steps: how many polynomials are applied, >= 1. Singular values above 1e-3 of the Frobenius norm become at least 0.768 with
            5, 0.996 with 6, 0.99999 with 7; smaller ones grow by at least the same factor.
        eps: a matrix with a smaller Frobenius norm is scaled by 1/eps instead of being normalized, as torch does.
        finish: the dtype of the last step. With float32, which is faster where float64 is slow, the norm stays below 1 for all that
            is known, but no proof covers it.

    Returns:
        ``(m, n)``, float64 for a float64 matrix, else float32. NaN or infinity anywhere gives NaN.

    Raises:
        TypeError: if ``x`` is not real floating.
        ValueError: if ``x`` is not a matrix or steps is not positive.

    Note:
        The proof of the module covers the last step and the result. That each step before, in float32, errs by less than 1/64 of
        the norm is what floating-point sums do, with two orders of magnitude to spare, but no worst case of large matrices.

    References:
        Amsel, Persson, Musco and Gower, *The polar express*, 2025 (greedy minimax composition).

    Examples:
        >>> O = orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> s = torch.linalg.svdvals(O.double())
        >>> bool(s.max() <= 1.0), bool(s.min() > 0.76)
        (True, True)
    """
    if not x.is_floating_point():
        raise TypeError(
            f"x must be a real floating matrix, got dtype {x.dtype}; use torch.view_as_real for a complex one."
        )
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix, got shape {tuple(x.shape)}; flatten the other dimensions first.")
    if steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    if is_sharded(x):  # one exchange, and the same bits as in one process
        return on_whole("orthogonalize", lambda full: orthogonalize(full, steps=steps, eps=eps, finish=finish), x)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return x.to(work)
    with _full_precision(x.device.type):
        return _iterated(x.to(work), steps, eps, finish)


def _iterated(x: Tensor, steps: int, eps: float, finish: torch.dtype) -> Tensor:
    tall = x.size(0) > x.size(1)
    y = _normalized(x.mT if tall else x, eps)
    quintics = [QUINTICS[min(k, len(QUINTICS) - 1)] for k in range(steps)]
    for a, b, c in quintics[:-1]:
        y = _odd_quintic(y, a, b, c)
    scale = (1.0 - _margin(y.size(0), y.size(1), x.dtype, finish)) / HEIGHTS[min(steps, len(HEIGHTS)) - 1]
    y = _odd_quintic(y.to(finish), *(scale * coefficient for coefficient in quintics[-1]))
    return (y.mT if tall else y).to(x.dtype)


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Switch off autocast, where the device has it."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Divide by the Frobenius norm, at least ``eps``; squares neither overflow nor vanish."""
    largest = x.abs().amax()
    largest = torch.where(largest == 0.0, 1.0, largest.clamp(min=torch.finfo(x.dtype).tiny))
    y = x / largest
    norm = torch.linalg.vector_norm(y, dtype=torch.float64)
    part = torch.ones_like(norm) if eps == 0 else (largest.double() * norm / eps).clamp(max=1.0)
    # a norm below 1 is that of denormal numbers, or 0: then y is 0 too
    scale = part / norm.clamp(min=torch.finfo(y.dtype).tiny)
    if eps != 0:  # below eps the factor is largest / eps, also for the derivative at 0, where the norm has none
        scale = torch.where(part < 1.0, largest.double() / eps, scale)
    return y * scale.to(y.dtype)


def _odd_quintic(y: Tensor, a: float, b: float, c: float) -> Tensor:
    gram = y @ y.mT
    return torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)


def _margin(m: int, n: int, work: torch.dtype, finish: torch.dtype) -> float:
    stored = math.sqrt(m) * torch.finfo(work).eps / 2
    if finish == torch.float64:
        return stored + _ERRORS * m * n * torch.finfo(finish).eps / 2
    return stored + 16 * math.sqrt(m) * torch.finfo(finish).eps


@torch.no_grad()
def newton_schulz(x: Tensor, coefficients: tuple[float, float, float], *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Return what ``torch.optim.Muon`` takes for the polar factor: one quintic, iterated in bfloat16.

    Args:
        x: a real matrix ``(m, n)``.
        coefficients: (a, b, c); see :func:`stableopt.theory.newton_schulz_norm` for the norm of the result in exact arithmetic.
        steps: how often the quintic is applied.
        eps: the smallest norm that is divided by.

    Returns:
        ``(m, n)``, bfloat16.

    Examples:
        >>> O = newton_schulz(torch.eye(2), (3.4445, -4.7750, 2.0315))
        >>> O.dtype, bool(torch.linalg.svdvals(O.float()).max() > 1.0)
        (torch.bfloat16, True)
    """
    tall = x.size(0) > x.size(1)
    y = x.bfloat16().mT if tall else x.bfloat16()
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.addmm(
            y, torch.addmm(gram, gram, gram, beta=coefficients[1], alpha=coefficients[2]), y, beta=coefficients[0]
        )
    return y.mT if tall else y


def adjustment(adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    r"""Return the factor on the learning rate of Muon for a matrix ``(m, n)``.

    Args:
        adjust_lr_fn: None or ``"original"`` for :math:`\sqrt{\max(1, m/n)}`, ``"match_rms_adamw"`` for
            :math:`0.2\sqrt{\max(m, n)}`, anything else for 1.
        shape: (m, n).

    Examples:
        >>> adjustment(None, (8, 2)), adjustment("match_rms_adamw", (25, 4))
        (2.0, 1.0)
    """
    m, n = shape[:2]
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        return math.sqrt(max(1, m / n))
    return 0.2 * math.sqrt(max(m, n)) if adjust_lr_fn == "match_rms_adamw" else 1.0


@torch.no_grad()
def muon_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    ns_steps: int = 5,
    finish: torch.dtype = torch.float64,
) -> None:
    r"""Do the step of ``torch.optim.Muon`` with :func:`orthogonalize`, in place.

    .. math:: b^+ = \mu b+(1-\mu)g, \quad \theta^+ = (1-\eta\omega)\theta-\eta a\,O(b^+ \text{ or } \mu b^++(1-\mu)g).

    Args:
        params: matrices, of any kind that torch's takes, also sharded ones.
        grads: their gradients.
        buffers: their momenta b.
        lr: :math:`\eta`, a number or a tensor with one element.
        weight_decay: :math:`\omega`, decoupled.
        momentum: :math:`\mu`.
        nesterov: whether to look ahead.
        eps: see :func:`orthogonalize`.
        adjust_lr_fn: see :func:`adjustment`, which is a.
        ns_steps: see :func:`orthogonalize`.
        finish: see :func:`orthogonalize`.

    Raises:
        ValueError: if a parameter is complex or a gradient is not a matrix.

    Examples:
        >>> w, b = torch.zeros(2, 2), torch.zeros(2, 2)
        >>> muon_step([w], [torch.eye(2)], [b], lr=0.5, weight_decay=0.0, momentum=0.9, nesterov=False)
        >>> bool(torch.linalg.matrix_norm(w.double(), 2) <= 0.5)
        True
    """
    if any(torch.is_complex(p) for p in params):
        raise ValueError("Complex parameters are not supported")
    rate: Any = lr.squeeze() if isinstance(lr, Tensor) and lr.ndim != 0 else lr
    for param, grad, buffer in zip(params, grads, buffers, strict=True):
        if grad.ndim != 2:
            raise ValueError("Param gradient must be a 2D matrix")
        buffer.lerp_(grad, 1 - momentum)
        ahead = grad.lerp(buffer, momentum) if nesterov else buffer
        direction = orthogonalize(ahead, steps=ns_steps, eps=eps, finish=finish)
        param.mul_(1 - rate * weight_decay)
        param.add_(direction, alpha=-(rate * adjustment(adjust_lr_fn, param.shape)))
