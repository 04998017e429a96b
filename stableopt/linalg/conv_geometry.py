r"""What stride, dilation, padding and transposition do to the norm of a convolution: one axis at a time.

On the whole grid, without padding, a convolution with stride :math:`s` and dilation :math:`d` computes along one axis
:math:`y_p = \sum_t W_t x_{sp + dt}`. Let :math:`s' = s / \gcd(s, d)` and :math:`d' = d / \gcd(s, d)`.

* *Dilation.* The outputs :math:`p \equiv e` modulo :math:`d'` read one class of pixels modulo :math:`d`, another :math:`e` another
  class, because :math:`s'` and :math:`d'` are coprime; pixels of the other classes are not read. On its class every :math:`e` sees
  the undilated convolution with stride :math:`s'`. So the norm is that of :math:`y_a = \sum_t W_t x_{s'a + t}`: the dilation has
  gone, and with it the common factor of the stride.
* *Stride.* Cutting the pixels into blocks of :math:`s'` (an isometry, the pixel unshuffle), :math:`t = s'j + b`, gives a
  convolution with stride 1, :math:`\lceil k/s' \rceil` taps :math:`j` and :math:`s'` times the input channels :math:`(i, b)`.
* *Zero padding* embeds the image in the grid (an isometry) and cropping leaves outputs out. An image of :math:`n` blocks and
  :math:`K` taps never meets itself on a torus of :math:`n + K - 1` blocks.
* *Transposition* is the adjoint, cropped: ``padding`` takes outputs away, ``output_padding`` gives back some of those that the
  adjoint has on the whole grid. Neither makes the norm larger than that of the convolution.
* *Copies.* A padding that repeats pixels is an operator :math:`P` with :math:`P^\top P` diagonal, the numbers of copies, so that
  its norm is the root of the largest. Only the copies that some output reads count.
* *Periods.* Circular padding continues an image of :math:`n` pixels with period :math:`L = n`, reflection with
  :math:`L = 2(n-1)` (each pixel at most twice). The outputs are entries :math:`sp \bmod L` of a convolution on the torus of
  :math:`L` pixels: those of a stride :math:`h = \gcd(s, L)`, each repeated at most :math:`\lceil m h / L \rceil` times if there are
  :math:`m` outputs. As above, a stride :math:`h \mid L` and a dilation :math:`d` on the torus of :math:`L` pixels are a stride
  :math:`h_1 = h / \gcd(h, d)` without dilation on one of :math:`L / \gcd(d, L)` pixels, a multiple of :math:`h_1`.

Both views of a repeating padding hold, and each is the better one somewhere, so both are offered.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Axis", "Reduced", "check_kernel", "conv_axes", "padding_multiplicity", "reductions"]

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a convolution layer: data only, checked by :func:`conv_axes`.

    Args:
        kernel: number of taps.
        stride: stride.
        dilation: dilation.
        before: padded pixels before the image.
        after: padded pixels after the image.
        mode: how they are filled.
        size: pixels of the image, None for any number.
        transposed: True for the adjoint.

    Examples:
        >>> Axis(3).span
        3
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    mode: str = "zeros"
    size: int | None = None
    transposed: bool = False

    @property
    def span(self) -> int:
        """Pixels from the first to the last tap."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def repeats(self) -> bool:
        """Whether the padding repeats pixels."""
        return self.mode != "zeros" and self.before + self.after > 0

    @property
    def smallest(self) -> int:
        """The smallest image that the layer accepts."""
        wide = max(self.before, self.after)
        fits = {"circular": wide, "reflect": wide + 1}.get(self.mode, 1) if self.repeats else 1
        return max(fits, self.span - self.before - self.after, 1)

    def outputs(self, size: int) -> int:
        """The number of outputs for an image of ``size`` pixels."""
        return (size + self.before + self.after - self.span) // self.stride + 1


@dataclass(frozen=True, slots=True)
class Reduced:
    r"""An axis as a convolution with stride 1 and no dilation, whose symbol bounds the layer.

    .. math:: \|\text{layer}\| \le \sqrt{\text{copies}} \, \sup_\omega \|\hat W(\omega)\|

    Args:
        stride: tap :math:`t` of the kernel becomes tap ``t // stride`` of channel phase ``t % stride``.
        torus: the supremum runs over this many equally spaced frequencies; None if over all.
        copies: how often a pixel or an output is repeated at most.

    Examples:
        >>> Reduced(stride=2, torus=None, copies=1).taps(3)
        2
    """

    stride: int
    torus: int | None
    copies: int

    def taps(self, kernel: int) -> int:
        """The number of taps that are left of ``kernel``."""
        return -(-kernel // self.stride)


def check_kernel(shape: Sequence[int], groups: int) -> None:
    """Refuse a shape that no convolution kernel has.

    Args:
        shape: of the kernel.
        groups: number of groups.

    Raises:
        ValueError: unless there are one to three kernel axes without an empty one, and the groups divide the first axis.

    Examples:
        >>> check_kernel((4, 2, 3, 3), groups=2)
    """
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"a convolution kernel has 3 to 5 dimensions (out, in, *kernel), got {len(shape)}.")
    if 0 in shape[2:]:
        raise ValueError(f"a convolution kernel has at least one tap per axis, got shape {tuple(shape)}.")
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or shape[0] % groups:
        raise ValueError(f"groups must be a positive divisor of the {shape[0]} channels of the kernel, got {groups!r}.")


def conv_axes(
    kernel: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    image_size: int | Sequence[int] | None = None,
) -> tuple[Axis, ...]:
    r"""Check the options of a convolution layer and return its axes.

    Args:
        kernel: taps per axis, at least 1 each.
        stride: one positive integer, or one per axis.
        dilation: the same.
        padding: pixels on either side, one or one per axis, or ``"same"`` or ``"valid"``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        transposed: True for a transposed convolution.
        output_padding: of a transposed convolution.
        image_size: pixels of the input per axis; None for any.

    Raises:
        ValueError: if an option is malformed, or no such layer or image exists.

    Examples:
        >>> conv_axes((4,), padding="same", dilation=3)[0].after
        5
    """
    dims = len(kernel)
    kernel = _per_axis("kernel", kernel, dims, 1)
    strides, dilations = _per_axis("stride", stride, dims, 1), _per_axis("dilation", dilation, dims, 1)
    extra = _per_axis("output_padding", output_padding, dims, 0)
    sizes = (None,) * dims if image_size is None else _per_axis("image_size", image_size, dims, 1)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"no bound is known for padding_mode={padding_mode!r}, only for {', '.join(PADDING_MODES)}.")
    if transposed and (padding_mode != "zeros" or isinstance(padding, str)):
        raise ValueError(
            f"a transposed convolution has padding_mode='zeros' and padding in numbers, got {padding_mode!r} and {padding!r}."
        )
    if any(extra) and not transposed:
        raise ValueError(f"output_padding={output_padding!r} belongs to transposed convolutions only.")
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(
            f"output_padding must be smaller than the stride or the dilation, got {output_padding!r} with "
            f"stride={stride!r}, dilation={dilation!r}."
        )
    sides = _sides(padding, kernel, strides, dilations)
    rows = zip(kernel, strides, dilations, sides, sizes, strict=True)
    axes = tuple(Axis(k, s, d, *side, padding_mode, size, transposed) for k, s, d, side, size in rows)
    for axis in axes:
        if axis.repeats and axis.size is not None and axis.size < axis.smallest:
            raise ValueError(
                f"an axis of {axis.size} pixels is too small for {axis.kernel} taps at distance {axis.dilation} with "
                f"{padding_mode} padding ({axis.before}, {axis.after}): it needs {axis.smallest}."
            )
    return axes


def padding_multiplicity(
    kernel: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    image_size: int | Sequence[int] | None = None,
) -> int:
    r"""Count how often a convolution layer reads copies of one pixel at most, the pixel itself included.

    The padding operator, restricted to what is read, has exactly the root of this number as its norm.

    Args:
        kernel: taps per axis.
        stride: one positive integer, or one per axis.
        dilation: the same.
        padding: pixels on either side, one or one per axis, or ``"same"`` or ``"valid"``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        image_size: pixels of the input per axis; None for the largest number over all images that the layer accepts.

    Returns:
        The product over the axes of the exact counts; 1 for zero padding.

    Raises:
        ValueError: if an option is malformed, or no such layer or image exists.

    Examples:
        >>> padding_multiplicity((3, 3), padding=1, padding_mode="reflect", image_size=(32, 32))
        4
        >>> padding_multiplicity(
        ...     (3,), padding=1, padding_mode="reflect"
        ... )  # three pixels: the middle one is its own neighbor
        3
        >>> padding_multiplicity((5,), padding=2, padding_mode="replicate", image_size=8)
        3
    """
    axes = conv_axes(
        kernel, stride=stride, dilation=dilation, padding=padding, padding_mode=padding_mode, image_size=image_size
    )
    return math.prod(_copies(axis) for axis in axes)


def reductions(axes: Iterable[Axis]) -> list[tuple[Reduced, ...]]:
    r"""Return the ways to bound a layer, each a reduction per axis; any of them is valid, so the least bound is.

    Zero padding has one way. For a padding that repeats pixels there are at most two: by its period or by its copies.

    Args:
        axes: the axes of the layer.

    Examples:
        >>> reductions([Axis(3, stride=2, dilation=2)])
        [(Reduced(stride=1, torus=None, copies=1),)]
    """
    options = [_axis_options(axis) for axis in axes]
    first, second = tuple(o[0] for o in options), tuple(o[-1] for o in options)
    return [first] if first == second else [first, second]


def _axis_options(axis: Axis) -> tuple[Reduced, ...]:
    if not axis.repeats:
        return (_on_the_grid(axis),)
    common = math.gcd(axis.stride, axis.dilation)
    stride = axis.stride // common
    torus = None
    if axis.size is not None:  # nothing leaves the padded image, so the blocks that it touches are torus enough
        torus = _blocks(-(-(axis.size + axis.before + axis.after) // axis.dilation), stride)
    by_copies = Reduced(stride, torus, _copies(axis))
    if axis.mode == "replicate":
        return (by_copies,)
    by_period = _periodic(axis)
    if by_period.copies <= by_copies.copies and by_period.stride % stride == 0:
        return (by_period,)
    if by_copies.copies <= by_period.copies and stride % by_period.stride == 0:
        return (by_copies,)
    return (by_period, by_copies)


def _on_the_grid(axis: Axis) -> Reduced:
    """Reduce an axis with zero padding of any width."""
    common = math.gcd(axis.stride, axis.dilation)
    stride = axis.stride // common
    if axis.size is None:
        return Reduced(stride, None, 1)
    # the pixels of a transposed one are the outputs of the adjoint: classes modulo d', one block each
    classes = axis.dilation // common if axis.transposed else axis.dilation
    pixels = -(-axis.size // classes)
    blocks = pixels if axis.transposed else _blocks(pixels, stride)
    return Reduced(stride, blocks + -(-axis.kernel // stride) - 1, 1)


def _blocks(pixels: int, stride: int) -> int:
    """Return the largest number of blocks of ``stride`` pixels that ``pixels`` neighbors touch."""
    return (pixels + stride - 2) // stride + 1


def _periodic(axis: Axis) -> Reduced:
    """Reduce an axis whose padding continues the image periodically; without a size, so that it holds for every size."""
    if axis.size is not None:
        return _periodic_of_size(axis, axis.size)
    every = [_periodic_of_size(axis, size) for size in _representative_sizes(axis)]
    return Reduced(math.gcd(*(r.stride for r in every)), None, max(r.copies for r in every))


def _periodic_of_size(axis: Axis, size: int) -> Reduced:
    period = size if axis.mode == "circular" else 2 * (size - 1)
    twice = 2 if axis.mode == "reflect" and size > 2 else 1
    stride = math.gcd(axis.stride, period)
    repeated = -(-axis.outputs(size) * stride // period)
    reduced = stride // math.gcd(stride, axis.dilation)
    return Reduced(reduced, period // math.gcd(axis.dilation, period) // reduced, twice * repeated)


def _representative_sizes(axis: Axis) -> range:
    """Return sizes that show every pattern of copies and repetitions.

    An image longer than both paddings, the taps and the stride together has a left part, a right part and a middle, which only a
    change of its size modulo the stride rearranges; repeated outputs end or stay the same from there on.
    """
    long = axis.smallest + 2 * (axis.before + axis.after) + 2 * axis.span + 2 * axis.stride
    return range(axis.smallest, long + axis.stride)


@functools.lru_cache(maxsize=1024)
def _copies(axis: Axis) -> int:
    if not axis.repeats:
        return 1
    sizes = _representative_sizes(axis) if axis.size is None else (axis.size,)
    return max(_copies_of_size(axis, size) for size in sizes)


def _copies_of_size(axis: Axis, size: int) -> int:
    """Count the copies of each pixel that an output reads, and return the largest count."""
    place = np.arange(-axis.before, size + axis.after)
    if axis.mode == "circular":
        pixel = place % size
    elif axis.mode == "reflect":
        pixel = np.abs(place)
        pixel = np.minimum(pixel, 2 * (size - 1) - pixel)
    else:
        pixel = place.clip(0, size - 1)
    rows = -(-len(place) // axis.dilation)
    starts = np.zeros(rows * axis.dilation, dtype=np.int64)
    starts[: axis.stride * axis.outputs(size) : axis.stride] = 1
    windows = starts.reshape(rows, axis.dilation).cumsum(axis=0)  # windows that started up to here, by class modulo d
    windows[axis.kernel :] -= windows[: -axis.kernel].copy()  # and did not end before
    read = windows.ravel()[: len(place)] > 0
    return int(np.bincount(pixel[read]).max())


def _sides(
    padding: int | str | Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding before and after the image, per axis; ``"same"`` puts the odd pixel after it."""
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0)] * len(kernel)
        if padding != "same":
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}.")
        if any(s != 1 for s in strides):
            raise ValueError(f"padding='same' needs stride 1, got stride={tuple(strides)}.")
        totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _per_axis("padding", padding, len(kernel), 0)]


def _per_axis(name: str, value: object, dims: int, least: int) -> tuple[int, ...]:
    values = tuple(itertools.repeat(value, dims)) if isinstance(value, int) else value
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or len(values) != dims
        or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)
    ):
        raise ValueError(f"{name} must be an integer >= {least} or {dims} of them, got {value!r}.")
    return tuple(values)
