r"""A matrix times a number, without the matrix: what a layer multiplies with in training, at the cost of a plain layer.

Where :math:`W = sV` is only needed to compute :math:`xW^\top + b`, the factor goes into the matrix products, which scale their
result for free. The scaled matrix, as large as the weight, is neither written nor read, and neither is its gradient:

.. math:: y = b + s\, x V^\top, \qquad
    \nabla_V = s\, g^\top x + k \langle g^\top x, V\rangle\, u v^\top \quad\text{for}\quad ds = k\, u^\top dV\, v .
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from stableopt.linalg.conv_grid import Grid, fold_tensor, layer_grids
from stableopt.linalg.conv_power import _ascend  # the step itself, with the vectors that it ends in
from stableopt.nn.parametrized import _ComputedWeight  # the refusal of writes that would be lost

__all__ = ["Direction", "Factors", "Scaled", "ScaledKernel", "best_direction", "transformed"]


@dataclass(frozen=True, eq=False)
class Factors:
    r"""A matrix :math:`V`, a number :math:`s`, and the derivative :math:`ds = k\, u^\top dV\, v` of that number.

    Args:
        V: the matrix.
        u: shape of its columns.
        v: shape of its rows.
        scale: :math:`s`.
        slope: :math:`k`.

    Examples:
        >>> e = torch.ones(1)
        >>> Factors(torch.full((1, 1), 3.0), e, e, 0.5, 0.0).product()
        tensor([[1.5000]])
    """

    V: Tensor
    u: Tensor
    v: Tensor
    scale: float
    slope: float

    def product(self) -> Tensor:
        """Return the scaled matrix."""
        return _Product.apply(self.V, self.u, self.v, self.scale, self.slope)  # pyright: ignore[reportReturnType]


class Scaled(Tensor):
    """A scaled matrix that comes into being when anything but :func:`torch.nn.functional.linear` asks for its numbers.

    Until then it has no memory. Writing into it is refused, as the result of a parametrization it would be lost.

    Args:
        factors: what it is the product of.

    Examples:
        >>> e = torch.ones(1)
        >>> W = Scaled(Factors(torch.full((1, 1), 3.0), e, e, 0.5, 0.0))
        >>> F.linear(torch.ones(1), W), W + 0.0
        (tensor([1.5000]), tensor([[1.5000]]))
    """

    _factors: Factors
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, factors: Factors) -> Scaled:  # noqa: D102, PYI034 the type of Tensor.__new__ is not generic
        V = factors.V
        make: Any = Tensor._make_wrapper_subclass  # noqa: SLF001 the constructor for tensors without memory
        self = make(cls, V.shape, dtype=V.dtype, device=V.device)
        self._factors, self._dense = factors, None
        return self

    @classmethod
    def __torch_function__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply without the matrix where that is the same, else make the matrix."""
        kwargs = dict(kwargs or {})
        if func is F.linear and len(args) >= 2:
            x, W, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
            if type(W) is cls and W._waiting() and _fits(x, W) and (bias is None or _fits(bias, W)):  # noqa: SLF001
                f = W._factors  # noqa: SLF001
                return _Linear.apply(x, bias, f.V, f.u, f.v, f.scale, f.slope)
        arguments: Any = tree_map_only(cls, _computed, (args, kwargs))
        return func(*arguments[0], **arguments[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what went around ``__torch_function__``, where the gradient would be lost.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{func} got a weight that is not computed yet, under disabled torch functions; pass weight.clone()."
        )

    def _waiting(self) -> bool:
        return object.__getattribute__(self, "_dense") is None


def _computed(W: Scaled) -> Tensor:
    """Return the matrix, always the same one."""
    if W._waiting():  # noqa: SLF001
        W._dense = W._factors.product().as_subclass(_ComputedWeight)  # noqa: SLF001
    return W._dense  # noqa: SLF001  # pyright: ignore[reportReturnType]


def _fits(x: Any, W: Scaled) -> bool:
    V = W._factors.V  # noqa: SLF001
    return (
        isinstance(x, Tensor)
        and type(x) in _PLAIN
        and x.dtype == V.dtype
        and x.device == V.device
        and x.layout == torch.strided
        and x.ndim >= 1
        and not torch.is_autocast_enabled(V.device.type)
        and not transformed()
    )


_PLAIN = {Tensor, torch.nn.Parameter}


def transformed() -> bool:
    """Return whether a transform of :mod:`torch.func` is at work.

    Examples:
        >>> transformed()
        False
    """
    return torch._C._are_functorch_transforms_active()  # noqa: SLF001 torch has no public question


class _Product(torch.autograd.Function):
    r""":math:`sV`."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, u: Tensor, v: Tensor, scale: float, slope: float) -> Tensor:
        ctx.save_for_backward(V, u, v)
        ctx.numbers = scale, slope
        return V * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (G,), (V, u, v), (scale, slope) = grads, ctx.saved_tensors, ctx.numbers
        if torch.is_grad_enabled() or transformed():  # this derivative will be differentiated
            along = torch.dot(G.reshape(-1), V.reshape(-1))
            return G * scale + torch.outer(u * (along * slope), v), None, None, None, None
        along = float(torch.dot(G.reshape(-1), V.reshape(-1)))
        return torch.addr(G, u, v, beta=scale, alpha=along * slope), None, None, None, None


class _Linear(torch.autograd.Function):
    r""":math:`b + s\, x V^\top`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, V: Tensor, u: Tensor, v: Tensor, scale: float, slope: float
    ) -> Tensor:
        ctx.save_for_backward(x, V, u, v)
        ctx.numbers, ctx.biased = (scale, slope), b is not None
        rows = x.reshape(-1, V.shape[1])
        y = _scaled_product(rows, V.mT, scale) if b is None else torch.addmm(b, rows, V.mT, alpha=scale)
        return y.view(*x.shape[:-1], V.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, V, u, v), (scale, slope) = grads, ctx.saved_tensors, ctx.numbers
        into_x, into_b, into_V = ctx.needs_input_grad[:3]
        g_rows, rows = g.reshape(-1, V.shape[0]), x.reshape(-1, V.shape[1])
        gb = g_rows.sum(0) if into_b else None
        gx = gV = None
        if torch.is_grad_enabled() or transformed():  # this derivative will be differentiated
            W = _Product.apply(V, u, v, scale, slope)
            gx = (g_rows @ W).view(x.shape) if into_x else None
            if into_V:
                G = g_rows.mT @ rows
                gV = G * scale + torch.outer(u * (torch.dot(G.reshape(-1), V.reshape(-1)) * slope), v)
            return gx, gb, gV, None, None, None, None
        if into_x:
            gx = _scaled_product(g_rows, V, scale).view(x.shape)
        if into_V:
            gV = _scaled_product(g_rows.mT, rows, scale)
            along = float(torch.dot(gV.view(-1), V.reshape(-1))) / scale
            gV.addr_(u, v, alpha=along * slope)
        return gx, gb, gV, None, None, None, None


def _scaled_product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return torch.addmm(A.new_zeros(1), A, B, beta=0, alpha=scale)


# -------------------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True, eq=False)
class Direction:
    r"""A power step for a kernel: :math:`\sigma` and its derivative :math:`d\sigma = \langle LR^\top, dV\rangle`, group by group.

    Args:
        norm: the estimate.
        left: :math:`L`, shape ``(groups, out / groups, 2)``; zero for all groups but the one with the largest norm.
        right: :math:`R`, shape ``(groups, entries of the kernel per output, 2)``.
        vectors: the vectors for the next step.
    """

    norm: float
    left: Tensor
    right: Tensor
    vectors: Tensor


def best_direction(V: Tensor, vectors: Tensor, options: dict[str, Any]) -> Direction:
    """Make the step of :func:`stableopt.linalg.conv_power_step` with free vectors, without recording it.

    Args:
        V: the kernel, float32 or wider.
        vectors: from the step before.
        options: geometry of the layer, as :func:`stableopt.linalg.conv_norm` takes it.

    Examples:
        >>> from stableopt.linalg import conv_power_start
        >>> kernel = torch.tensor([[[0.5, 0.5]]])
        >>> step = best_direction(kernel, conv_power_start(kernel, tracks=2), {"groups": 1})
        >>> bool(1.0 <= step.norm < 1.05)
        True
    """
    groups = options["groups"]
    geometry: Any = {key: value for key, value in options.items() if key != "groups"}
    grid = layer_grids(V, groups, None, **geometry)[0]
    kernel = fold_tensor(V, groups, grid.axes)  # (groups, out, channels, taps)
    left, right, vectors = _ascend(kernel, vectors.to(V.dtype), grid, free=True)
    reach = (left * torch.bmm(kernel.flatten(2), right)).sum((1, 2))
    left = left * grid.factor
    if groups == 1:
        norm = float(reach)
    else:
        best = int(reach.argmax())
        norm = float(reach[best])
        left = left * (torch.arange(groups, device=V.device) == best)[:, None, None]
    return Direction(norm * grid.factor, left, _unfolded(right, V, grid), vectors)


def _unfolded(right: Tensor, V: Tensor, grid: Grid) -> Tensor:
    """Rearrange what stands beside a folded kernel to stand beside the kernel; the adjoint of :func:`fold_tensor`."""
    if all(min(axis.stride, k) == 1 for axis, k in zip(grid.axes, V.shape[2:], strict=True)):
        return right
    groups = len(right)
    where = torch.arange(1, V[0].numel() + 1, device=V.device).view(1, *V.shape[1:])
    place = fold_tensor(where, 1, grid.axes).flatten()  # 0 where the folded kernel is padded
    kept = place.nonzero().squeeze(-1)
    result = right.new_empty(groups, V[0].numel(), 2)
    result[:, place[kept] - 1] = right[:, kept]
    return result


class ScaledKernel(torch.autograd.Function):
    r""":math:`sV` for a kernel, where :math:`ds = k \langle LR^\top, dV\rangle`."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, left: Tensor, right: Tensor, scale: float, slope: float) -> Tensor:
        """Return the scaled kernel."""
        ctx.save_for_backward(V, left, right)
        ctx.numbers = scale, slope
        return (V * scale).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the derivative with respect to the kernel."""
        (G,), (V, left, right), (scale, slope) = grads, ctx.saved_tensors, ctx.numbers
        parts = G.reshape(len(left), left.shape[1], -1)
        if torch.is_grad_enabled() or transformed():  # this derivative will be differentiated
            along = (G * V).sum()
            return (parts * scale + along * slope * (left @ right.mT)).view(V.shape), None, None, None, None
        along = float(torch.dot(G.reshape(-1), V.reshape(-1)))
        return (
            torch.baddbmm(parts, left, right.mT, beta=scale, alpha=along * slope).view(V.shape),
            None,
            None,
            None,
            None,
        )
