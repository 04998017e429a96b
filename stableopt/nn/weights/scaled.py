r"""A weight times a number, and what a layer multiplies with in training, at the cost of a plain layer.

Where :math:`W = sV` is only needed to compute :math:`xW^\top + b`, the factor goes into the matrix products, which scale their
result for free. The scaled matrix, as large as the weight, is neither written nor read, and neither is its gradient:

.. math:: y = b + s\, x V^\top, \qquad
    \nabla_V = s\, g^\top x + k \langle g^\top x, V\rangle\, u v^\top \quad\text{for}\quad ds = k\, u^\top dV\, v .

With :math:`s = t / \sigma` and :math:`\sigma = u^\top V v` for constant :math:`t, u, v` the slope is
:math:`k = -t / \sigma^2 = -s^2 / t`. Where a derivative is itself differentiated,
:math:`s` and :math:`k` are functions of :math:`V` again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stableopt.linalg.conv_grid import Grid, fold_tensor, layer_grids
from stableopt.linalg.conv_power import _ascend  # the step itself, with the vectors that it ends in

__all__ = ["Direction", "Factor", "best_direction", "scaled_kernel", "scaled_linear", "scaled_matrix", "transformed"]


@dataclass(frozen=True, eq=False)
class Factor:
    r"""The number :math:`s` and its derivative :math:`ds = -(s^2 / t)\, u^\top dV\, v`.

    Args:
        scale: :math:`s`.
        target: :math:`t`; None for a number that is constant.
        u: shape of the columns of the matrix.
        v: shape of its rows.

    Examples:
        >>> Factor(0.5, 1.0, torch.ones(1), torch.ones(1)).scale
        0.5
    """

    scale: float
    target: float | None
    u: Tensor
    v: Tensor


def scaled_matrix(V: Tensor, factor: Factor) -> Tensor:
    """Return the matrix times the number.

    Args:
        V: the matrix.
        factor: the number.

    Examples:
        >>> scaled_matrix(torch.full((1, 1), 3.0), Factor(0.5, None, torch.ones(1), torch.ones(1)))
        tensor([[1.5000]])
    """
    return _Product.apply(V, factor.u, factor.v, factor.scale, factor.target)  # pyright: ignore[reportReturnType]


def scaled_linear(x: Tensor, V: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
    """Return the linear map of the scaled matrix, without the matrix.

    Args:
        x: the input, shape ``(..., n)``.
        V: the matrix, shape ``(m, n)``.
        bias: shape ``(m,)``, or None.
        factor: the number.

    Examples:
        >>> factor = Factor(0.5, None, torch.ones(1), torch.ones(1))
        >>> scaled_linear(torch.ones(1, 1), torch.full((1, 1), 3.0), None, factor)
        tensor([[1.5000]])
    """
    return _Linear.apply(x, bias, V, factor.u, factor.v, factor.scale, factor.target)  # pyright: ignore[reportReturnType]


def scaled_kernel(V: Tensor, step: Direction, scale: float, target: float | None) -> Tensor:
    r"""Return a kernel times the number :math:`s = t / \sigma`, with the derivative of :math:`\sigma` from a power step.

    Args:
        V: the kernel.
        step: the power step.
        scale: :math:`s`.
        target: :math:`t`; None for a number that is constant.

    Examples:
        >>> from stableopt.linalg import conv_power_start
        >>> kernel = torch.tensor([[[0.5, 0.5]]])
        >>> step = best_direction(kernel, conv_power_start(kernel, tracks=2), {"groups": 1})
        >>> scaled_kernel(kernel, step, 0.5, None)
        tensor([[[0.2500, 0.2500]]])
    """
    return _Kernel.apply(V, step.left, step.right, scale, target)  # pyright: ignore[reportReturnType]


def transformed() -> bool:
    """Return whether a transform of :mod:`torch.func` or a forward derivative is at work.

    Examples:
        >>> transformed()
        False
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001 torch has no public question


def _in_full_precision(device: str) -> Any:
    """Autocast is switched off: a backward pass may run where the forward map did not."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _recorded() -> bool:
    """Return whether the derivative that is computed now will itself be differentiated."""
    return torch.is_grad_enabled() or transformed()


def _numbers(scale: float, target: float | None, sigma: Tensor) -> tuple[Any, Any]:
    r"""Return :math:`s` and :math:`k` as functions of :math:`\sigma`."""
    return (scale, 0.0) if target is None else (target / sigma, -target / sigma.square())


def _slope(scale: float, target: float | None) -> float:
    """Return the number :math:`k`."""
    return 0.0 if target is None else -scale * scale / target


class _Product(torch.autograd.Function):
    r""":math:`sV`."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, u: Tensor, v: Tensor, scale: float, target: float | None) -> Tensor:
        ctx.save_for_backward(V, u, v)
        ctx.numbers = scale, target
        return (V * scale).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (G,), (V, u, v), (scale, target) = grads, ctx.saved_tensors, ctx.numbers
        with _in_full_precision(V.device.type):
            along = torch.dot(G.reshape(-1), V.reshape(-1))
            if _recorded():
                s, k = _numbers(scale, target, torch.dot(u, V @ v))
                return G * s + torch.outer(u * (along * k), v), None, None, None, None
            return torch.addr(G, u * (along * _slope(scale, target)), v, beta=scale), None, None, None, None


class _Linear(torch.autograd.Function):
    r""":math:`b + s\, x V^\top`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, V: Tensor, u: Tensor, v: Tensor, scale: float, target: float | None
    ) -> Tensor:
        ctx.save_for_backward(x, V, u, v)
        ctx.numbers = scale, target
        rows = x.reshape(-1, V.shape[1])
        y = _scaled_product(rows, V.mT, scale) if b is None else torch.addmm(b, rows, V.mT, alpha=scale)
        return y.view(*x.shape[:-1], V.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, V, u, v), (scale, target) = grads, ctx.saved_tensors, ctx.numbers
        into_x, into_b, into_V = ctx.needs_input_grad[:3]
        g_rows, rows = g.reshape(-1, V.shape[0]), x.reshape(-1, V.shape[1])
        gx = gV = None
        with _in_full_precision(V.device.type):
            gb = g_rows.sum(0) if into_b else None
            if _recorded():
                s, k = _numbers(scale, target, torch.dot(u, V @ v))
                if into_x:
                    gx = (g_rows @ _Product.apply(V, u, v, scale, target)).view(x.shape)
                if into_V:
                    G = g_rows.mT @ rows
                    gV = G * s + torch.outer(u * (torch.dot(G.reshape(-1), V.reshape(-1)) * k), v)
                return gx, gb, gV, None, None, None, None
            if into_x:
                gx = _scaled_product(g_rows, V, scale).view(x.shape)
            if into_V:
                gV = _scaled_product(g_rows.mT, rows, scale)
                along = torch.dot(gV.view(-1), V.reshape(-1))
                gV.addr_(u * (along * (_slope(scale, target) / scale)), v)
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


class _Kernel(torch.autograd.Function):
    r""":math:`sV` for a kernel, where :math:`d\sigma = \langle LR^\top, dV\rangle`, group by group."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, left: Tensor, right: Tensor, scale: float, target: float | None) -> Tensor:
        ctx.save_for_backward(V, left, right)
        ctx.numbers = scale, target
        return (V * scale).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (G,), (V, left, right), (scale, target) = grads, ctx.saved_tensors, ctx.numbers
        with _in_full_precision(V.device.type):
            parts = G.reshape(len(left), left.shape[1], -1)
            along = torch.dot(G.reshape(-1), V.reshape(-1))
            if _recorded():
                sigma = (left * torch.bmm(V.reshape(parts.shape), right)).sum()
                s, k = _numbers(scale, target, sigma)
                return (parts * s + along * k * (left @ right.mT)).view(V.shape), None, None, None, None
            gV = torch.baddbmm(parts, left * (along * _slope(scale, target)), right.mT, beta=scale)
        return gV.view(V.shape), None, None, None, None
