r"""A weight map whose result is one plain convolution kernel that keeps norms: a product of orthogonal factors, multiplied out.

What holds, for every image size. Write :math:`T` for the operator of the kernel on the whole grid, :math:`r` for the radius.

* **Always:** the norm of the layer is at most :math:`r`, whatever the padding that is accepted.
* **Circular padding as wide as the kernel reaches** (``padding_mode="circular"`` with ``2 * padding == dilation * (kernel - 1)``):
  the layer is :math:`T` on a torus, so it keeps norms if the kernel ``is_isometry``, and its adjoint does if it
  ``is_co_isometry``. Narrower circular padding leaves outputs out, which keeps only the second.
* **Zero padding** restricts :math:`T`: the border loses energy, so a layer with ``padding="same"`` has norm at most :math:`r` and
  is no isometry. Without any padding the outputs are whole rows of :math:`T`: a co-isometry stays one. With
  ``padding = dilation * (kernel - 1)`` all of the image's outputs are seen: with stride 1 an isometry stays one.
* **A transposed convolution** is the adjoint, so the two words change places; the kernel's are meant as if it were not transposed.

Circular padding and a stride: where the stride does not divide the image, some pixels are read once more than on the grid. The
kernel is therefore built as for stride 1, which limits it for every size; ``divides=True`` is the promise that the stride divides
every image, and then the kernel is built for the stride.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.linalg.conv_geometry import Reduced
from stableopt.linalg.conv_grid import block_matrices, fold_tensor
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import WeightMap, check_radius, grain
from stableopt.nn.weights.conv_factors import Factors, factorize, orthonormal_rows, product
from stableopt.nn.weights.conv_layout import Layout
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.isometry import HALF, stored

__all__ = ["OrthogonalConv"]


class OrthogonalConv(WeightMap):
    r"""Map free matrices to an orthogonal convolution kernel: a product of elementary orthogonal convolutions.

    .. math:: \hat W(\omega) = r\, H \prod_{\text{axes } i} \prod_j \bigl((I - Z_{ij}) + e^{i\omega_i} Z_{ij}\bigr),
        \qquad HH^\top = I, \quad Z_{ij} \text{ a projector on half of the channels.}

    The product is multiplied out, so the layer runs, and exports, one plain kernel. With a stride (and any dilation) the same
    product is formed after the polyphase reduction; phases that lack a tap get it from no factor. No power iteration, no state, no
    fixed image size.

    * ``is_co_isometry``: the operator's adjoint keeps norms, all singular values are the radius. It holds when a group has no more
      outputs than inputs times phases read.
    * ``is_isometry``: the operator keeps norms. It holds when a group has no fewer outputs than inputs times phases, and every
      pixel is read (``kernel >= stride``, and dilation and stride have no common divisor).

    These speak of the whole grid and of the torus; see the module for zero padding, which only keeps the norm at most the radius.

    Args:
        geometry: the layer.
        radius: the norm :math:`r > 0`.
        norm: ``"l2"``.
        shape: shape of the kernel; learned from the first kernel, which registering does, when absent.
        divides: with circular padding and a stride: whether the stride divides the size of every image, per axis. If it is set
            and does not hold, the norm may exceed the radius; a proof needs the ``image_size``.
        sweeps: effort of ``right_inverse`` for kernels that are not orthogonal.

    Raises:
        ValueError: if the geometry is no convolution or the norm another. Once the shape is known (here, or when registering): if
            the padding repeats pixels, or a group has one input and one output channel, whose orthogonal kernels are single taps.

    Note:
        The original is one matrix of shape ``layout.shape``: H, then bases of the ranges of the projectors; their scales do not
        matter. Its shape is not that of the kernel. If one of these loses rank (or is zero) the norm of the kernel stays at most
        the radius, but it is no isometry then. The rank of the projectors is fixed to one half, so the set of reachable
        kernels is connected but not every orthogonal kernel is in it; ``right_inverse`` finds one near.

    References:
        Vaidyanathan, *Multirate Systems and Filter Banks*, 1993, chapter 14 (factorization of paraunitary matrices); Li et al.,
        *Preventing Gradient Attenuation in Lipschitz Constrained Convolutional Networks*, 2019 (block convolutions, BCOP); Su,
        Byeon and Huang, *Scaling-up Diverse Orthogonal Convolutional Networks by a Paraunitary Framework*, 2022; Boissin et al.,
        *An Adaptive Orthogonal Convolution Scheme*, 2025.

    Examples:
        >>> import torch.nn.utils.parametrize as P
        >>> layer = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = P.register_parametrization(layer, "weight", OrthogonalConv(Geometry.of(layer)))
        >>> x = torch.randn(1, 4, 6, 6)
        >>> bool((layer(x).norm() / x.norm() - 1).abs() < 1e-4)
        True
    """

    name: ClassVar[str] = "bcop"
    factorized: ClassVar[bool] = True

    def __init__(
        self,
        geometry: Geometry,
        radius: float = 1.0,
        norm: str = "l2",
        *,
        shape: tuple[int, ...] | None = None,
        divides: bool = False,
        sweeps: int = 3,
    ) -> None:
        super().__init__(geometry, radius, norm)
        if geometry.kind == "linear":
            raise ValueError(
                "the method 'bcop' makes orthogonal kernels of convolutions; for a matrix use 'bro', 'cayley' or 'cholesky'."
            )
        if not isinstance(sweeps, int) or isinstance(sweeps, bool) or sweeps < 0:
            raise ValueError(f"sweeps must be an integer >= 0, got {sweeps!r}.")
        self.divides, self.sweeps = bool(divides), sweeps
        self._layout: Layout | None = None
        if shape is not None:
            self._arrange(tuple(shape))

    @property
    def layout(self) -> Layout:
        """How the kernel is arranged.

        Raises:
            RuntimeError: if the shape is not known yet.
        """
        if self._layout is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know the shape of its kernel yet: register it as a parametrization, call "
                "right_inverse first, or pass shape=."
            )
        return self._layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        layout = self.layout
        return (layout.groups * layout.out, layout.channels, *layout.kernel)

    @property
    def is_isometry(self) -> bool:
        """Whether the kernel keeps every norm, times the radius (of a transposed convolution: whether its adjoint does)."""
        return self.layout.stride == (self.geometry.stride or self.layout.stride) and self.layout.is_isometry

    @property
    def is_co_isometry(self) -> bool:
        """Whether the adjoint of the kernel keeps every norm, times the radius (of a transposed one: the operator does)."""
        return self.layout.is_co_isometry

    def forward(self, V: Tensor) -> Tensor:
        """Return the kernel of the original."""
        layout = self.layout
        check_radius(self.radius, V.dtype)
        wide = V.float() if V.dtype in HALF else V
        with full_precision(wide):
            H, free, bound = layout.split(wide)
            bases = [orthonormal_rows(part) for part in bound]
            middle = None if free is None else orthonormal_rows(free)
            factors = Factors(
                orthonormal_rows(H, passes=2),
                None if middle is None else _free(layout, middle),
                tuple(Q.mT @ Q for Q in bases),
            )
            kernel = layout.unfold(product(layout, factors))
            limit = self._limit(V, factors.H, bases if middle is None else [middle, *bases])
            return stored(kernel * limit, V.dtype, self.radius, self._folded)

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return an original of ``W``, or of an orthogonal kernel near its direction (a local best approximation).

        Raises:
            TypeError: if ``W`` is not real and floating.
            ValueError: if its shape has no orthogonal kernel here, is not the known one, or an entry is NaN or infinite.
        """
        if not W.is_floating_point():
            raise TypeError(f"{type(self).__name__} needs a real floating kernel, got dtype {W.dtype}.")
        self._arrange(tuple(W.shape))
        if W.is_meta:
            return W.new_empty(self.layout.shape)
        if not bool(W.isfinite().all()):
            raise ValueError(
                f"no orthogonal kernel is near one of shape {tuple(W.shape)} with NaN or infinite entries."
            )
        factors = factorize(self.layout, W.detach().double(), self.sweeps)
        return self.layout.join(_originals(self.layout, factors)).to(W.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        known = "" if self._layout is None else f", shape={self.shape}"
        return f"{super().extra_repr()}{known}{', divides=True' if self.divides else ''}"

    def _arrange(self, shape: tuple[int, ...]) -> None:
        """Learn or check the shape of the kernel."""
        geometry, dims = self.geometry, len(shape) - 2
        if not 1 <= dims <= 3 or any(n < 1 for n in shape):
            raise ValueError(
                f"a convolution kernel has 3 to 5 non-empty dimensions (out, in, *kernel), got shape {shape}."
            )
        if shape[0] % geometry.groups:
            raise ValueError(
                f"groups={geometry.groups} must divide the first dimension of the kernel, got shape {shape}."
            )
        stride, dilation = geometry.stride or (1,) * dims, geometry.dilation or (1,) * dims
        used = _stride_to_use(geometry, shape[2:], stride, dilation, divides=self.divides)
        layout = Layout(geometry.groups, shape[0] // geometry.groups, shape[1], shape[2:], used, dilation)
        if layout.out == layout.inner == 1:
            raise ValueError(
                f"a kernel of shape {shape} with {geometry.groups} groups has one input and one output channel per group: its "
                "orthogonal kernels are single taps of size 1, nothing is left to train; use the method 'gram'."
            )
        if self._layout is not None and self._layout != layout:
            raise ValueError(f"the kernel has shape {self.shape}, got one of shape {shape}.")
        self._layout = layout

    def _folded(self, W: Tensor) -> tuple[Tensor, float]:
        """Return matrices for :func:`stableopt.nn.weights.isometry.stored`, by the reduction that the kernel is built for."""
        axes = [Reduced(phases, None, 1) for phases in self.layout.phases]
        return block_matrices(fold_tensor(W, self.layout.groups, axes), self.layout.taps)

    @torch.no_grad()
    def _limit(self, V: Tensor, H: Tensor, bases: list[Tensor]) -> Tensor:
        r"""Return the norm to aim at: the radius less the rounding of the map and of the proof.

        The norm of a product of :math:`(I - Z) + zZ` with :math:`0 \preceq Z \preceq I` is at most 1, but where an original is
        so nearly singular that :math:`Z` is no projector, its proof is not as tight: the self-correlation has other lags than 0,
        of the size of :math:`\|Z - Z^2\|` times the number of pairs of taps, or the grid loses its factor. The same goes for
        :math:`\|I - HH^\top\|` where channels exist only inside of the product.
        """
        layout, dtype = self.layout, H.dtype
        eps = torch.finfo(dtype).eps
        small = min(layout.rows, layout.out)
        terms, lags = layout.columns * math.prod(layout.taps), math.prod([2 * t - 1 for t in layout.taps])
        slack = (17.5 + 8.0 * math.sqrt(layout.columns)) * eps
        slack += grain(dtype, math.prod(self.shape), self.radius, math.sqrt(math.prod(layout.taps)))
        proof = 2.0**-42 * math.sqrt(terms)  # what the cosines of a grid may be off
        limit = self.radius * max(0.0, 1.0 - slack - proof - 2.0**-53 * small * terms * lags)
        noise = 5.0 * eps * math.sqrt(layout.columns)
        slip = (V * 0.0).sum()  # what is no number anywhere, be it in an entry without a use, makes the kernel none
        for Q in bases:
            P = Q @ Q.mT
            slip = slip + (torch.linalg.matrix_norm(P - P @ P) - noise).clamp_min(0.0).sum()
        if not (layout.swapped or layout.is_co_isometry):
            eye = torch.eye(H.shape[1], dtype=dtype, device=H.device)
            slip = slip + (torch.linalg.matrix_norm(eye - H @ H.mT) - noise).clamp_min(0.0).sum()
        return limit / (1.0 + (2.0 * lags * slip).clamp_max(layout.grid_factor - 1.0))


def _complements(layout: Layout) -> list[bool]:
    """Return which free Z are complements: every other one of an axis, where half of the channels is no integer."""
    return [layout.columns % 2 == 1 and j % 2 == 1 for length in layout.lengths for j in range(length)]


def _free(layout: Layout, Q: Tensor) -> Tensor:
    """Return the free Z, projectors on about half of the channels, as ``(groups, number, columns, columns)``."""
    P = (Q.mT @ Q).unflatten(0, (layout.groups, -1))
    if layout.columns % 2 == 0:
        return P
    eye = torch.eye(layout.columns, dtype=P.dtype, device=P.device)
    pairs = zip(P.unbind(1), _complements(layout), strict=True)
    return torch.stack([eye - Z if complement else Z for Z, complement in pairs], dim=1)


def _originals(layout: Layout, factors: Factors) -> list[Tensor]:
    """Return the matrices whose row spaces are the ranges of the projectors."""
    parts, rank = [factors.H], layout.rank
    if factors.free is not None:
        vectors = torch.linalg.eigh(factors.free)[1].mT  # rows, first those of the eigenvalue 0
        halves = [
            vectors[:, j, :rank] if complement else vectors[:, j, layout.columns - rank :]
            for j, complement in enumerate(_complements(layout))
        ]
        parts.append(torch.stack(halves, dim=1))
    return parts + [torch.linalg.eigh(Z)[1][..., Z.shape[-1] - Z.shape[-1] // 2 :].mT for Z in factors.bound]


def _stride_to_use(
    geometry: Geometry, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], *, divides: bool
) -> tuple[int, ...]:
    """Return the stride to build the kernel for, per axis.

    Raises:
        ValueError: if the padding repeats pixels or outputs.

    Examples:
        >>> around = Geometry("conv", (2,), padding=(1,), padding_mode="circular")
        >>> [_stride_to_use(around, (3,), (2,), (1,), divides=divides) for divides in (False, True)]
        [(1,), (2,)]
    """
    mode, padding = geometry.padding_mode, geometry.padding
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if geometry.kind == "conv_transpose" or mode == "zeros" or padding in ("valid", ()):
        return stride
    total = reach if padding == "same" else [2 * int(p) for p in padding]
    if mode != "circular" and any(total):
        raise ValueError(
            f"padding_mode={mode!r} shows copies of pixels to the kernel, so no kernel with more than one tap is orthogonal; "
            "use padding_mode='circular' or 'zeros', or the method 'gram'."
        )
    if any(t > r for t, r in zip(total, reach, strict=True)):
        raise ValueError(
            f"circular padding of {total} pixels in total, more than dilation * (kernel - 1) = {reach}, computes some outputs "
            "twice, so no kernel is orthogonal; use less padding or the method 'gram'."
        )
    return tuple(1 if t and not divides else s for t, s in zip(total, stride, strict=True))
