r"""Learnable activations of one variable whose slopes cannot exceed a limit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.activations import at_least_float32, channel_dim
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.precision import full_precision
from stableopt.nn.uniform import uniform_rule

__all__ = ["LinearSpline", "largest_below"]

_SLOPES = {"identity": (1.0, 1.0), "abs": (-1.0, 1.0), "relu": (0.0, 1.0)}
"""The slopes to the left and to the right of 0 at the start, in units of the limit."""


class LinearSpline(nn.Module):
    r"""Piecewise linear function of one variable per channel, with learned slopes inside :math:`[-L, L]`.

    .. math::
        \sigma_c(x) = b_c + \int_0^x s_c(t)\,dt, \qquad
        s_c(t) = \operatorname{clip}(r_{c,k}, -L, L) \text{ for } t_{k-1} < t < t_k .

    The knots :math:`t_0 < \dots < t_{K-1}` are uniform on :math:`[-R, R]` with 0 among them; the first and the last piece go on to
    infinity. The function is continuous with slopes :math:`s_{c,k}`, so its Lipschitz constant is exactly
    :math:`\max_{c,k}|s_{c,k}| \le L` in l2, linf and l1, for all values of the parameters :math:`r` and :math:`b`.

    Args:
        channels: number of channels, each with its own function.
        knots: odd number :math:`K \ge 3` of knots, so that 0 is one; there are :math:`K + 1` pieces.
        span: :math:`R > 0`, in units of the input.
        limit: :math:`L > 0`, the largest slope.
        init: the function at the start, times the limit: ``"abs"``, ``"identity"`` or ``"relu"``.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the input has another number of channels.

    Note:
        The gradient with respect to a raw slope at or beyond the limit is the one of projected descent: 0 if a step against it
        would go further out, and unchanged if it would come back. So no slope gets stuck, which plain clipping allows. Half
        precision is computed in float32 and rounded at the end; the limit is rounded down to the dtype of the slopes. The values at
        the knots are sums of at most K products, so neighboring pieces meet up to rounding.

    References:
        Ducotterd et al., *Improving Lipschitz-Constrained Neural Networks by Learning Activation Functions*, 2024, section 3.

    Examples:
        >>> spline = LinearSpline(1, knots=3, span=1.0)
        >>> _ = nn.init.constant_(spline.slopes, 5.0)  # clipped to 1
        >>> spline(torch.tensor([[-4.0], [0.5]])).flatten().tolist()
        [-4.0, 0.5]
    """

    def __init__(
        self, channels: int, *, knots: int = 21, span: float = 3.0, limit: float = 1.0, init: str = "abs"
    ) -> None:
        super().__init__()
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise ValueError(f"channels must be an integer >= 1, got {channels!r}.")
        if not isinstance(knots, int) or isinstance(knots, bool) or knots < 3 or knots % 2 == 0:
            raise ValueError(f"knots must be an odd integer >= 3, got {knots!r}.")
        for name, value in (("span", span), ("limit", limit)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}.")
        if init not in _SLOPES:
            raise ValueError(f"init must be one of {', '.join(_SLOPES)}, got {init!r}.")
        self.knots, self.span, self.limit, self.init = knots, float(span), float(limit), init
        self.slopes = nn.Parameter(torch.empty(channels, knots + 1))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the slopes to those of ``init`` and the values at 0 to 0."""
        left, right = _SLOPES[self.init]
        half = (self.knots + 1) // 2
        with torch.no_grad():
            self.slopes[:, :half].fill_(left * self.limit)
            self.slopes[:, half:].fill_(right * self.limit)
            self.bias.zero_()

    def limited_slopes(self) -> Tensor:
        """Return the slopes in force, shape ``(channels, knots + 1)``, from left to right.

        Examples:
            >>> LinearSpline(1, knots=3, init="relu").limited_slopes().tolist()
            [[0.0, 0.0, 1.0, 1.0]]
        """
        slopes = at_least_float32(self.slopes)
        limit = largest_below(
            self.limit, slopes.dtype
        )  # clamp() would round the limit to the nearest number, perhaps up
        if torch.compiler.is_compiling():  # dynamo traces no custom jvp
            return _InwardClip.apply(slopes, limit)  # pyright: ignore[reportReturnType] torch types apply as Any
        return _InwardClipWithTangents.apply(slopes, limit)  # pyright: ignore[reportReturnType]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the function of each entry."""
        channels, pieces = self.slopes.shape
        dim = channel_dim(input, channels, "LinearSpline")
        with full_precision(input):
            s = self.limited_slopes()
            x = input.to(s.dtype)
            h = 2 * self.span / (self.knots - 1)
            values = torch.cat([torch.zeros_like(s[:, :1]), (h * s[:, 1:-1]).cumsum(1)], 1)
            values = values - values[:, self.knots // 2, None] + self.bias.to(s.dtype)[:, None]  # the middle knot is 0
            # piece k lies to the left of knot k and starts from knot k - 1; the first one starts from knot 0
            piece = ((x + self.span) / h).floor().nan_to_num(nan=0.0).clamp(-1, pieces - 2).long() + 1
            start = (piece - 1).clamp_min(0)
            offset = torch.arange(channels, device=x.device).reshape(-1, *[1] * (x.ndim - dim - 1))
            slope = s.flatten()[piece + offset * pieces]
            value = values.flatten()[start + offset * self.knots]
            return (value + slope * (x - (start.to(x.dtype) * h - self.span))).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{len(self.bias)}, knots={self.knots}, span={self.span}, limit={self.limit}"


def largest_below(limit: float, dtype: torch.dtype) -> float:
    """Return the largest number of a dtype that is at most a positive limit.

    Examples:
        >>> largest_below(0.1, torch.float64), largest_below(0.1, torch.float32)
        (0.1, 0.09999999403953552)
    """
    kind = torch.finfo(dtype)
    spacing = kind.eps * 2.0 ** (math.frexp(limit)[1] - 1)  # of the numbers around the limit, or of the subnormal ones
    spacing = max(spacing, kind.tiny * kind.eps)
    return min(kind.max, math.floor(limit / spacing) * spacing)


class _InwardClip(torch.autograd.Function):
    """Clip to [-limit, limit] with the gradient of projected descent: it never points further out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clamp(-limit, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.limit = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        outward = ((x >= ctx.limit) & (grad < 0)) | ((x <= -ctx.limit) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None


class _InwardClipWithTangents(_InwardClip):
    """The same with forward-mode derivatives, those of clipping."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.limit = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangents[0].masked_fill(x.abs() > ctx.limit, 0.0)


@lipschitz_rule.register(LinearSpline)
def _linear_spline(module: LinearSpline, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    if not (bool(module.slopes.isfinite().all()) and bool(module.bias.isfinite().all())):
        raise ValueError("no bound holds for a LinearSpline with NaN or infinite parameters.")
    return Bound.point(float(module.limited_slopes().detach().double().abs().max()))


@uniform_rule.register(LinearSpline)
def _linear_spline_uniform(module: LinearSpline, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound(0.0, module.limit)
