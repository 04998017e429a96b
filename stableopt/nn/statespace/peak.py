r"""The gain of a diagonal state space to a thousandth: the peak of its frequency response, proved by a storage function."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from stableopt.linalg import Bound
from stableopt.linalg.proved import as_matrix, gamma, largest_eigenvalues_upper
from stableopt.nn.arguments import check_positive
from stableopt.nn.statespace.diagonal import DiagonalStateSpace
from stableopt.nn.statespace.gain import LinearSystem, system_gain

__all__ = ["peak_gain"]

Array = npt.NDArray[np.float64]
_GRID = 257
_DOUBLINGS = 60


def peak_gain(layer: DiagonalStateSpace, excess: float = 1e-3) -> Bound:
    r"""Bound the l2 gain of a causal diagonal state space tightly.

    The gain is :math:`\max_\omega \|H(e^{i\omega})\|_2`. It is guessed on a grid of frequencies, among them the angles of the
    eigenvalues where the response peaks, and a guess :math:`g`, a little larger, is then proved by a *storage function*: with
    :math:`s_t = As_{t-1} + Bx_t`, :math:`y_t = Cs_t + Dx_t` in real numbers, :math:`M = [A, B]`, :math:`N = CM + [0, D]`, any
    symmetric :math:`P` with

    .. math:: M^\top P M + N^\top N \preceq \begin{pmatrix} P & 0 \\ 0 & g^2 I \end{pmatrix}

    gives :math:`\sum_t \|y_t\|^2 \le g^2 \sum_t \|x_t\|^2` by summing :math:`s_t^\top P s_t - s_{t-1}^\top P s_{t-1} + \|y_t\|^2
    \le g^2\|x_t\|^2`; :math:`P \succeq 0` because :math:`P \succeq A^\top P A` and all :math:`|\lambda| < 1`. :math:`P` comes from
    a doubling of the Riccati equation, which the proof does not trust: it evaluates the inequality and counts every rounding.

    Args:
        layer: a layer that runs in one direction.
        excess: by what fraction the proved number may exceed the peak on the grid; it grows tenfold where the proof fails.

    Returns:
        A bound from 0 to the proved number, at most that of :func:`~stableopt.nn.statespace.gain.system_gain`.

    Raises:
        UncertifiableError: if an eigenvalue is not proved to lie inside the unit circle.
        ValueError: if a number is NaN or infinite, the excess is no positive number, or the layer is bidirectional: there is no
            causal system then.

    Note:
        It costs some products of matrices of twice the number of states; for reports, not for every step of a training.

    References:
        Kalman, 1963, Yakubovich, 1962, and Popov, 1961 (the inequality); Chu, Fan, Lin and Wang, *Structure-Preserving Algorithms
        for Periodic Discrete-Time Algebraic Riccati Equations*, 2004 (the doubling).

    Examples:
        >>> from stableopt.nn import DiagonalStateSpace, lipschitz
        >>> _ = torch.manual_seed(0)
        >>> layer = DiagonalStateSpace(4, 8, gain=2.0).double()
        >>> peak_gain(layer).upper < lipschitz(layer).upper <= 2.0
        True
    """
    check_positive(excess=excess)
    if layer.bidirectional:
        raise ValueError("peak_gain needs a causal system; states that run backwards in time have no storage function.")
    with torch.no_grad():
        system = layer.system()
    simple = system_gain(system, "l2")
    A, B, C, D = _real_form(system)
    peak = _peak(system, D)
    if peak == 0.0:
        return simple
    states = _state_size(A, B)
    while excess < 1.0:
        g = peak * (1.0 + excess)
        if g >= simple.upper:
            break
        room = 0.5 * excess * (peak / states) ** 2
        with np.errstate(all="ignore"):  # what overflows is not finite and proves nothing
            P = _storage(A, B, C @ A, C @ B + D, peak * (1.0 + excess / 2.0), room)
        if P is not None and _holds(A, B, C, D, P, g):
            return Bound(0.0, g)
        excess *= 10.0
    return simple


def _real_form(system: LinearSystem) -> tuple[Array, Array, Array, Array]:
    real, imag = as_matrix(system.real, 1), as_matrix(system.imag, 1)
    A = np.block([[np.diag(real), -np.diag(imag)], [np.diag(imag), np.diag(real)]])
    B, C = as_matrix(system.input), as_matrix(system.output)
    D = np.zeros((len(C), B.shape[1])) if system.skip is None else as_matrix(system.skip)
    return A, B, C, D


def _peak(system: LinearSystem, D: Array) -> float:
    """Return the largest norm of the frequency response on a grid."""
    eigenvalues = as_matrix(system.real, 1) + 1j * as_matrix(system.imag, 1)
    n = len(eigenvalues)
    B, C = as_matrix(system.input), as_matrix(system.output)
    inward, outward = B[:n] + 1j * B[n:], C[:, :n] - 1j * C[:, n:]
    angles = np.concatenate([np.linspace(0.0, np.pi, _GRID), np.abs(np.angle(eigenvalues))])
    z = np.exp(-1j * angles)[:, None]
    one, other = 1.0 / (1.0 - eigenvalues * z), 1.0 / (1.0 - eigenvalues.conj() * z)
    response = (outward * one[:, None, :]) @ inward + (outward.conj() * other[:, None, :]) @ inward.conj()
    return float(np.linalg.norm(response / 2.0 + D, 2, axis=(1, 2)).max())


def _state_size(A: Array, B: Array) -> float:
    """Return about the gain from the input to the states."""
    n = len(A) // 2
    room = 1.0 - np.hypot(np.diagonal(A)[:n], np.diagonal(A[n:])[:n])
    return float(np.linalg.norm(B / np.concatenate([room, room])[:, None], 2)) or 1.0


def _storage(A: Array, B: Array, C: Array, D: Array, g: float, room: float) -> Array | None:
    """Solve the Riccati equation of the bounded real lemma by doubling, with ``room`` times the squared state added to the output.

    The room is what the proof has for rounding. None if there is no solution.
    """
    inner = g * g * np.eye(B.shape[1]) - D.T @ D
    try:
        F = A + B @ np.linalg.solve(inner, D.T @ C)
        G = -B @ np.linalg.solve(inner, B.T)
        H = C.T @ (C + D @ np.linalg.solve(inner, D.T @ C))
        H = H + room * np.eye(len(A))
        for _ in range(_DOUBLINGS):  # each doubles the number of steps that are looked ahead
            left = np.linalg.solve(np.eye(len(A)) + G @ H, np.concatenate([F, G], 1))
            step = F.T @ H @ left[:, : len(A)]
            G = G + F @ left[:, len(A) :] @ F.T
            F, H = F @ left[:, : len(A)], H + step
            if not np.isfinite(H).all():
                return None
            if np.abs(step).max() <= 1e-13 * np.abs(H).max():
                return (H + H.T) / 2.0
    except np.linalg.LinAlgError:
        return None
    return None


def _holds(A: Array, B: Array, C: Array, D: Array, P: Array, g: float) -> bool:
    """Return whether the inequality is proved for the number ``g`` and the stored numbers of the others."""
    M = np.concatenate([A, B], 1)
    N = C @ M + np.concatenate([np.zeros((len(C), len(A))), D], 1)
    limit = np.zeros((M.shape[1],) * 2)
    limit[: len(A), : len(A)] = P
    limit[len(A) :, len(A) :] = g * g * np.eye(B.shape[1])
    gap = M.T @ (P @ M) + N.T @ N - limit
    gap = (gap + gap.T) / 2.0
    # each entry is made of nested sums of fewer than `terms` terms; its rounding is below gamma times the sum of moduli, whose
    # Frobenius norm is at most the product of those of the factors
    terms = 3 * (len(A) + len(C) + M.shape[1]) + 16
    sizes = [float(np.linalg.norm(X)) * (1.0 + 1e-9) for X in (M, P, C, D, limit)]
    moduli = sizes[0] ** 2 * sizes[1] + (sizes[2] * sizes[0] + sizes[3]) ** 2 + sizes[4]
    error = 2.0 * gamma(terms) * moduli + 2.0**-500
    scale = float(np.abs(limit).max())
    top = largest_eigenvalues_upper(gap[None] / scale, guess=float(np.linalg.eigvalsh(gap)[-1]) / scale)
    return bool(np.isfinite(top)) and top * scale * (1.0 - 1e-9 if top < 0 else 1.0) + error * (1.0 + 1e-9) <= 0.0
