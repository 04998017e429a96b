r"""Activations and fixed maps with Lipschitz constant known exactly.

Channels are dimension 1 of an input with two or more dimensions and dimension 0 of a vector, as in torch. The rules of
:class:`GroupSort` and :class:`Scale` are in :mod:`stableopt.nn.rules`; each other class has its rule beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import stableopt.nn.activation_constants  # noqa: F401 importing it registers the rules of torch's own activations
from stableopt.linalg import Bound
from stableopt.nn.dispatch import lipschitz_rule

__all__ = [
    "Abs",
    "GroupSort",
    "MaxMin",
    "NActivation",
    "Scale",
    "SoftAbs",
    "at_least_float32",
    "channel_dim",
    "channelwise",
]


def channel_dim(input: Tensor, channels: int, name: str) -> int:  # noqa: A002 the name torch uses
    """Return the dimension of the channels of an input, after checking their number.

    Args:
        input: shape ``(N, channels, ...)``, or ``(channels,)``.
        channels: the number of channels that the module has.
        name: class of the module, for the message.

    Raises:
        ValueError: if the input has no channel dimension, or another number of channels.

    Examples:
        >>> channel_dim(torch.zeros(2, 3, 4), 3, "NActivation")
        1
    """
    if input.ndim == 0:
        raise ValueError(f"{name} needs an input with a channel dimension, got a 0-d tensor.")
    dim = min(1, input.ndim - 1)
    if input.shape[dim] != channels:
        raise ValueError(
            f"{name} was built for {channels} channels, got {input.shape[dim]} in dimension {dim} of shape {tuple(input.shape)}."
        )
    return dim


def channelwise(values: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return one value per channel in a shape that broadcasts against the input.

    Args:
        values: shape ``(channels,)``.
        input: shape ``(N, channels, ...)``, or ``(channels,)``.

    Examples:
        >>> channelwise(torch.ones(3), torch.zeros(2, 3, 4)).shape
        torch.Size([3, 1])
    """
    return values.reshape(-1, *[1] * max(0, input.ndim - 2))


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and any other tensor as it is.

    Examples:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype, at_least_float32(torch.zeros(1)).dtype
        (torch.float32, torch.float32)
    """
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


class GroupSort(nn.Module):
    r"""Sort the channels within groups of consecutive channels, in ascending order.

    .. math:: (x_{kg}, \dots, x_{kg+g-1}) \mapsto \text{the same numbers, sorted}.

    Where the numbers of a group differ it is locally a permutation, which keeps the norm of a gradient, and its Lipschitz constant
    is exactly 1 in l2, linf and l1. That is why it suits models with a Lipschitz limit, where ReLU loses half of the gradient.

    Args:
        group_size: number :math:`g \ge 2` of channels in a group; it must divide the number of channels.

    Raises:
        ValueError: if ``group_size`` is no integer of at least 2, or the channels of an input are not divisible by it.

    Note:
        The channels are dimension 1 of an input with two or more dimensions (so an image without batch dimension needs one) and
        dimension 0 of a vector. At a tie in a pair both outputs give half of their gradient to each entry, which can shorten it.

    References:
        Anil, Lucas and Grosse, *Sorting Out Lipschitz Function Approximation*, 2019.

    Examples:
        >>> GroupSort(2)(torch.tensor([[3.0, 1.0, -1.0, 0.0]]))
        tensor([[ 1.,  3., -1.,  0.]])
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 2:
            raise ValueError(f"group_size must be an integer >= 2, got {group_size!r}.")
        self.group_size = group_size

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the input with each group of channels sorted."""
        if input.ndim == 0:
            raise ValueError("GroupSort needs an input with a channel dimension, got a 0-d tensor.")
        dim = min(1, input.ndim - 1)
        channels = input.shape[dim]
        if channels % self.group_size:
            raise ValueError(
                f"GroupSort(group_size={self.group_size}) needs a number of channels divisible by {self.group_size}, "
                f"got {channels} in dimension {dim} of shape {tuple(input.shape)}."
            )
        groups = input.unflatten(dim, (channels // self.group_size, self.group_size))
        if self.group_size == 2:  # faster than sorting
            ordered = torch.stack([groups.amin(dim + 1), groups.amax(dim + 1)], dim + 1)
        else:
            ordered = groups.sort(dim + 1).values
        return ordered.flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"group_size={self.group_size}"


class MaxMin(GroupSort):
    r"""Order each pair of neighboring channels, :math:`(a, b) \mapsto (\min(a, b), \max(a, b))`.

    It is :class:`GroupSort` with groups of two, under the name that papers on certified robustness give it: l2, linf and l1
    constant exactly 1, and the norm of a gradient is kept except at a tie.

    Raises:
        ValueError: in ``forward``, if the number of channels is odd.

    References:
        Anil, Lucas and Grosse, *Sorting Out Lipschitz Function Approximation*, 2019, section 4.

    Examples:
        >>> MaxMin()(torch.tensor([[3.0, 1.0, -1.0, 0.0]]))
        tensor([[ 1.,  3., -1.,  0.]])
    """

    def __init__(self) -> None:
        super().__init__(2)

    def extra_repr(self) -> str:
        """Return nothing: there is no argument."""
        return ""


class Abs(nn.Module):
    r"""Absolute value of a fraction of the channels; the others pass.

    .. math:: x_c \mapsto |x_c| \text{ for } c < \lfloor \beta C \rfloor, \qquad x_c \text{ otherwise.}

    The slopes are 1 and -1, so the Lipschitz constant is exactly 1 in l2, linf and l1, and the norm of a gradient is kept where no
    folded entry is 0. :math:`0 < \beta < 1` keeps part of the signal invertible.

    Args:
        fraction: :math:`\beta`, in (0, 1]; 1 is the plain absolute value and needs no channels.

    Raises:
        ValueError: if ``fraction`` is out of range.

    Note:
        At 0 the gradient is 0, as torch defines it.

    References:
        Prach and Lampert, *1-Lipschitz Neural Networks are more expressive with N-Activations*, 2023; LipNeXt (arXiv 2601.18513)
        for the fraction.

    Examples:
        >>> Abs()(torch.tensor([-1.0, 2.0]))
        tensor([1., 2.])
        >>> Abs(0.5)(torch.tensor([[-1.0, -2.0]]))
        tensor([[ 1., -2.]])
    """

    def __init__(self, fraction: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction!r}.")
        self.fraction = float(fraction)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the input with the sign of the first channels dropped."""
        if self.fraction == 1.0:
            return input.abs()
        if input.ndim == 0:
            raise ValueError("Abs with a fraction below 1 needs an input with a channel dimension, got a 0-d tensor.")
        dim = min(1, input.ndim - 1)
        first = math.floor(self.fraction * input.shape[dim])
        folded, rest = input.tensor_split([first], dim)
        return torch.cat([folded.abs(), rest], dim)

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return "" if self.fraction == 1.0 else f"fraction={self.fraction}"


class SoftAbs(nn.Module):
    r"""Smooth absolute value, :math:`x \mapsto \sqrt{x^2 + \delta^2} - \delta`.

    Its slope :math:`x/\sqrt{x^2 + \delta^2}` lies in (-1, 1) and tends to both ends, so the Lipschitz constant is exactly 1 in l2,
    linf and l1; the slope itself has the constant :math:`1/\delta`.

    Args:
        delta: :math:`\delta > 0`, in units of the input: where the curve turns.

    Raises:
        ValueError: if ``delta`` is not positive and finite.

    Note:
        Half precision is computed in float32 and rounded at the end.

    References:
        Charbonnier et al., *Deterministic Edge-Preserving Regularization in Computed Imaging*, 1997 (the function).

    Examples:
        >>> SoftAbs(3.0)(torch.tensor([-4.0, 0.0]))
        tensor([2., 0.])
    """

    def __init__(self, delta: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < delta < math.inf:
            raise ValueError(f"delta must be positive and finite, got {delta!r}.")
        self.delta = float(delta)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the smooth absolute value of each entry."""
        x = at_least_float32(input)
        return (torch.hypot(x, torch.full_like(x, self.delta)) - self.delta).to(input.dtype)  # hypot does not overflow

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return f"delta={self.delta}"


class NActivation(nn.Module):
    r"""Zigzag with two learnable thresholds per channel.

    .. math::
        N(x) = x - 2\,\operatorname{clip}(x, l, u) =
        \begin{cases} x - 2l & x \le l \\ -x & l \le x \le u \\ x - 2u & x \ge u \end{cases}

    with :math:`l \le u` the two thresholds in order. It is continuous with slopes 1 and -1, so for all thresholds the Lipschitz
    constant is exactly 1 in l2, linf and l1 and the norm of every gradient is kept. It contains the identity (:math:`l = u = 0`)
    and, on a bounded range, plus and minus the absolute value; MaxMin and these cannot express every 1-Lipschitz piecewise linear
    function of one variable in a norm-preserving net, the zigzag can.

    Args:
        channels: number of channels.
        init: the two thresholds of every channel at the start, finite, in units of the input. The default is minus the absolute
            value for inputs above -1.

    Raises:
        ValueError: if ``channels`` is no integer of at least 1 or a threshold is not finite; in ``forward``, if the input
            has another number of channels.

    Note:
        A threshold gets a gradient from the inputs beyond it, so one far outside the data does not learn. With equal thresholds the
        two still get different gradients and can part. Half precision is computed in float32 and rounded at the end.

    References:
        Prach and Lampert, *1-Lipschitz Neural Networks are more expressive with N-Activations*, 2023.

    Examples:
        >>> zigzag = NActivation(1, init=(-1.0, 1.0))
        >>> zigzag(torch.tensor([[-3.0], [0.5], [3.0]])).flatten().tolist()
        [-1.0, -0.5, 1.0]
    """

    def __init__(self, channels: int, init: tuple[float, float] = (-1.0, 0.0)) -> None:
        super().__init__()
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise ValueError(f"channels must be an integer >= 1, got {channels!r}.")
        if len(init) != 2 or not all(math.isfinite(threshold) for threshold in init):
            raise ValueError(f"init must be two finite thresholds, got {init!r}.")
        self.init = (float(init[0]), float(init[1]))
        self.thresholds = nn.Parameter(torch.empty(2, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the thresholds of every channel to ``init``."""
        with torch.no_grad():
            for row, threshold in zip(self.thresholds, self.init, strict=True):
                row.fill_(threshold)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the zigzag of each entry."""
        channel_dim(input, self.thresholds.shape[1], "NActivation")
        ordered = self.thresholds.sort(dim=0, stable=True).values
        x = at_least_float32(input)
        low, high = (channelwise(row, x) for row in ordered.to(x.dtype).unbind())
        # not clamp(): it gives the lower of two equal thresholds no gradient
        return torch.where(x < low, x - 2 * low, torch.where(x > high, x - 2 * high, -x)).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return f"{self.thresholds.shape[1]}"


@lipschitz_rule.register(Abs)
@lipschitz_rule.register(SoftAbs)
def _slopes_of_one(module: nn.Module, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(1.0)


@lipschitz_rule.register(NActivation)
def _n_activation(module: NActivation, norm: str) -> Bound:  # noqa: ARG001
    if not bool(module.thresholds.isfinite().all()):
        raise ValueError("no bound holds for an NActivation with NaN or infinite thresholds.")
    return Bound.point(1.0)


class Scale(nn.Module):
    r"""Multiply by a fixed number, :math:`x \mapsto cx`; its Lipschitz constant is exactly :math:`|c|`.

    Args:
        factor: the number :math:`c`, finite.

    Raises:
        ValueError: if ``factor`` is not finite.

    Note:
        The factor is a setting like the slope of a LeakyReLU: it is not trained and not part of ``state_dict()``.

    Examples:
        >>> Scale(0.5)(torch.tensor([2.0]))
        tensor([1.])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not math.isfinite(factor):
            raise ValueError(f"factor must be finite, got {factor!r}.")
        self.factor = float(factor)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return ``factor * input``."""
        return self.factor * input

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return f"factor={self.factor}"
