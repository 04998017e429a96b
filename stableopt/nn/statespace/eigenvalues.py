r"""Eigenvalues of somebody else's state space, kept stable while they are trained."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.nn.arguments import check_positive
from stableopt.nn.parametrized import adopt, remember_order

__all__ = ["StableEigenvalues", "discretize", "stable_eigenvalues"]

_GUARD = 64.0
"""Units of rounding between the largest modulus of a discrete eigenvalue and 1: a computed modulus is off by a few."""


class StableEigenvalues(nn.Module):
    r"""Parametrization that maps free complex numbers to stable eigenvalues.

    .. math::
        \lambda = -\bigl(\delta + \operatorname{softplus}(\operatorname{Re} w)\bigr) + i \operatorname{Im} w
        \quad\text{(continuous)}, \qquad e^{\lambda} \quad\text{(discrete)} .

    Args:
        time: ``"continuous"`` for :math:`\operatorname{Re}\lambda \le -\delta`, ``"discrete"`` for
            :math:`|\lambda| \le e^{-\delta}`.
        rate: :math:`\delta > 0`.
        pairs: whether the last dimension of the tensor holds real and imaginary parts.

    Examples:
        >>> stable = StableEigenvalues("continuous", 0.1)
        >>> bool(stable(torch.tensor([-100.0 + 2.0j])).real == -0.1)
        True
    """

    def __init__(self, time: str, rate: float, *, pairs: bool = False) -> None:
        super().__init__()
        self.time, self.rate, self.pairs = time, rate, pairs

    def forward(self, raw: Tensor) -> Tensor:
        """Return the eigenvalues."""
        w = torch.view_as_complex(raw.contiguous()) if self.pairs else raw
        value = torch.complex(-(self.rate + F.softplus(w.real, threshold=80.0)), w.imag)
        if self.time == "discrete":
            value = torch.polar(value.real.exp(), value.imag)
        return torch.view_as_real(value) if self.pairs else value

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the free numbers of given eigenvalues; those beyond the limit get ones close to it."""
        v = torch.view_as_complex(value.contiguous()) if self.pairs else value
        if self.time == "discrete":
            v = torch.complex(v.abs().clamp_min(torch.finfo(v.real.dtype).tiny).log(), v.angle())
        excess = (-v.real - self.rate).clamp_min(1e-3 * self.rate)
        real = excess + torch.log(-torch.expm1(-excess))  # the inverse of the softplus
        raw = torch.complex(real, v.imag)
        return torch.view_as_real(raw) if self.pairs else raw

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{self.time!r}, rate={self.rate:.3g}, pairs={self.pairs}"


def stable_eigenvalues(
    module: nn.Module,
    name: str = "Lambda",
    *,
    time: Literal["continuous", "discrete"] = "continuous",
    gain: float | None = None,
    step: float = 1e-3,
) -> nn.Module:
    r"""Keep the eigenvalues of a diagonal state space stable for the whole training, in place.

    A mode :math:`\dot h = \lambda h + u` has the gain :math:`1/|\operatorname{Re}\lambda|`, and its discretization by a zero-order
    hold has no larger one, whatever the step :math:`\Delta`, because with :math:`\bar\lambda = e^{\lambda\Delta}`

    .. math::
        \Bigl|\frac{\bar\lambda - 1}{\lambda}\Bigr| = \Bigl|\int_0^\Delta e^{\lambda s}ds\Bigr|
        \le \int_0^\Delta e^{s\operatorname{Re}\lambda}ds = \frac{1 - |\bar\lambda|}{|\operatorname{Re}\lambda|} .

    A mode :math:`h_t = \lambda h_{t-1} + u_t` has the gain :math:`1/(1-|\lambda|)`. This function limits them.

    Args:
        module: any module.
        name: of its parameter: a complex tensor, or a real one whose last dimension of size 2 holds real and imaginary parts.
        time: what the parameter is: ``"continuous"`` for eigenvalues that the module discretizes, ``"discrete"`` for those of the
            recurrence itself.
        gain: limit of the gain of each mode; None for what the rounding guard allows.
        step: the smallest step of the discretization that the module may use; continuous eigenvalues stay so far from the
            imaginary axis that the modulus of the discrete ones, computed in the dtype of the parameter, stays below 1.

    Returns:
        The same module; the parameter is now a function of a free one, ``parametrizations.<name>.original``.

    Raises:
        TypeError: if the parameter is neither complex nor a real tensor of pairs.
        ValueError: if an argument is out of range, the parameter does not exist or is NaN or infinite, or the limit of the gain is
            stricter than what the time allows (a discrete mode has at least the gain 1).

    Note:
        Eigenvalues within the limit keep their values up to rounding, others are moved to the limit. Make the optimizer afterwards.
        It is each mode that is limited; the gain of the whole system also depends on its input and output matrices.
        :func:`torch.nn.utils.parametrize.remove_parametrizations` makes the parameter plain again.

    References:
        Smith, Warrington and Linderman, *Simplified State Space Layers for Sequence Modeling*, 2023 (S5, whose eigenvalues are
        free); Orvieto et al., 2023 (the exponential of the discrete case).

    Examples:
        >>> layer = nn.Module()
        >>> layer.Lambda = nn.Parameter(torch.tensor([0.3 + 1.0j, -0.5 + 2.0j]))
        >>> _ = stable_eigenvalues(layer, gain=100.0)
        >>> bool((layer.Lambda.real <= -0.01).all()), round(float(layer.Lambda.detach()[1].real), 6)
        (True, -0.5)
    """
    parameter = _parameter(module, name)
    pairs = not parameter.is_complex()
    if time not in {"continuous", "discrete"}:
        raise ValueError(f"time must be 'continuous' or 'discrete', got {time!r}.")
    check_positive(step=step)
    guard = _GUARD * torch.finfo(parameter.dtype).eps
    rate = guard / step if time == "continuous" else guard
    if gain is not None:
        check_positive(gain=gain)
        if time == "discrete" and gain <= 1.0:
            raise ValueError(
                f"a discrete mode has at least the gain 1, so the limit must exceed it, got gain={gain!r}."
            )
        rate = max(rate, (1.0 + 1e-6) / gain if time == "continuous" else -math.log1p(-1.0 / gain) + guard)
    remember_order(module)
    P.register_parametrization(module, name, StableEigenvalues(time, rate, pairs=pairs))
    adopt(module, name, parameter.shape)
    return module


def discretize(eigenvalues: Tensor, step: Tensor | float, method: str = "zoh") -> tuple[Tensor, Tensor]:
    r"""Return the discrete eigenvalues and the input scales of :math:`\dot h = \lambda h + u`.

    .. math::
        \text{zoh:}\quad e^{\lambda\Delta},\; \frac{e^{\lambda\Delta} - 1}{\lambda}, \qquad
        \text{bilinear:}\quad \frac{1 + \lambda\Delta/2}{1 - \lambda\Delta/2},\; \frac{\Delta}{1 - \lambda\Delta/2} .

    Both map the open left half plane into the open unit disk.

    Args:
        eigenvalues: :math:`\lambda`, complex with negative real parts.
        step: :math:`\Delta > 0`, a number or a tensor that broadcasts.
        method: ``"zoh"`` (zero-order hold) or ``"bilinear"``.

    Raises:
        ValueError: if the method is unknown.

    Examples:
        >>> value, scale = discretize(torch.tensor([-1.0 + 0.0j], dtype=torch.complex128), 0.5)
        >>> abs(float(value.real) - 0.6065306597126334) < 1e-15
        True
    """
    if method not in {"zoh", "bilinear"}:
        raise ValueError(f"method must be 'zoh' or 'bilinear', got {method!r}.")
    scaled = eigenvalues * step
    if method == "zoh":
        return torch.polar(scaled.real.exp(), scaled.imag), torch.expm1(scaled) / eigenvalues
    return (1.0 + scaled / 2.0) / (1.0 - scaled / 2.0), step / (1.0 - scaled / 2.0)


def _parameter(module: nn.Module, name: str) -> Tensor:
    if P.is_parametrized(module, name):
        raise ValueError(f"'{name}' of {type(module).__name__} is parametrized already; remove that first.")
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    if parameter is None:
        raise ValueError(f"{type(module).__name__} has no parameter '{name}'.")
    if not parameter.is_complex() and not (parameter.is_floating_point() and parameter.shape[-1:] == (2,)):
        raise TypeError(
            f"eigenvalues are a complex tensor, or a real one of shape (..., 2), got {parameter.dtype} of shape "
            f"{tuple(parameter.shape)} in '{name}'."
        )
    if not bool(torch.isfinite(parameter).all()):
        raise ValueError(f"'{name}' of {type(module).__name__} holds NaN or infinity.")
    return parameter.detach()
