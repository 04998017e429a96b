r"""The sandwich layer: two matrices around an activation, whose common norm is limited instead of each one's."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, frobenius_norm, inf_norm, spectral_norm
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import check_forward, lipschitz_rule
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.orthogonal import Bjorck, Cayley, Cholesky, Isometry

__all__ = ["FoldedSandwich", "Sandwich"]

_MAPS: dict[str, type[Isometry]] = {method.name: method for method in (Cayley, Cholesky, Bjorck)}
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "softplus": functools.partial(nn.Softplus, threshold=40.0),
    "hardtanh": nn.Hardtanh,
}
"""The modules that compute the activations of :mod:`stableopt.nn.unit_slopes`, with their settings."""


class Sandwich(nn.Module):
    r"""Sandwich layer, with a Lipschitz constant of at most the radius for every value of its parameters.

    .. math:: x \mapsto \sqrt2\, A^\top \Psi\, \sigma(\sqrt2\, \Psi^{-1} B x + b), \qquad
              \|[A\; B]\|_2^2 \le \text{radius}, \quad \Psi \text{ diagonal}, \; \Psi > 0 .

    **Proof.** The difference of two outputs is :math:`2A^\top D B(x - y)` with a diagonal :math:`0 \preceq D \preceq I` of slopes
    (:math:`\Psi` commutes with it). For unit vectors :math:`p, q` with :math:`a = Ap`, :math:`b = Bq`,

    .. math:: 2a^\top D b = \tfrac12 (a + b)^\top D (a + b) - \tfrac12 (a - b)^\top D (a - b) \le \tfrac12\|a + b\|^2
        = \tfrac12 \bigl\|[A\; B]\tbinom pq\bigr\|^2 \le \|[A\; B]\|_2^2 .

    A stack of such layers reaches every network that the semidefinite bound LipSDP (one multiplier per neuron) proves
    to be 1-Lipschitz, where a limit on each single matrix reaches only some.

    Args:
        in_features: features of the input.
        out_features: features of the output, and hidden units.
        bias: whether there is a :math:`b`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``: slopes in [0, 1].
        radius: the limit of the Lipschitz constant.
        method: how :math:`[A\; B]` is kept orthonormal: ``"cayley"``, ``"cholesky"`` or ``"bjorck"``.

    Raises:
        ValueError: if a size is no positive integer, the activation has slopes outside [0, 1], the method is unknown, or the
            radius is not positive and finite.

    Attributes:
        weight: the original of :math:`[A\; B]`, of shape ``(out_features, out_features + in_features)``.
        raw_psi: :math:`\Psi = e^{15\tanh(\text{raw}/15)}`.

    Note:
        The numbers :math:`A, B` and the scales :math:`\sqrt2\Psi`, :math:`\sqrt2\Psi^{-1}` are rounded so that the bound holds for
        them; :func:`stableopt.nn.lipschitz` proves it. The weight is computed in every forward pass, in evaluation too: use
        :meth:`folded` for two plain linear layers.

    References:
        Wang and Manchester, *Direct Parameterization of Lipschitz-Bounded Deep Networks*, 2023.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer = Sandwich(4, 8)
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((layer(x) - layer(y)).norm() <= (x - y).norm())
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "relu",
        radius: float = 1.0,
        method: str = "cayley",
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        check_unit_slopes(activation, "Sandwich")
        if method not in _MAPS:
            raise ValueError(f"method must be one of {', '.join(_MAPS)}, got {method!r}.")
        if (
            isinstance(radius, bool)
            or not isinstance(radius, int | float)
            or not (math.isfinite(radius) and radius > 0)
        ):
            raise ValueError(f"radius must be positive and finite, got {radius!r}.")
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        self.radius = float(radius)
        self.method = method
        self._frame = _MAPS[method](Geometry("linear"), _root(self.radius))
        self.weight = nn.Parameter(torch.empty(out_features, out_features + in_features))
        self.raw_psi = nn.Parameter(torch.empty(out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a frame with orthonormal rows, a bias as :class:`torch.nn.Linear` does, and set the scales to 1."""
        nn.init.orthogonal_(self.weight)
        with torch.no_grad():
            self.weight.copy_(self._frame.right_inverse(self.weight))
        nn.init.zeros_(self.raw_psi)
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def frame(self) -> tuple[Tensor, Tensor]:
        r"""Return the matrices :math:`A` and :math:`B` that ``forward`` uses, :math:`\|[A\; B]\|_2^2 \le` radius.

        Examples:
            >>> A, B = Sandwich(3, 2).frame()
            >>> A.shape, B.shape
            (torch.Size([2, 2]), torch.Size([2, 3]))
        """
        A, B = self._frame(self.weight).split([self.out_features, self.in_features], dim=1)
        return A, B

    def scales(self) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\sqrt2\Psi` and :math:`\sqrt2\Psi^{-1}` as ``forward`` uses them; their products are at most 2.

        Examples:
            >>> before, after = Sandwich(3, 2).scales()
            >>> bool((before.double() * after.double() <= 2.0).all())
            True
        """
        dtype = self.raw_psi.dtype
        wide = self.raw_psi.float() if dtype in {torch.float16, torch.bfloat16} else self.raw_psi
        with full_precision(wide):
            psi = bounded_exp(
                wide, 5.0 if dtype == torch.float16 else 15.0
            )  # so that the scales and their inverses fit
            eps = torch.finfo(dtype).eps + 4.0 * torch.finfo(wide.dtype).eps
            return ((math.sqrt(2.0) * (1.0 - eps)) * psi).to(dtype), ((math.sqrt(2.0) * (1.0 - eps)) / psi).to(dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the output; the features are the last dimension of the input."""
        A, B = self.frame()
        outer, inner = self.scales()
        hidden = inner * F.linear(input, B)
        if self.bias is not None:
            hidden = hidden + self.bias
        return F.linear(outer * UNIT_SLOPES[self.activation](hidden), A.mT)

    def folded(self) -> FoldedSandwich:
        """Return the layer as plain linear maps around the activation, proved for their own rounded numbers.

        Returns:
            A sequential module with the names ``0.weight``, ``0.bias`` and ``2.weight``.

        Raises:
            ValueError: if a parameter is NaN or infinite.

        Examples:
            >>> list(Sandwich(3, 2).folded().state_dict())
            ['0.weight', '0.bias', '2.weight']
        """
        with torch.no_grad():
            A, B = (part.double() for part in self.frame())
            outer, inner = (part.double() for part in self.scales())
            return FoldedSandwich.of(outer[:, None] * A, inner[:, None] * B, (outer / inner).sqrt(), self).train(
                self.training
            )

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, activation={self.activation!r}, "
            f"radius={self.radius}"
        )


class FoldedSandwich(nn.Sequential):
    r"""Two plain linear layers around an activation, with the scales by which their bound as a sandwich is proved.

    The weights are :math:`W_0 = \sqrt2\Psi^{-1}B` and :math:`W_2 = \sqrt2A^\top\Psi`. For any positive scales :math:`\psi`,
    :math:`L \le \tfrac12\|[\psi^{-1}W_2^\top \;\; \psi W_0]\|_2^2` (by the proof of :class:`Sandwich` with these as :math:`\sqrt2A,
    \sqrt2B`); a product of two norms would lose up to a factor of 2.

    Args:
        first: the linear layer before the activation.
        activation: the activation, slopes in [0, 1].
        last: the linear layer behind it.
        scales: one positive number per hidden unit, which only the proof uses.

    Examples:
        >>> from stableopt.nn import lipschitz
        >>> lipschitz(Sandwich(3, 2).folded()).upper <= 1.0
        True
    """

    def __init__(self, first: nn.Linear, activation: nn.Module, last: nn.Linear, scales: list[float]) -> None:
        super().__init__(first, activation, last)
        self.scales = tuple(scales)

    def __getitem__(self, idx: slice | int) -> Any:
        """Return a part, or several as a plain Sequential: the scales are about all three together."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))  # pyright: ignore[reportArgumentType]
        return super().__getitem__(idx)

    @classmethod
    def of(cls, outer: Tensor, inner: Tensor, scales: Tensor, layer: Sandwich) -> FoldedSandwich:
        """Return the folded layer: both weights rounded to the dtype of the layer, shrunk until the bound is proved.

        Args:
            outer: the weight of the last layer, transposed, in float64.
            inner: the weight of the first.
            scales: the numbers for the proof.
            layer: where bias, activation, radius and dtype come from.

        Raises:
            ValueError: if a number is NaN or infinite.
        """
        numbers = [outer, inner, scales] if layer.bias is None else [outer, inner, scales, layer.bias]
        if not all(bool(n.isfinite().all()) for n in numbers):
            raise ValueError("a sandwich layer with NaN or infinite parameters cannot be folded.")
        dtype, device = layer.weight.dtype, layer.weight.device
        first = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype, device=device)
        last = nn.Linear(layer.out_features, layer.out_features, bias=False, dtype=dtype, device=device)
        if layer.bias is not None:
            first.bias.copy_(layer.bias)
        folded = cls(first, _MODULES[layer.activation](), last, scales.tolist())
        margin = 0.0
        while True:  # ends at weights of zero at the latest
            first.weight.copy_((1.0 - margin) * inner)
            last.weight.copy_((1.0 - margin) * outer.mT)
            if _folded_bound(folded).upper <= layer.radius:
                return folded
            margin = min(1.0, max(2.0 * margin, torch.finfo(dtype).eps / 8.0, 2.0**-48))


def _root(radius: float) -> float:
    """Return the largest float whose square is at most the radius."""
    return Bound.point(radius).sqrt().lower


def _scaled(rows: Tensor, scales: Tensor) -> tuple[Tensor, Bound]:
    """Return rows times scales in float64, and a bound of what that rounds in the norm."""
    product = scales[:, None] * rows.detach().double().cpu()
    return product, Bound(0.0, 2.0**-52) * frobenius_norm(product).upper + Bound(0.0, 1e-300)


def _check_parts(module: FoldedSandwich) -> tuple[nn.Linear, nn.Linear]:
    """Refuse a folded layer whose parts are no longer those that the proof is about."""
    if len(module) != 3:
        raise UncertifiableError(f"a FoldedSandwich has three parts, got {len(module)}; put other layers beside it.")
    first, activation, last = module
    if type(first) is not nn.Linear or type(last) is not nn.Linear:
        raise UncertifiableError(
            "a FoldedSandwich has a Linear as its first and as its last part; fold the layer again."
        )
    if not _slopes_within_one(activation):
        raise UncertifiableError(
            f"the activation of a FoldedSandwich needs slopes in [0, 1], got {activation}; fold the layer again."
        )
    for part in module:
        check_forward(part, type(part))
    return first, last


def _slopes_within_one(activation: nn.Module) -> bool:
    if type(activation) is nn.LeakyReLU:
        return 0.0 <= activation.negative_slope <= 1.0
    if type(activation) is nn.Softplus:
        return 0 < activation.beta < math.inf and activation.threshold >= 20
    return type(activation) in {nn.ReLU, nn.Tanh, nn.Hardtanh}


def _folded_bound(module: FoldedSandwich) -> Bound:
    first, last = _check_parts(module)
    if not all(bool(p.isfinite().all()) for p in module.parameters()):
        raise ValueError("no bound holds for a folded sandwich layer with NaN or infinite parameters.")
    psi = torch.tensor(module.scales, dtype=torch.float64)
    inner, rounding = _scaled(first.weight, psi)
    outer, more = _scaled(
        last.weight.mT, 1.0 / psi
    )  # exact for the rounded reciprocal, which is within 1 ulp of 1 / psi
    both = Bound.point(spectral_norm(torch.cat([outer, inner], dim=1)).upper) + rounding + more * 2.0
    return Bound(0.0, (both**2 / 2.0).upper)


@lipschitz_rule.register(Sandwich)
def _sandwich(module: Sandwich, norm: str) -> Bound:
    A, B = module.frame()
    outer, inner = (part.detach().double().cpu() for part in module.scales())
    numbers = [outer, inner] if module.bias is None else [outer, inner, module.bias]
    if not all(bool(n.isfinite().all()) for n in numbers):
        raise ValueError("no bound holds for a sandwich layer with NaN or infinite parameters.")
    products = [Bound.point(float(o)) * float(i) for o, i in zip(outer, inner, strict=True)]
    slope = max(p.upper for p in products)  # the diagonal between the two matrices
    if norm == "l2":
        return Bound(0.0, (spectral_norm(torch.cat([A, B], dim=1)) ** 2 * max(1.0, slope / 2.0)).upper)
    left, right = (A.mT, B) if norm == "linf" else (A, B.mT)
    return Bound(0.0, (inf_norm(left) * inf_norm(right) * slope).upper)


@lipschitz_rule.register(FoldedSandwich)
def _folded_sandwich(module: FoldedSandwich, norm: str) -> Bound:
    if norm == "l2":
        return _folded_bound(module)
    first, last = (part.weight if norm == "linf" else part.weight.mT for part in _check_parts(module))
    return Bound(0.0, (inf_norm(first) * inf_norm(last)).upper)
