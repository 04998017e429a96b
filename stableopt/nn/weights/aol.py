r"""Almost orthogonal weights: every channel is divided by a bound that its inner products with the others give.

Let :math:`G = W^\top W`, and :math:`p = 2^{s-1}` for :math:`s` steps. With

.. math:: t_i = \Bigl(\sum_j \bigl|(G^p)_{ij}\bigr|\Bigr)^{1/(2p)}, \qquad \|W \operatorname{diag}(t)^{-1}\|_2 \le 1 .

*Proof.* For a symmetric matrix :math:`A` the matrix :math:`\operatorname{diag}(\sum_j |A_{ij}|) - A` is diagonally dominant with a
diagonal that is not negative, hence positive semidefinite: :math:`A \preceq \operatorname{diag}(\sum_j |A_{ij}|)`. Take
:math:`A = G^p`. The root :math:`x \mapsto x^{1/p}` keeps this order (Löwner and Heinz: :math:`0 < 1/p \le 1`), and diagonal
matrices have diagonal roots, so :math:`G \preceq \operatorname{diag}(t)^2` and
:math:`\operatorname{diag}(t)^{-1} G \operatorname{diag}(t)^{-1} \preceq I`. A larger :math:`t_i` does no harm. ∎

With one step this is the layer of Prach and Lampert; with more of them :math:`t` tends to the norm :math:`\|W\|_2` in every
coordinate, so the result comes closer and closer to norm 1.

For a convolution the proof is the same with the operator on the whole grid, in place of a matrix: after the reduction to stride 1
of :mod:`stableopt.linalg.conv_geometry`, :math:`G` is the convolution with the self-correlation of the kernel, and a row sum runs
over channels and lags. One number belongs to a channel *and* its phase modulo the stride, because taps of different phases read
different pixels: a stride loses nothing. On the other side, :math:`G = W W^\top` divides the output channels; the side with
fewer channels is taken, where the products can be nearly orthogonal. Zero padding and cropping restrict the operator, and a
padding that copies pixels at most :math:`c` times costs the factor :math:`\sqrt c`.

Rounding: if the computed entries of :math:`G` are off by :math:`\gamma |w_i| |w_j|` at most, the norm is at most
:math:`1 + n\gamma` instead of 1, since :math:`t_i \ge |w_i|`: a slack relative to the radius, as for the other maps.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from stableopt.linalg.conv_geometry import Reduced, conv_axes, reductions
from stableopt.linalg.conv_grid import fold_tensor
from stableopt.linalg.conv_symbol import riesz_factor
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import WeightMap, check_radius, grain, slack
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.isometry import HALF, stored, unit_size

__all__ = ["AlmostOrthogonal"]

_SMALLEST = 1e-4
"""Row sums of a unit size are not below; what is smaller belongs to an original that is zero, or hardly fits its dtype."""
_PRECISION = {torch.float16: 2.0**-14}
"""What is added to the squares, relative to the largest, so that a channel of zeros has a gradient that its dtype can hold."""
_OVERSAMPLING = 8
"""The grid on which :func:`stableopt.linalg.conv_norm` proves the norm of a kernel."""
_INVERSE_STEPS, _DEAR_INVERSE_STEPS = 400, 10
_SETTLED = 1e-13
_LEAST = 1e-6
"""Channels that no products connect are not brought to a common size further than this: each has a size of its own."""


class AlmostOrthogonal(WeightMap):
    r"""Divide every channel by the root of its row sum in the Gram matrix: almost orthogonal layers.

    .. math:: W = r\, V \operatorname{diag}(t)^{-1}, \qquad t_i = \Bigl(\sum_j \bigl|(V^\top V)^p_{ij}\bigr|\Bigr)^{1/(2p)},
        \quad p = 2^{\text{steps} - 1} .

    Of the two sides, columns as here or rows with :math:`VV^\top`, the one with fewer channels is scaled. The norm is at most the
    radius for every original, see the module for the proof; exactly the radius where the channels are orthogonal. Works for
    matrices and for convolutions of every stride, dilation, padding, with groups, transposed or not.

    Args:
        geometry: the operator.
        radius: the limit :math:`r`.
        norm: ``"l2"``.
        steps: 1 for the plain layer; each further step squares the Gram matrix once more, which makes the bound tighter and the
            map dearer: a kernel of :math:`k` taps needs :math:`2^{\text{steps}}(k - 1) + 1` frequencies per axis.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`, or if ``steps`` is no integer from 1 to 6.

    Note:
        The size of the original does not matter, only its direction. A channel of zeros stays one, with a finite gradient.
        ``right_inverse`` finds an original of a weight in reach, for one step those with :math:`|W^\top W|\, q = r^2 q` for a
        positive :math:`q`; of another weight it keeps the direction, for each set of channels that are connected by products.

    References:
        Prach and Lampert, *Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks*, 2022; Delattre,
        Barthélemy and Allauzen, *Spectral Norm of Convolutional Layers with Circular and Zero Paddings*, 2024 (further steps).

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> AlmostOrthogonal(Geometry("linear"))(torch.tensor([[3.0, 0.0], [0.0, -0.1]])).round(decimals=3)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
        >>> W = torch.tensor([[1.0, 1.0, 0.0], [1.0, -0.5, 1.0], [0.5, 1.0, -1.0]])
        >>> norms = [torch.linalg.matrix_norm(AlmostOrthogonal(Geometry("linear"), steps=s)(W), 2) for s in (1, 4)]
        >>> bool(0.8 < norms[0] < norms[1] <= 1.0)
        True
    """

    name: ClassVar[str] = "aol"

    def __init__(self, geometry: Geometry, radius: float = 1.0, norm: str = "l2", *, steps: int = 1) -> None:
        super().__init__(geometry, radius, norm)
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 6:
            raise ValueError(f"steps must be an integer from 1 to 6, got {steps!r}.")
        self.steps = steps

    def forward(self, V: Tensor) -> Tensor:
        """Return the weight with scaled channels."""
        self.geometry.check(V)
        check_radius(self.radius, V.dtype)
        if not V.numel():
            return V
        wide = V.float() if V.dtype in HALF else V
        with full_precision(wide):
            wide = unit_size(wide, V.dtype)
            precision = _PRECISION.get(V.dtype, torch.finfo(wide.dtype).eps)
            lost = slack(wide, wide.dtype) + self.geometry.proof_slack(V)
            lost += grain(wide.dtype, V.numel(), self.radius, self.geometry.spread(V))
            target = self.radius * max(0.0, 1.0 - lost)
            return stored(wide * (target / self.bounds(wide, precision)), V.dtype, self.radius, self.geometry.folded)

    def bounds(self, V: Tensor, precision: float = 0.0) -> Tensor:
        r"""Return the numbers :math:`t_i`, for kernels times a constant factor, in a shape that broadcasts to the weight.

        Args:
            V: the original.
            precision: what is added to the squares of the numbers, relative to the largest.
        """
        rows, axes, factor = self._plan(V)
        return self._spread(_scales(self._channels(V, rows, axes), self.steps, precision) * factor, V, rows, axes)

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return an original: the weight with channels scaled until the map undoes it, at best up to a common factor."""
        if W.is_meta or not W.numel():
            return W
        with torch.no_grad():
            wide = W.detach().double()
            rows, axes, _ = self._plan(wide)
            q = _balance(self._channels(wide, rows, axes), self.steps)
            return (wide * self._spread(q, wide, rows, axes)).to(W.dtype).contiguous()

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{super().extra_repr()}, steps={self.steps}"

    def _plan(self, V: Tensor) -> tuple[bool, tuple[Reduced, ...], float]:
        """Return whether the first axis is scaled, the reduction of the kernel axes to stride 1, and the constant factor."""
        if self.geometry.kind == "linear":
            return V.shape[0] <= V.shape[1], (), 1.0
        options = self.geometry.options(V.ndim - 2)
        keys = ("stride", "dilation", "padding", "padding_mode", "transposed", "output_padding")
        axes, factor = _reduction(tuple(V.shape[2:]), *(options[key] for key in keys))
        return V.shape[0] // self.geometry.groups <= V.shape[1] * math.prod(_phases(V, axes)), axes, factor

    def _channels(self, V: Tensor, rows: bool, axes: tuple[Reduced, ...]) -> Tensor:
        """Return the weight as kernels of stride 1 ``(groups, scaled channels, other channels, *taps)``."""
        if not axes:
            return (V if rows else V.mT)[None]
        taps = [axis.taps(k) for axis, k in zip(axes, V.shape[2:], strict=True)]
        parts = fold_tensor(V, self.geometry.groups, axes)
        return (parts if rows else parts.swapaxes(1, 2)).unflatten(-1, taps)

    def _spread(self, t: Tensor, V: Tensor, rows: bool, axes: tuple[Reduced, ...]) -> Tensor:
        """Return numbers ``(groups, scaled channels)`` in a shape that broadcasts to the weight."""
        if rows:
            return t.reshape(-1, *(1,) * (V.ndim - 1))
        phases = _phases(V, axes)
        t = t.reshape(self.geometry.groups, V.shape[1], *phases)
        for axis, (k, p) in enumerate(zip(V.shape[2:], phases, strict=True)):
            if 1 < p < k:
                t = t.index_select(2 + axis, torch.arange(k, device=t.device) % p)
        return t.repeat_interleave(V.shape[0] // self.geometry.groups, dim=0) if self.geometry.groups > 1 else t


def _phases(V: Tensor, axes: tuple[Reduced, ...]) -> list[int]:
    return [min(axis.stride, k) for axis, k in zip(axes, V.shape[2:], strict=True)]


@torch.compiler.assume_constant_result
def _reduction(*options: Any) -> tuple[tuple[Reduced, ...], float]:
    return _cached_reduction(*options)


@functools.lru_cache(maxsize=1024)
def _cached_reduction(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...] | str,
    padding_mode: str,
    transposed: bool,
    output_padding: tuple[int, ...],
) -> tuple[tuple[Reduced, ...], float]:
    """Return the reduction of a kernel to stride 1, of two the one with fewer copies, and the factor to divide by.

    The factor is the root of the copies and what the proof by :func:`stableopt.linalg.conv_norm` may lose on its grid.

    Examples:
        >>> _cached_reduction((2,), (2,), (1,), (0,), "zeros", False, (0,))
        ((Reduced(stride=2, torus=None, copies=1),), 1.0)
    """
    layer = conv_axes(
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    axes = min(reductions(layer), key=lambda option: math.prod(axis.copies for axis in option))
    taps = [axis.taps(k) for axis, k in zip(axes, kernel, strict=True)]
    lost = riesz_factor(taps, [_OVERSAMPLING * k for k in taps]).upper if any(k > 1 for k in taps) else 1.0
    return axes, math.prod(axis.copies for axis in axes) ** 0.5 * lost


def _scales(M: Tensor, steps: int, precision: float) -> Tensor:
    r"""Return the numbers :math:`t_i` of the channels of ``M``, shape ``(groups, channels)``.

    Args:
        M: kernels of stride 1, ``(groups, channels, others, *taps)``.
        steps: :math:`p = 2^{\text{steps} - 1}`.
        precision: what is added to the squares, relative to the largest.

    Examples:
        >>> _scales(torch.tensor([[[3.0, 4.0], [4.0, -3.0]]]), 1, 0.0)
        tensor([[5., 5.]])
    """
    power, scale = _gram_power(M, steps)
    sums = power.sum(dim=-1).clamp_min(precision**3)  # the derivative of the root is infinite at 0
    return ((sums ** (0.5 ** (steps - 1)) + precision) * scale).sqrt()


def _gram_power(M: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_\ell |(G^p)_{\ell}|` over the lags, up to a factor, and the scale that belongs to its root.

    On a torus of :math:`2p(k - 1) + 1` points per axis the kernel of :math:`G^p`, which has taps from :math:`-p(k-1)` to
    :math:`p(k-1)`, does not meet itself, so Fourier transforms and matrix products give it exactly.

    Args:
        M: kernels of stride 1, ``(groups, channels, others, *taps)``.
        steps: :math:`p = 2^{\text{steps} - 1}`.

    Returns:
        Matrices ``(groups, channels, channels)`` and numbers ``(groups, 1)``: :math:`\sum_\ell |G^p_\ell|` is the matrix times the
        number to the power :math:`p`.

    Examples:
        >>> power, scale = _gram_power(torch.tensor([[[0.0, 2.0]]]), 2)
        >>> (power[0] * scale**2).tolist()
        [[16.0]]
    """
    points = [2**steps * (k - 1) + 1 for k in M.shape[3:]]
    axes = tuple(range(3, M.ndim))
    curved = math.prod(points) > 1
    symbols = torch.fft.rfftn(M, s=points, dim=axes) if curved else M
    frequencies = symbols.shape[3:]
    G = symbols.flatten(3) if frequencies else symbols.unsqueeze(-1)
    G = G.movedim(-1, 1)  # (groups, frequencies, channels, others)
    G = G @ G.mH
    scale = M.new_ones(M.shape[0], 1)
    for step in range(steps):
        G = G @ G if step else G
        # the scale cancels, so no derivative is taken through it; row sums bound the norm, so that nothing overflows
        size = G.detach().abs().sum(dim=-1).amax(dim=(1, 2))
        size = torch.where(size > 0.0, size, 1.0) if step else size.clamp_min(_SMALLEST)
        G = G / size[:, None, None, None]
        scale = scale * size[:, None] ** (0.5**step)
    power = G.movedim(1, -1)
    if curved:
        power = torch.fft.irfftn(power.unflatten(-1, frequencies), s=points, dim=axes).flatten(3)
    return power.abs().sum(dim=-1), scale


def _balance(M: Tensor, steps: int) -> Tensor:
    r"""Return factors :math:`q` of the channels with :math:`t_i(qM) = \lambda q_i`, so that the map gives :math:`M / \lambda`.

    The iteration :math:`q \mapsto t(qM)` is, for one step, a power iteration for the matrix :math:`\sum_\ell |G_\ell|`, damped by a
    geometric mean. It ends when the result of the map no longer changes.

    Args:
        M: kernels of stride 1, ``(groups, channels, others, *taps)``, float64.
        steps: steps of the map.

    Examples:
        >>> q = _balance(torch.tensor([[[1.0, 0.0], [0.5, 0.0]]], dtype=torch.float64), 1)
        >>> (q[0, 1] / q[0, 0]).round(decimals=3)
        tensor(0.5000, dtype=torch.float64)
    """
    q, result = M.new_ones(M.shape[:2]), M.new_zeros(M.shape[:2])
    start = q
    matrix = _gram_power(M, 1)[0] if steps == 1 else None
    for _ in range(_INVERSE_STEPS if matrix is not None else _DEAR_INVERSE_STEPS):
        if matrix is not None:
            t = (q * (matrix @ q.unsqueeze(-1)).squeeze(-1)).sqrt()
        else:
            t = _scales(M * q.reshape(*q.shape, *(1,) * (M.ndim - 2)), steps, 0.0)
        alive = t > 0.0
        before, result = result, torch.where(alive, q / torch.where(alive, t, 1.0), 0.0)
        if bool(((result - before).abs() <= _SETTLED * result).all()):
            break
        start, q = q, torch.where(alive, (t / t.amax(dim=1, keepdim=True)).clamp_min(_LEAST), 1.0)
    return start  # of the two that give the same the one with the narrower range
