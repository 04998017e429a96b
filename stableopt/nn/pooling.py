r"""Pooling over disjoint windows that wastes nothing of a Lipschitz limit, and downsampling without loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import at_least_float32
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.precision import full_precision

__all__ = ["InvertibleDownsampling", "L2NormPool", "ScaledAvgPool", "largest_entry"]


_BELOW_ONE = 1.0 - 2.0**-52
"""A rounded root times this is at most the root: (1 + u)(1 - 2u)(1 + u) < 1 with the unit roundoff u of both roundings."""


class _WindowPool(nn.Module):
    """Cut an image into disjoint windows; a subclass reduces each to one number."""

    def __init__(self, kernel_size: int | tuple[int, ...] | None, dims: int = 2) -> None:
        super().__init__()
        self.kernel_size, self.dims = _window(kernel_size, dims), dims

    def windows(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # noqa: A002 the name torch uses
        """Return the input with one dimension per axis of the windows split off, and which dimensions those are."""
        sizes = _spatial(input, self.dims, type(self).__name__)
        if self.kernel_size is None:
            return input, tuple(range(-self.dims, 0))
        if any(size < k for size, k in zip(sizes, self.kernel_size, strict=True)):
            raise ValueError(
                f"{type(self).__name__} needs an image of at least {self.kernel_size} pixels, got shape {tuple(input.shape)}."
            )
        return _split(input, self.kernel_size), tuple(range(-2 * self.dims + 1, 0, 2))

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"kernel_size={self.kernel_size}, dims={self.dims}"


class ScaledAvgPool(_WindowPool):
    r"""Average over disjoint windows, scaled so that a constant window keeps its norm.

    .. math:: y_w = \frac{1}{\sqrt k} \sum_{i \in w} x_i = \sqrt k\; \operatorname{mean}_{i \in w} x_i

    with :math:`k` pixels in a window. The rows of this matrix are orthonormal: the l2 constant is exactly 1, where the plain
    average has :math:`1/\sqrt k` and loses that factor at every pooling. In linf the constant is :math:`\sqrt k` (a constant
    image), in l1 it is :math:`1/\sqrt k` (every column).

    Args:
        kernel_size: pixels of a window, per axis or for all; windows do not overlap. None for one window over the whole
            image, whose axes then go away.
        dims: number :math:`d` of spatial axes, 1, 2 or 3.

    Raises:
        ValueError: if a size is no integer of at least 1 or ``dims`` is not 1, 2 or 3; in ``forward``, if the input has fewer than
            ``dims + 1`` dimensions or an image is smaller than a window.

    Note:
        Input ``(..., C, *spatial)``. Rows and columns left over at the end are dropped, as torch does. The factor is rounded down.

    References:
        Serrurier et al., *Achieving Robustness in Classification Using Optimal Transport with Hinge Regularization*, 2021, the
        appendix on layers.

    Examples:
        >>> ScaledAvgPool(2)(torch.ones(1, 1, 2, 4)).flatten().tolist()
        [2.0, 2.0]
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the scaled average of each window."""
        windows, dims = self.windows(input)
        if self.kernel_size is not None:
            return windows.mean(dims) * root_down(math.prod(self.kernel_size))
        pixels = 1
        for dim in dims:
            pixels = pixels * windows.shape[dim]
        return windows.mean(dims) * (
            math.sqrt(pixels) * _BELOW_ONE
        )  # a size may be symbolic here, so no test for squares


class L2NormPool(_WindowPool):
    r"""Euclidean norm of each of disjoint windows.

    .. math:: y_w = \Bigl(\sum_{i \in w} x_i^2\Bigr)^{1/2}

    It keeps the l2 norm of the image. By the reverse triangle inequality in every window the l2 constant is exactly 1 (moving
    along a ray attains it), and so is the l1 constant, as :math:`\|v\|_2 \le \|v\|_1`. In linf it is :math:`\sqrt k` with
    :math:`k` pixels in a window, as :math:`\|v\|_2 \le \sqrt k\,\|v\|_\infty`, attained at a constant window.

    Args:
        kernel_size: pixels of a window, per axis or for all; windows do not overlap. None for one window over the whole
            image, whose axes then go away.
        dims: number :math:`d` of spatial axes, 1, 2 or 3.

    Raises:
        ValueError: if a size is no integer of at least 1 or ``dims`` is not 1, 2 or 3; in ``forward``, if the input has fewer than
            ``dims + 1`` dimensions or an image is smaller than a window.

    Note:
        Input ``(..., C, *spatial)``. Rows and columns left over at the end are dropped, as torch does. The gradient at a window of
        zeros is 0. Half precision is computed in float32.

    References:
        Boureau, Ponce and LeCun, *A Theoretical Analysis of Feature Pooling in Visual Recognition*, 2010 (the pooling).

    Examples:
        >>> L2NormPool(2, dims=1)(torch.tensor([[3.0, 4.0, 0.0, -2.0]])).tolist()
        [[5.0, 2.0]]
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the norm of each window."""
        windows, dims = self.windows(input)
        with full_precision(input):
            wide = at_least_float32(windows)
            size = largest_entry(wide, dims)  # so that no square over- or underflows
            return (torch.linalg.vector_norm(wide / size, dim=dims) * size.squeeze(dims)).to(input.dtype)


class InvertibleDownsampling(nn.Module):
    r"""Move each block of pixels into channels, and back: a permutation of the entries.

    .. math:: y_{c k_1 k_2 + i k_2 + j,\; p,\; q} = x_{c,\; p k_1 + i,\; q k_2 + j}

    A permutation keeps every norm: the constant is exactly 1 in l2, linf and l1, both ways. For square blocks in two dimensions it
    is :class:`torch.nn.PixelUnshuffle`.

    Args:
        block: pixels of a block, per axis or for all.
        dims: number of spatial axes, 1, 2 or 3.

    Raises:
        ValueError: if a size is no integer of at least 1 or ``dims`` is not 1, 2 or 3; in ``forward``, if the image cannot be cut
            into blocks; in ``inverse``, if the channels are not a multiple of the pixels of a block.

    References:
        Shi et al., *Real-Time Single Image and Video Super-Resolution*, 2016 (the inverse map).

    Examples:
        >>> down = InvertibleDownsampling(2)
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> down(x).shape, torch.equal(down.inverse(down(x)), x)
        (torch.Size([1, 4, 2, 2]), True)
    """

    def __init__(self, block: int | tuple[int, ...] = 2, dims: int = 2) -> None:
        super().__init__()
        sizes = _window(block, dims)
        if sizes is None:
            raise ValueError("InvertibleDownsampling needs the size of a block, got None.")
        self.block, self.dims = sizes, dims

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the input of shape ``(..., C, *spatial)`` with ``prod(block)`` times the channels."""
        sizes = _spatial(input, self.dims, "InvertibleDownsampling")
        if any(size % k for size, k in zip(sizes, self.block, strict=True)):
            raise ValueError(
                f"InvertibleDownsampling(block={self.block}) needs image sizes divisible by it, got shape {tuple(input.shape)}. "
                "Pad the image first."
            )
        channel = -2 * self.dims - 1  # (..., C, n1, k1, n2, k2) -> (..., C, k1, k2, n1, n2)
        inner = list(range(channel + 2, 0, 2))
        blocks = _split(input, self.block).movedim(inner, list(range(channel + 1, channel + 1 + self.dims)))
        return blocks.flatten(channel, channel + self.dims)

    def inverse(self, output: Tensor) -> Tensor:
        """Return the input that ``forward`` maps to ``output``, bit for bit."""
        sizes, pixels = _spatial(output, self.dims, "InvertibleDownsampling"), math.prod(self.block)
        channels = output.shape[-self.dims - 1]
        if channels % pixels:
            raise ValueError(
                f"the inverse of InvertibleDownsampling(block={self.block}) needs channels divisible by {pixels}, got {channels}."
            )
        blocks = output.unflatten(-self.dims - 1, (channels // pixels, *self.block))
        first = -2 * self.dims
        blocks = blocks.movedim(list(range(first, first + self.dims)), list(range(first + 1, 0, 2)))
        return blocks.reshape(*blocks.shape[:first], *(n * k for n, k in zip(sizes, self.block, strict=True)))

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"block={self.block}, dims={self.dims}"


def largest_entry(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the largest absolute value over some dimensions, kept with size 1, or 1 where there is none to divide by.

    It is a factor that cancels, so it has no gradient. Where there is no entry, or the largest is 0, NaN or infinite, it is 1.

    Examples:
        >>> largest_entry(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), (1,))
        tensor([[4.],
                [1.]])
    """
    if x.numel() == 0:
        return x.new_ones([1 if dim in {d % x.ndim for d in dims} else n for dim, n in enumerate(x.shape)])
    largest = x.detach().abs().amax(dims, keepdim=True)
    return torch.where((largest > 0) & (largest < math.inf), largest, torch.ones_like(largest))


def _window(size: int | tuple[int, ...] | None, dims: int) -> tuple[int, ...] | None:
    """Return the sizes per axis, checked."""
    if dims not in {1, 2, 3} or isinstance(dims, bool):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}.")
    if size is None:
        return None
    sizes = tuple(size) if isinstance(size, tuple | list) else (size,) * dims
    if len(sizes) != dims or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in sizes):
        raise ValueError(
            f"a window in {dims} dimensions needs integer sizes >= 1, one or {dims} of them, got {size!r}."
        )
    return sizes


def _spatial(input: Tensor, dims: int, name: str) -> tuple[int, ...]:  # noqa: A002 the name torch uses
    if input.ndim <= dims:
        raise ValueError(
            f"{name}(dims={dims}) needs an input (..., C, *spatial) of at least {dims + 1} dimensions, "
            f"got shape {tuple(input.shape)}."
        )
    return tuple(input.shape[-dims:])


def _split(image: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Split each of the last axes into windows, ``(..., n1, k1, n2, k2)``, without the rest at the end."""
    for axis, k in enumerate(sizes):
        dim = image.ndim - len(sizes) + axis  # each axis split so far has added one dimension in front
        windows = image.shape[dim] // k
        image = image.narrow(dim, 0, windows * k).unflatten(dim, (windows, k))
    return image


def root_down(k: int) -> float:
    r"""Return a float that is at most :math:`\sqrt k`: exact for squares, else two units below the rounded root at most."""
    root = math.sqrt(k)
    return root if root.is_integer() and int(root) ** 2 == k else root * _BELOW_ONE


def _pixels(module: _WindowPool, norm: str) -> int:
    if module.kernel_size is None:
        raise UncertifiableError(
            f"the {norm} Lipschitz constant of {type(module).__name__} over the whole image grows with the number of pixels, which "
            "the module does not know; give kernel_size."
        )
    return math.prod(module.kernel_size)


@lipschitz_rule.register(ScaledAvgPool)
def _scaled_avg_pool(module: ScaledAvgPool, norm: str) -> Bound:
    if module.kernel_size is None and norm != "linf":
        return Bound(0.0, 1.0)  # l2: 1 up to the rounding of the factor; l1: smaller, by the unknown size
    k = _pixels(module, norm)
    factor = Bound.point(root_down(k))  # the constants below are factor / k times those of the plain sum
    if norm == "linf":
        return factor
    if norm == "l1":
        return factor / k
    return Bound((factor / Bound.point(k).sqrt()).lower, 1.0)  # the factor is at most the root


@lipschitz_rule.register(L2NormPool)
def _l2_norm_pool(module: L2NormPool, norm: str) -> Bound:
    return Bound.point(_pixels(module, norm)).sqrt() if norm == "linf" else Bound.point(1.0)


@lipschitz_rule.register(InvertibleDownsampling)
def _invertible_downsampling(module: InvertibleDownsampling, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(1.0)
