r"""A normalization of tokens with the constant 1, and the true constants of torch's own for tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import at_least_float32
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.pooling import largest_entry
from stableopt.nn.precision import full_precision
from stableopt.nn.rules.normalization import largest_gain
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["BoundedNorm"]


class BoundedNorm(nn.Module):
    r"""Smooth normalization that only shrinks: large tokens get the size of the radius, small ones stay as they are.

    .. math:: x \mapsto \gamma \odot \frac{x}{\sqrt{1 + \|x\|^2 / (d r^2)}}, \qquad \gamma = \frac{w}{\max(1, \|w\|_\infty)} .

    With :math:`s^2 = 1 + \|x\|^2/(dr^2)` the Jacobian of the fraction is :math:`\frac1s(I - \frac{xx^\top}{dr^2s^2})`, symmetric
    with the eigenvalues :math:`1/s` and, along x, :math:`1/s^3`. So the fraction is the gradient of a convex function and firmly
    nonexpansive, and the constant of the layer is exactly :math:`\|\gamma\|_\infty \le 1` in l2, attained at 0. It is r times
    :class:`torch.nn.RMSNorm` with :math:`\varepsilon = r^2`; with the :math:`\varepsilon = 10^{-5}` of torch RMSNorm and LayerNorm
    have the constant 316.

    Args:
        dim: d, the size of the last dimension.
        radius: :math:`r`, from 1e-6 to 1e6, the root mean square that large tokens get; the norm of an output stays below
            :math:`r\sqrt d`.
        affine: whether w is learned, at first 1; it is capped together, so that no entry loses its gradient for good.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the last dimension has another size.

    Note:
        Unlike RMSNorm it does not lift small tokens: that is what has no good constant. Half precision is computed in float32.

    References:
        Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019; Qi et al., *LipsFormer*, 2023 (the constant of LayerNorm).

    Examples:
        >>> BoundedNorm(2, radius=2.5, affine=False)(torch.tensor([[3.0, 4.0], [300.0, 400.0]])).norm(dim=1).round(
        ...     decimals=2
        ... )
        tensor([2.8900, 3.5400])
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, radius: float = 1.0, *, affine: bool = True) -> None:
        super().__init__()
        check_sizes(dim=dim)
        if not 1e-6 <= radius <= 1e6:
            raise ValueError(f"radius must lie between 1e-6 and 1e6, whose squares float32 holds, got {radius!r}.")
        self.dim, self.radius = dim, float(radius)
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def gain(self) -> Tensor | None:
        r"""Return :math:`\gamma`, whose entries have moduli of at most 1, or None without a learned weight.

        Examples:
            >>> layer = BoundedNorm(2)
            >>> _ = layer.load_state_dict({"weight": torch.tensor([4.0, -2.0])})
            >>> layer.gain().tolist()
            [1.0, -0.5]
        """
        return None if self.weight is None else self.weight / self.weight.abs().amax().clamp_min(1.0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the normalized input; the features are its last dimension."""
        if input.shape[-1:] != (self.dim,):
            raise ValueError(f"BoundedNorm({self.dim}) got an input of shape {tuple(input.shape)}.")
        with full_precision(input):
            x = at_least_float32(input)
            size = largest_entry(x, (-1,)).clamp_min(1.0)  # it cancels; with it no square overflows
            unit = x / size
            spread = unit.square().sum(-1, keepdim=True) / (self.radius**2 * self.dim)
            output = unit / (size.reciprocal().square() + spread).sqrt()  # smooth at 0, where a norm is not
            gain = self.gain()
            return (output if gain is None else output * gain).to(input.dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{self.dim}, radius={self.radius}, affine={self.weight is not None}"


@lipschitz_rule.register(BoundedNorm)
def _bounded_norm(module: BoundedNorm, norm: str) -> Bound:
    r"""Bound it in l2 by its gain; in linf and l1 the rows are those of RMSNorm with :math:`\varepsilon = r^2`, times r."""
    gain = module.gain()
    largest = largest_gain(None if gain is None else gain.detach(), module)
    if norm == "l2":
        return largest  # attained at 0
    return Bound(0.0, (largest * ((Bound.point(module.dim - 1) / 27).sqrt() + 1.0)).upper)


@uniform_rule.register(BoundedNorm)
def _uniform(module: BoundedNorm, norm: str) -> Bound:
    if norm in {"l2", TOKEN_MAX}:
        return Bound(0.0, 1.0)
    return Bound(0.0, ((Bound.point(module.dim - 1) / 27).sqrt() + 1.0).upper)


@token_rule.register(BoundedNorm)
def _token(module: BoundedNorm) -> Bound:
    return _bounded_norm(module, "l2")


@token_rule.register(nn.LayerNorm)
@token_rule.register(nn.RMSNorm)
def _of_one_token(module: nn.LayerNorm | nn.RMSNorm) -> Bound:
    r"""Take the l2 constant :math:`\|\gamma\|_\infty/\sqrt\varepsilon` of one token, if the statistics are those of one."""
    if len(module.normalized_shape) > 1:
        raise UncertifiableError(
            f"{type(module).__name__}({tuple(module.normalized_shape)}) takes its statistics over several tokens, for which no "
            "token_max bound is known; normalize the last dimension alone."
        )
    bound = lipschitz_rule(module, "l2")
    return Bound(0.0, bound.upper, bound.proved)
