r"""The gradient block for signals, images and volumes: a convolution and its exact adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.residual.gradient_step import GradientStep, gradient_step_factor
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.weights.geometry import Geometry

__all__ = ["ConvGradientBlock"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MODES = ("zeros", "circular")


class ConvGradientBlock(GradientStep):
    r"""Convolutional residual block that takes a gradient step on a convex function, hence never expands, whatever the image size.

    .. math::
        x \mapsto x - \tau\,\bigl(m x + A^\top \sigma(A x + b)\bigr), \qquad
        \tau = \operatorname{sigmoid}(r)\, \frac{2}{2m + U^2}, \quad U \ge \|A\|_2,

    where :math:`A` is the convolution with stride 1 and :math:`A^\top` its exact adjoint: the transposed convolution with the same
    kernel, padding, dilation and groups, and in a circular world the one that wraps around. The Jacobian is then symmetric with
    spectrum in :math:`[1 - \tau m - \tau\|A\|_2^2,\; 1 - \tau m]`, and the Lipschitz constant in l2 is at most
    :math:`1 - \tau m \le 1` for all parameters and all images. A second convolution in the place of the adjoint, or the adjoint
    of another padding, is no gradient, and the block could expand; so there is one kernel and one padding.

    ``bound="rows"`` gives each hidden channel a step of its own, from row sums of the self-correlation of the kernel over
    channels and lags; see :class:`stableopt.nn.GradientBlock` for the formula and :mod:`stableopt.nn.residual.per_unit` for the
    proof, which holds for images of any size too.

    Args:
        channels: channels of input and output.
        hidden: channels of :math:`Ax`; None for ``channels``.
        kernel_size: taps, one number or one per axis.
        dims: number of axes behind the channels: 1, 2 or 3.
        dilation: distance of the taps, one number or one per axis.
        groups: number of groups; divides ``channels`` and ``hidden``.
        padding: pixels on either side, one number or one per axis; ``"same"`` for as many as keep the size of the hidden image.
            The size of the output is that of the input in any case.
        padding_mode: ``"zeros"``, or ``"circular"`` with ``padding="same"``.
        depth: number of blocks in the stack, for the initial step; see :class:`stableopt.nn.GradientBlock`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        strong: :math:`m \ge 0`.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.
        bound: how :math:`U` is computed, whatever the size of the image. ``"gram"``: the symbol on a grid of frequencies, at most
            5 % above its supremum for 64 channels; ``"schur"``: from the sums of absolute values, hardly any cost;
            ``"frobenius"``: the root of the number of taps times the Frobenius norm of the kernel; ``"rows"``: a step per channel.
        limit_gradient: False takes the limit of the step as a constant in the backward pass.

    Raises:
        ValueError: if an argument is out of range, the size cannot be kept evenly, the padding is wider than the kernel reaches, or
            the activation has slopes outside [0, 1]; in ``forward``, if the input has other channels or axes.

    Note:
        In linf and l1 the constant is above 1 in general; the rule bounds it for every image. A circular padding needs an image at
        least as large as the padding. No certificate file describes it yet: its proof is :func:`stableopt.nn.lipschitz`.

    References:
        Meunier, Delattre, Araujo and Allauzen, *A Dynamical System Perspective for Lipschitz Neural Networks*, 2022 (the layer);
        Prach and Lampert, *Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks*, 2022 (row sums of kernels).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = ConvGradientBlock(2, 4, kernel_size=3)
        >>> x, y = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
        >>> bool((block(x) - block(y)).norm() <= (x - y).norm()), lipschitz_rule(block, "l2").upper
        (True, 1.0)
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        kernel_size: int | tuple[int, ...] = 3,
        *,
        dims: int = 2,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        padding: int | tuple[int, ...] | str = "same",
        padding_mode: str = "zeros",
        depth: int = 1,
        activation: str = "relu",
        strong: float = 0.0,
        step: float | None = None,
        bound: str = "gram",
        limit_gradient: bool = True,
    ) -> None:
        hidden = channels if hidden is None else hidden
        check_sizes(channels=channels, hidden=hidden, dims=dims, groups=groups)
        if dims not in _CONV:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}.")
        if channels % groups or hidden % groups:
            raise ValueError(f"groups must divide channels and hidden, got {groups}, {channels} and {hidden}.")
        if padding_mode not in _MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_MODES)}, got {padding_mode!r}.")
        taps, spacing = _axes("kernel_size", kernel_size, dims), _axes("dilation", dilation, dims)
        width = _padding(padding, [d * (k - 1) for d, k in zip(spacing, taps, strict=True)])
        if padding_mode == "circular" and padding != "same":
            raise ValueError(f"circular padding keeps the size of the image: use padding='same', got {padding!r}.")
        super().__init__(
            torch.empty(hidden, channels // groups, *taps),
            Geometry("conv", dilation=spacing, groups=groups, padding=width, padding_mode=padding_mode),
            depth=depth,
            activation=activation,
            strong=strong,
            step=step,
            bound=bound,
            limit_gradient=limit_gradient,
        )
        self.channels, self.dims, self.padding = channels, dims, width

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state, of shape ``(*, channels, *image)``."""
        if input.ndim not in {self.dims + 1, self.dims + 2} or input.shape[-self.dims - 1] != self.channels:
            image = ", ".join(("length", "height, width", "depth, height, width")[self.dims - 1 : self.dims])
            raise ValueError(
                f"this ConvGradientBlock needs an input of shape (batch, {self.channels}, {image}), got {tuple(input.shape)}."
            )
        return super().forward(input)

    def _linear(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        circular = self.geometry.padding_mode == "circular"
        image, padding = (self._wrapped(input), 0) if circular else (input, self.padding)
        return _CONV[self.dims](image, self.weight, self.bias, padding=padding, **self._options())

    def _adjoint(self, hidden: Tensor) -> Tensor:
        padding = self.padding
        if self.geometry.padding_mode == "circular":  # what hangs over on one side belongs to the other
            hidden, padding = self._wrapped(hidden), tuple(2 * p for p in padding)
        return _TRANSPOSED[self.dims](hidden, self.weight, None, padding=padding, **self._options())

    def _wrapped(self, image: Tensor) -> Tensor:
        return F.pad(image, [side for width in reversed(self.padding) for side in (width, width)], mode="circular")

    def _options(self) -> dict[str, Any]:
        return {"dilation": self.geometry.dilation, "groups": self.geometry.groups}

    def _per_unit(self, steps: Tensor) -> Tensor:
        return steps.view(-1, *[1] * self.dims)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        g = self.geometry
        shape = f"{self.channels}, {len(self.weight)}, kernel_size={tuple(self.weight.shape[2:])}, dims={self.dims}"
        spatial = f"dilation={g.dilation}, groups={g.groups}, padding={self.padding}, padding_mode={g.padding_mode!r}"
        return f"{shape}, {spatial}, {self._settings()}"


def _axes(name: str, value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * dims
    if len(values) != dims:
        raise ValueError(f"{name} needs one number or {dims}, one per axis, got {value!r}.")
    for v in values:
        check_sizes(**{name: v})
    return values


def _padding(padding: int | tuple[int, ...] | str, spans: list[int]) -> tuple[int, ...]:
    """Return the pixels per side, checked."""
    if padding == "same":
        if any(span % 2 for span in spans):
            raise ValueError(
                "padding='same' needs an even dilation * (kernel_size - 1), so that both sides get the same number of pixels; "
                f"got {spans}. Use an odd kernel_size, or padding=0."
            )
        return tuple(span // 2 for span in spans)
    widths: tuple[Any, ...] = tuple(padding) if isinstance(padding, tuple | list) else (padding,) * len(spans)
    fits = len(widths) == len(spans) and all(type(w) is int and 0 <= w <= s for w, s in zip(widths, spans, strict=True))
    if not fits:
        raise ValueError(
            f"padding must be 'same' or an integer per axis from 0 to dilation * (kernel_size - 1), here {spans}, got {padding!r}; "
            "both sides and the adjoint have the same."
        )
    return widths


@lipschitz_rule.register(ConvGradientBlock)
def _conv_gradient_block(module: ConvGradientBlock, norm: str) -> Bound:
    return gradient_step_factor(module, norm)


@uniform_rule.register(ConvGradientBlock)
def _uniform(module: ConvGradientBlock, norm: str) -> Bound | None:  # noqa: ARG001 true for every strength
    return Bound(0.0, 1.0) if norm == "l2" else None
