r"""What is proved about the gain of a diagonal state space, for the numbers that its forward pass uses.

With :math:`h_t = \Lambda h_{t-1} + B x_t` and :math:`y_t = \operatorname{Re}(C h_t) + D x_t` every state is its own filter,

.. math:: h_i = \frac{1}{1 - \lambda_i z^{-1}} (Bx)_i, \qquad
    \Bigl|\frac{1}{1 - \lambda_i z^{-1}}\Bigr| \le \sum_k |\lambda_i|^k = \frac{1}{1 - |\lambda_i|} \quad (|z| = 1),

so with :math:`S_i = B_i/(1 - |\lambda_i|)` it has :math:`\|h\| \le \|S\|_2 \|x\|` in l2 over time and features, and for every
:math:`q > 0`

.. math:: \|y\| \le \bigl\|[C,\; D/q]\bigr\|_2 \,\bigl(\|S\|_2^2 + q^2\bigr)^{1/2} \|x\| .

Entry by entry, :math:`\sup_t|h_i(t)| \le \sum_j |S_{ij}| \sup_t|x_j(t)|`, and the same with sums over time: in linf and l1 the gain
is at most the norm of the matrix :math:`|C||S| + |D|` of moduli.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, frobenius_norm, inf_norm, one_norm, spectral_norm
from stableopt.linalg.proved import as_matrix, gamma

__all__ = ["LinearSystem", "system_gain"]

Array = npt.NDArray[np.float64]
_U = 2.0**-53


class LinearSystem(NamedTuple):
    r"""The numbers of :math:`h_t = \lambda \odot h_{t-1} + Bx_t`, :math:`y_t = \operatorname{Re}(Ch_t) + Dx_t` as they are used.

    Examples:
        >>> import torch
        >>> zero, one = torch.zeros(1), torch.ones(1, 1)
        >>> LinearSystem(zero, zero, torch.ones(2, 1), torch.ones(1, 2), None, 1.0).skip is None
        True
    """

    real: Tensor
    r"""Real parts of :math:`\lambda`, of shape ``(n,)``."""
    imag: Tensor
    r"""Imaginary parts of :math:`\lambda`."""
    input: Tensor
    r""":math:`B`, real parts above imaginary parts, of shape ``(2n, d_in)``; it contains the input scales."""
    output: Tensor
    r""":math:`[\operatorname{Re}C, -\operatorname{Im}C]`, of shape ``(d_out, 2n)``."""
    skip: Tensor | None
    r""":math:`D`, of shape ``(d_out, d_in)``, or None."""
    weight: Tensor | float = 1.0
    """A number q > 0 for which the bound of the whole is small; every one is valid."""


def system_gain(system: LinearSystem, norm: str) -> Bound:
    r"""Bound the gain from input to output sequences, from the zero state and for every length.

    Args:
        system: its numbers.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``, of whole sequences.

    Returns:
        A bound from 0 to the gain, proved for these numbers.

    Raises:
        UncertifiableError: if an eigenvalue is not proved to lie inside the unit circle.
        ValueError: if a number is NaN or infinite.

    Examples:
        >>> import torch
        >>> half = torch.full((1,), 0.5)
        >>> system = LinearSystem(half, torch.zeros(1), torch.tensor([[0.5], [0.0]]), torch.tensor([[3.0, 0.0]]), None)
        >>> 3.0 in system_gain(system, "l2") and system_gain(system, "l2").upper < 3.0 + 1e-12
        True
    """
    scaled = _scaled_input(system)  # S
    output = as_matrix(system.output)
    skip = None if system.skip is None else as_matrix(system.skip)
    if norm in {"linf", "l1"}:
        return Bound(0.0, _entrywise(output, scaled, skip, norm))
    state = _state_gain(scaled, norm)
    plain = Bound.point(spectral_norm(output).upper) * state
    if skip is None or not skip.any():
        return Bound(0.0, min(plain.upper, _by_columns(output, scaled, norm)))
    by_parts = plain.upper, _by_columns(output, scaled, norm)
    apart = (Bound.point(min(by_parts)) + Bound.point(spectral_norm(skip).upper)).upper
    weight = system.weight.detach() if isinstance(system.weight, Tensor) else system.weight
    q = Bound.point(float(weight))
    if not q.lower > 0.0:
        return Bound(0.0, apart)
    quotient = skip / q.upper
    if not np.isfinite(quotient).all():
        return Bound(0.0, apart)
    joint = np.concatenate([output, quotient], 1)
    rounding = frobenius_norm(quotient) * (2 * _U) + 4.0 * quotient.size * 2.0**-1074  # of the quotient
    together = (Bound.point(spectral_norm(joint).upper) + rounding.upper) * (state**2 + q**2).sqrt()
    return Bound(0.0, min(together.upper, apart))


def _scaled_input(system: LinearSystem) -> Array:
    r"""Return :math:`B_i/(1-|\lambda_i|)` with every :math:`1 - |\lambda_i|` rounded down, up to one rounding per entry."""
    real, imag = as_matrix(system.real, 1), as_matrix(system.imag, 1)
    modulus = (
        np.sqrt(real * real + imag * imag) * (1.0 + 4.0 * _U) + 2.0**-500
    )  # three roundings, and underflow of squares
    room = (1.0 - modulus) * (1.0 - 4.0 * _U)
    if modulus.size and not room.min() > 0.0:
        raise UncertifiableError(
            f"an eigenvalue of the state space has the modulus {float(modulus.max()):.17g}, not proved to be below 1, so no gain "
            "holds for every length."
        )
    return as_matrix(system.input) / np.concatenate([room, room])[:, None]


def _state_gain(scaled: Array, norm: str) -> Bound:
    r"""Bound :math:`\|h\|/\|x\|`: in token_max :math:`|h_i(t)| \le \|S_i\|_2 \sup_t \|x_t\|_2`, summed over the states."""
    size = frobenius_norm(scaled) if norm == "token_max" else spectral_norm(scaled)
    return Bound.point(size.upper) + frobenius_norm(scaled).upper * (2 * _U) + 4.0 * scaled.size * 2.0**-1074


def _by_columns(output: Array, scaled: Array, norm: str) -> float:
    r"""Bound :math:`\sum_i \|C_i\|\,\|S_i\|`, the gains of the states one by one: better where few states matter."""
    if norm != "token_max":
        return np.inf
    n = len(scaled) // 2
    columns = np.hypot.reduce(output, 0).reshape(2, n)
    rows = np.hypot.reduce(scaled, 1).reshape(2, n)
    total = float((np.hypot(*columns) * np.hypot(*rows)).sum())
    return total * (1.0 + gamma(output.shape[0] + scaled.shape[1] + n + 24)) + 2.0**-500


def _entrywise(output: Array, scaled: Array, skip: Array | None, norm: str) -> float:
    n = len(scaled) // 2
    moduli = np.hypot(output[:, :n], output[:, n:]) @ np.hypot(scaled[:n], scaled[n:])
    total = moduli if skip is None else moduli + np.abs(skip)
    size = inf_norm(total) if norm == "linf" else one_norm(total)
    return (size * (1.0 + gamma(n + 24)) + 2.0**-500 * n).upper  # all terms are >= 0, so the rounding is relative
