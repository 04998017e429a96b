r"""The cheapest orthogonal weight map: a block reflector of low rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import WeightMap
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.isometry import HALF, check_matrix, newton_schulz, normal_factor, reduced, stored, unit_size

__all__ = ["BlockReflector"]


class BlockReflector(WeightMap):
    r"""The reflection at a subspace, cropped to the shape of the weight.

    .. math:: W = r\,\bigl[I - 2 V (V^\top V)^{-1} V^\top\bigr]_{m \times n}, \qquad
              V \in \mathbb R^{N \times k}, \; N = \max(m, n) .

    It is the identity with the signs of :math:`k` directions, those of the columns of :math:`V`, reversed: orthogonal and
    symmetric. It is computed as :math:`I - 2ZZ^\top`, with :math:`Z` the columns of :math:`V` made orthonormal. For *any* matrix
    with :math:`\|Z\|_2 \le 1` the eigenvalues of :math:`I - 2ZZ^\top` are :math:`1 - 2\sigma_i(Z)^2 \in [-1, 1]`, so the norm is
    at most 1 whatever the rounding in the Cholesky factor was, since a Newton-Schulz step has the last word on :math:`Z` (see
    :mod:`stableopt.nn.weights.orthogonal`). Taking rows or columns away leaves those that remain orthonormal.

    Args:
        geometry: of kind ``"linear"``.
        radius: the limit.
        norm: ``"l2"``.
        rank: :math:`k`, at least 1; a number of columns (more than :math:`N` count as :math:`N`), or, if it is a float
            in (0, 1), a fraction of :math:`N`. None for one that costs less than the layer itself at a batch of 256: the smaller of
            :math:`N/16` and :math:`\min(m, n)/8`, but at least 16 (never above :math:`N/2`).
        shape: shape of the weight. Otherwise it is that of the first weight that ``right_inverse`` sees, which is where
            registering the map as a parametrization starts.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`; for a convolution; or if the rank or the shape is out of range.

    Note:
        The original is :math:`V`, of shape :math:`(N, k)`. A low rank is cheap, and it is a limit on what the layer
        can be: the identity (cropped) plus a matrix of rank :math:`k`. ``right_inverse`` returns a member near a given weight,
        exactly for members; a general orthogonal weight is *not* one, so use this map from the start of a training, not to
        limit a trained layer. Stack two layers to reach more.

    References:
        Schreiber and Parlett, *Block Reflectors: Theory and Computation*, 1988; Lai, Wang and Chang, *Enhancing Certified
        Robustness via Block Reflector Orthogonal Layers and Logit Annealing Loss*, 2025.

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> W = BlockReflector(Geometry("linear"), shape=(2, 2), rank=1)(torch.tensor([[3.0], [4.0]]))
        >>> W.round(decimals=2)
        tensor([[ 0.2800, -0.9600],
                [-0.9600, -0.2800]])
    """

    name: ClassVar[str] = "bro"
    factorized: ClassVar[bool] = True

    def __init__(
        self,
        geometry: Geometry,
        radius: float = 1.0,
        norm: str = "l2",
        *,
        rank: float | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(geometry, radius, norm)
        if geometry.kind != "linear":
            raise ValueError(
                f"the method 'bro' makes matrices, and the geometry is of kind {geometry.kind!r}: a kernel that is orthogonal "
                "as a matrix has another norm as a convolution. Use an orthogonal convolution."
            )
        if rank is not None and not _is_rank(rank):
            raise ValueError(f"rank must be an integer >= 1 or a fraction in (0, 1), got {rank!r}.")
        if shape is not None and not (len(shape) == 2 and all(isinstance(n, int) and n >= 0 for n in shape)):
            raise ValueError(f"shape must be two integers >= 0, got {shape!r}.")
        self.rank = rank
        self.shape = None if shape is None else (int(shape[0]), int(shape[1]))

    def columns(self, shape: tuple[int, int]) -> int:
        """Return the number of columns of the original of a weight of this shape.

        Examples:
            >>> from stableopt.nn.weights import Geometry
            >>> BlockReflector(Geometry("linear")).columns((64, 128))
            16
        """
        N = max(shape)
        if self.rank is None:
            return max(1, min(N // 2, max(16, min(N // 16, min(shape) // 8))))
        return max(1, round(self.rank * N)) if isinstance(self.rank, float) else max(1, min(self.rank, N))

    def forward(self, V: Tensor) -> Tensor:
        """Return the weight.

        Args:
            V: the original, of shape ``(max(m, n), rank)``.

        Raises:
            RuntimeError: if the shape of the weight is not known yet.
            ValueError: if the original does not fit it.
        """
        check_matrix(V, self)
        if self.shape is None:
            raise RuntimeError(
                "BlockReflector does not know the shape of its weight yet: register it as a parametrization, call right_inverse "
                "first, or pass shape=."
            )
        if V.shape[0] != max(self.shape) or not 1 <= V.shape[1] <= max(1, V.shape[0]):
            raise ValueError(
                f"the original of a weight of shape {self.shape} has {max(self.shape)} rows and at most as many columns, got shape "
                f"{tuple(V.shape)}."
            )
        m, n = self.shape
        if not m * n:
            return V.new_zeros(m, n) + 0.0 * V.sum()
        wide = V.float() if V.dtype in HALF else V
        with full_precision(wide):
            Z = newton_schulz(normal_factor(unit_size(wide, V.dtype)), 1)
            r = reduced(self.radius, (m, n), wide.dtype)
            eye = torch.eye(m, n, dtype=wide.dtype, device=wide.device)
            return stored(torch.addmm(eye, Z[:m], Z[:n].mT, beta=r, alpha=-2.0 * r), V.dtype, self.radius)

    def right_inverse(self, W: Tensor) -> Tensor:
        r"""Return an original of a member near ``W``: of ``W`` itself if it is one (times the radius, or any factor).

        With :math:`W = [W_1\; W_2]`, :math:`W_1` square, a member has :math:`\tfrac12(I - W_1) = Z_1Z_1^\top` and
        :math:`-\tfrac12W_2 = Z_1Z_2^\top`: the leading eigenpairs of the first give :math:`Z_1`, the second then :math:`Z_2`.

        Args:
            W: the weight to come near to; its shape is the one of the results from now on.

        Raises:
            TypeError: if it is not real and floating.
            ValueError: if it is no matrix, has another shape than before, or holds NaN or infinity.
        """
        check_matrix(W, self)
        shape = (int(W.shape[0]), int(W.shape[1]))
        if self.shape is not None and shape != self.shape:
            raise ValueError(f"the weight has shape {self.shape}, got one of shape {shape}.")
        k = self.columns(shape)
        if not W.is_meta and not bool(W.isfinite().all()):
            raise ValueError(f"no reflector is near a matrix of shape {shape} with NaN or infinite entries.")
        self.shape = shape
        if W.is_meta or not W.numel():
            return W.new_zeros(max(shape), k)
        wide = (W if shape[0] <= shape[1] else W.mT).detach().double()
        return _nearest(wide / torch.linalg.matrix_norm(wide, 2).clamp_min(1e-300), k).to(W.dtype).contiguous()

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{super().extra_repr()}, rank={self.rank}, shape={self.shape}"


def _nearest(W: Tensor, k: int) -> Tensor:
    """Return the original for a wide matrix of norm 1 in float64; see :meth:`BlockReflector.right_inverse`."""
    m, n = W.shape
    difference = (torch.eye(m, n, dtype=W.dtype, device=W.device) - W) / 2.0
    values, vectors = torch.linalg.eigh((difference[:, :m] + difference[:, :m].mT) / 2.0)
    lead, spare = min(k, m), n - m
    values, vectors = values.flip(0)[:lead].clamp_min(0.0), vectors.flip(1)[:, :lead]
    V = torch.zeros(n, k, dtype=W.dtype, device=W.device)
    V[:m, :lead] = vectors * values.sqrt()
    V[m:, :lead] = difference[:, m:].mT @ vectors * torch.where(values > 1e-14, values.clamp_min(1e-14).rsqrt(), 0.0)
    # what a column lacks in length lies in what is cropped, at right angles to all others, while there is room
    room = torch.eye(spare, k, dtype=W.dtype, device=W.device)
    fill = torch.linalg.qr(torch.cat([V[m:, :lead], room], dim=1)).Q[:, lead : lead + k]
    missing = (1.0 - V[:, : fill.shape[1]].square().sum(dim=0)).clamp_min(0.0)
    V[m:, : fill.shape[1]] += fill * torch.where(missing > 1e-12, missing.sqrt(), 0.0)
    lengths = torch.linalg.vector_norm(V, dim=0)
    V[:m] += torch.where(lengths < 1e-6, vectors[:, torch.arange(k, device=W.device) % lead], 0.0)
    return V / torch.linalg.vector_norm(V, dim=0)


def _is_rank(rank: object) -> bool:
    if isinstance(rank, bool):
        return False
    return (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0.0 < rank < 1.0)
