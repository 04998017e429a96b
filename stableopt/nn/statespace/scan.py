r"""Diagonal complex recurrences over time, in parallel, with real arithmetic only.

The recurrence is linear and does not change with time, so a chunk of :math:`L` steps is one product with the triangular Toeplitz
matrix of the powers :math:`\lambda^0, \dots, \lambda^{L-1}`, and the ends of the chunks obey a recurrence of the same kind with
:math:`\lambda^L`. Its depth is :math:`\log_L T` products, its work :math:`O(LT)` per state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["diagonal_scan", "diagonal_step"]

_CHUNK = 16
"""Steps of one product: of 8, 16, 32 and 64 the fastest on a CPU, forward and backward, from 64 to 1024 steps."""


def diagonal_step(real: Tensor, imag: Tensor, state: Tensor) -> Tensor:
    r"""Return :math:`\lambda \odot h` for a state with the real parts before the imaginary parts.

    Args:
        real: real parts of :math:`\lambda`, of shape ``(n,)``.
        imag: imaginary parts.
        state: :math:`h`, of shape ``(..., 2n)``.

    Examples:
        >>> diagonal_step(torch.zeros(1), torch.ones(1), torch.tensor([3.0, 4.0])).tolist()  # i (3 + 4i)
        [-4.0, 3.0]
    """
    re, im = state.chunk(2, -1)
    return torch.cat([real * re - imag * im, real * im + imag * re], -1)


def diagonal_scan(real: Tensor, imag: Tensor, inputs: Tensor, state: Tensor | None = None) -> Tensor:
    r"""Return all states of :math:`h_t = \lambda \odot h_{t-1} + u_t`.

    Args:
        real: real parts of :math:`\lambda`, of shape ``(n,)``.
        imag: imaginary parts.
        inputs: :math:`u`, of shape ``(2n, batch, time)``, the real parts before the imaginary parts.
        state: :math:`h_{-1}`, of shape ``(2n, batch)``; None for zero.

    Returns:
        The states, of the shape of the inputs.

    Examples:
        >>> half, zero = torch.full((1,), 0.5), torch.zeros(1)
        >>> diagonal_scan(half, zero, torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]))[0]
        tensor([[4., 2., 1.]])
    """
    n, (_, batch, time) = real.shape[0], inputs.shape
    length = min(_CHUNK, time)
    chunks = -(-time // length)
    if chunks * length != time:
        inputs = F.pad(inputs, (0, chunks * length - time))
    powers = _powers(real, imag, length + 1)
    kernel = _kernel(powers[..., :length])  # (n, 2L, 2L)
    u = inputs.reshape(2, n, batch * chunks, length).permute(1, 2, 0, 3).reshape(n, batch * chunks, 2 * length)
    h = torch.bmm(u, kernel)
    before = None if state is None else state.view(2 * n, batch, 1)
    if chunks > 1:
        last = torch.stack([kernel[..., length - 1], kernel[..., 2 * length - 1]], -1)
        ends = torch.bmm(u, last).view(n, batch, chunks, 2).permute(3, 0, 1, 2).reshape(2 * n, batch, chunks)[..., :-1]
        first = ends.new_zeros(2 * n, batch, 1) if before is None else before
        before = torch.cat([first, diagonal_scan(powers[0, :, length], powers[1, :, length], ends, state)], -1)
    if before is not None:
        carried = before.reshape(2, n, batch * chunks).permute(1, 2, 0)  # (n, batch C, 2)
        h = torch.baddbmm(h, carried, _rotations(powers[..., 1:]))
    h = h.view(n, batch, chunks, 2, length).permute(3, 0, 1, 2, 4).reshape(2 * n, batch, chunks * length)
    return h[..., :time]


def _powers(real: Tensor, imag: Tensor, count: int) -> Tensor:
    r"""Return :math:`\lambda^0, \dots, \lambda^{k-1}` of shape ``(2, n, k)``, by doubling."""
    re, im = torch.ones_like(real)[:, None], torch.zeros_like(imag)[:, None]
    a, b = real[:, None], imag[:, None]  # the next power that is missing
    while re.shape[1] < count:
        re, im = torch.cat([re, re * a - im * b], 1), torch.cat([im, re * b + im * a], 1)
        a, b = a * a - b * b, 2.0 * a * b
    return torch.stack([re[:, :count], im[:, :count]])


def _kernel(powers: Tensor) -> Tensor:
    """Return the matrices that map the inputs of a chunk, as rows of real and imaginary parts, to its states."""
    _, n, length = powers.shape
    padded = torch.cat([powers.new_zeros(2, n, length - 1), powers], -1)
    re, im = padded.unfold(-1, length, 1).flip(-2)  # [i, j] is the power j - i, or 0
    return torch.cat([torch.cat([re, im], 2), torch.cat([-im, re], 2)], 1)


def _rotations(powers: Tensor) -> Tensor:
    """Return the matrices that map a state, as a row of its two parts, to what is left of it after each step of a chunk."""
    re, im = powers
    return torch.stack([torch.cat([re, im], -1), torch.cat([-im, re], -1)], 1)
