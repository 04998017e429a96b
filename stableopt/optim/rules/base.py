r"""What is known about update maps: the map itself, the limits of its stability, and the energy that it dissipates.

A rule is a set of pure functions of one parameter :math:`\theta`, its gradient, its state and the hyper-parameters of its group, in
the names that torch gives them; a name that a group lacks has torch's default. Most rules are heavy-ball methods in a metric P:
with the displacement :math:`d = \theta_t - \theta_{t-1}`, an effective learning rate :math:`\eta'` and an effective momentum
:math:`\beta`,

.. math:: d^+ = \beta d - \eta' P^{-1} \nabla F(\theta), \qquad
    V = F(\theta) + \frac{\beta}{2\eta'} \|d\|_P^2, \qquad
    V^+ \le V - \Bigl(\frac{1-\beta}{\eta'} - \frac{L}{2}\Bigr) \|d^+\|_P^2,

where F is the loss plus the weight decay (and the regularizer, if the step ends with its prox and the momentum is set to the
realised displacement) and L the smoothness in the metric P of all but the regularizer (THEORY T4).
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stableopt.constraints import Regularizer
from stableopt.constraints.sharding import is_sharded

__all__ = [
    "Group",
    "State",
    "UpdateRule",
    "add_scaled_",
    "mixed",
    "number",
    "real_view",
    "step_sums",
    "unviewed",
    "weighted_square",
    "zero_energy",
]

State: TypeAlias = dict[str, Any]
Group: TypeAlias = Mapping[str, Any]

_PIECE = 1 << 16
"""Numbers that are summed in float32 before they are summed in float64."""


class UpdateRule(ABC):
    """The update map of an optimizer, its limits and its energy; one instance serves all parameters.

    Examples:
        >>> from stableopt.optim.rules import rule_for
        >>> rule = rule_for(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.5))
        >>> type(rule).__name__
        'HeavyBall'
    """

    complex_too: ClassVar[bool] = False
    """Whether the energy holds for complex parameters: the metric must weigh real and imaginary parts alike."""

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return the next parameter and state; nothing is changed in place."""

    @abstractmethod
    def limit(self, group: Group) -> float:
        r"""Return the largest curvature (eigenvalue of :math:`P^{-1}H`) for which the linearized map is stable, the edge.

        Raises:
            ValueError: if the map has no linearization, as that of a normalized step.
        """

    @abstractmethod
    def energy_limit(self, smoothness: float, group: Group) -> float:
        r"""Return the largest lr for which the energy provably dissipates, for a loss ``smoothness``-smooth in P.

        Raises:
            ValueError: if nothing is proved for these hyper-parameters.
        """

    def max_lr(self, sharpness: float, group: Group, fraction: float = 1.0) -> float:
        r"""Return the largest learning rate with ``sharpness <= fraction * limit``, the other hyper-parameters as they are.

        The limit falls as the learning rate grows, so the answer is found by bisection over all floats and is right to the last bit
        of the limit's own rounding.

        Args:
            sharpness: the curvature to be borne, in the metric that :meth:`limit` speaks of; finite.
            group: hyper-parameters; its learning rate is not used.
            fraction: how much of the limit may be used, positive and finite; 1 is the edge itself.

        Returns:
            The learning rate, infinity if no learning rate is too large, 0 if every one is.

        Raises:
            ValueError: if an argument is out of range, or the map has no limit.

        Examples:
            >>> from stableopt.optim.rules import HeavyBall
            >>> HeavyBall().max_lr(4.0, {"momentum": 0.5}, fraction=0.5)
            0.375
        """
        sharpness, fraction = float(sharpness), float(fraction)
        if not math.isfinite(sharpness):
            raise ValueError(f"sharpness must be a finite number, got {sharpness!r}.")
        if not (math.isfinite(fraction) and fraction > 0):
            raise ValueError(f"fraction must be a finite number > 0, got {fraction!r}.")

        def borne(bits: int) -> bool:
            lr = struct.unpack("<d", struct.pack("<q", bits))[0]
            return sharpness <= fraction * self.limit({**group, "lr": lr})

        low, high = 0, struct.unpack("<q", struct.pack("<d", math.inf))[0]  # floats >= 0 are ordered as their bits are
        if borne(high - 1):
            return math.inf
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if borne(middle) else (low, middle)
        return struct.unpack("<d", struct.pack("<q", low))[0]

    def takes(self, group: Group, regularizer: Regularizer) -> str | None:
        """Say whether a penalty or a set fits the update: None if it does, else why not and what to use instead.

        Args:
            group: hyper-parameters; its parameters, if it has some, are looked at for their dtype.
            regularizer: a penalty or a constraint.

        Returns:
            None, or one sentence.
        """
        return None

    def norm_limit(self, group: Group, shape: tuple[int, ...]) -> float | None:
        r"""Return a bound on the norm of a parameter that decoupled decay keeps once it holds, None if there is none.

        Args:
            group: hyper-parameters.
            shape: of the parameter.

        Returns:
            The bound, in the norm that the rule normalizes, without the rounding of the parameter.
        """
        return None

    @abstractmethod
    def momentum(self, group: Group) -> float:
        r"""Return the effective momentum :math:`\beta`."""

    @abstractmethod
    def effective_lr(self, group: Group, *, first: bool) -> float:
        r"""Return :math:`\eta'`; ``first`` says that this is the first step of a parameter, which has no momentum yet."""

    @abstractmethod
    def metric(self, state: State, group: Group) -> Tensor | float:
        """Return the diagonal of P that the step just taken has used."""

    @abstractmethod
    def buffer(self, state: State) -> Tensor | None:
        """Return the momentum buffer, None if there is none yet."""

    @abstractmethod
    def displacement(self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return the displacement that the momentum buffer stands for."""

    @abstractmethod
    def decay(self, parameter: Tensor, metric: Tensor | float, group: Group) -> Tensor:
        """Return the energy of the weight decay, 0-d float64."""

    @abstractmethod
    def realign(self, correction: Tensor, state: State, metric: Tensor | float, group: Group) -> None:
        r"""Set the buffer to the realised displacement, in place.

        Args:
            correction: :math:`y - \theta^+`, what the prox took off the point :math:`y` that the plain step reached.
            state: of the parameter.
            metric: P of this step.
            group: hyper-parameters.
        """

    def energy(
        self,
        parameter: Tensor,
        buffer: Tensor | None,
        metric: Tensor | float,
        group: Group,
        *,
        first: bool,
        state: State | None = None,
    ) -> Tensor:
        r"""Return the part of the energy beside the loss and the regularizer: decay plus :math:`\beta/(2\eta') \|d\|_P^2`.

        Args:
            parameter: :math:`\theta`, any shape.
            buffer: its momentum buffer, None for none yet, which means zero.
            metric: P of the step that is judged; the same before and after it.
            group: hyper-parameters.
            first: whether the step judged is the parameter's first.
            state: after the step that is judged, for rules whose coefficients change from step to step.

        Returns:
            0-d float64 tensor.
        """
        beta, eta = self.momentum(group), self.effective_lr(group, first=first)
        total = self.decay(parameter, metric, group)
        if beta == 0.0 or eta == 0.0:
            return total
        if buffer is None:  # zero momentum is not always zero displacement: a decoupled decay moves too
            buffer = torch.zeros_like(parameter)
        return total + beta / (2.0 * eta) * self.motion(parameter, buffer, metric, group, state)

    def motion(
        self, parameter: Tensor, buffer: Tensor, metric: Tensor | float, group: Group, state: State | None = None
    ) -> Tensor:
        r"""Return :math:`\|d\|_P^2` of the displacement that the buffer stands for; the arguments of :meth:`displacement`."""
        return weighted_square(self.displacement(parameter, buffer, metric, group), metric)

    def realizes(self, group: Group) -> bool:
        """Return whether the buffer after a step stands for just the displacement of that step, regularizers included."""
        return False

    def quick_sums(
        self, group: Group, start: Tensor, buffer: Tensor | None, end: Tensor, state: State, scratch: Scratch
    ) -> tuple[float, ...] | None:
        """Return what :func:`step_sums` does, as numbers, for lines of float32 or float64 on a CPU, in memory that is given.

        Args:
            group: as for :func:`step_sums`.
            start: as for :func:`step_sums`, 1-d.
            buffer: as for :func:`step_sums`, 1-d.
            end: as for :func:`step_sums`, 1-d.
            state: as for :func:`step_sums`, everything with the shape of the parameter 1-d.
            scratch: memory to work in.

        Returns:
            Five numbers, or None if the rule has no quick way here.
        """
        return None


class Scratch:
    """Memory that is used again and again for pieces of one size.

    Examples:
        >>> scratch = Scratch()
        >>> a = scratch.line(0, torch.ones(3))
        >>> a.shape, scratch.line(0, torch.ones(2)).data_ptr() == a.data_ptr()
        (torch.Size([3]), True)
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[int, torch.dtype], Tensor] = {}

    def dot(self, x: Tensor, y: Tensor) -> float:
        r"""Return :math:`\sum_i x_i y_i`. torch.dot would add thousands of products one after the other; a sum adds them in pairs.

        Examples:
            >>> Scratch().dot(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
            11.0
        """
        return torch.mul(x, y, out=self.line(-1, x)).sum().item()

    def line(self, index: int, like: Tensor) -> Tensor:
        """Return a line of the length and dtype of ``like``, with whatever is in it."""
        count, key = like.numel(), (index, like.dtype)
        line = self._lines.get(key)
        if line is None or line.numel() < count:
            line = self._lines[key] = torch.empty(count, dtype=like.dtype)
        return line[:count]


def step_sums(
    rule: UpdateRule, group: Group, start: Tensor, buffer: Tensor | None, end: Tensor, state: State
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Return what one parameter adds to the energies of a step.

    Args:
        rule: of the optimizer.
        group: hyper-parameters, those that the step used.
        start: the parameter before the step.
        buffer: its momentum buffer before the step, None if it had none.
        end: the parameter after the step.
        state: its state after the step.

    Returns:
        Five 0-d float64 tensors: the energy before and after without the loss, :math:`\|d\|_P^2/\eta'`,
        :math:`(1-\beta)\|d\|_P^2/\eta'` and :math:`\|d\|^2`.

    Examples:
        >>> from stableopt.optim.rules import HeavyBall
        >>> group = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
        >>> [x.item() for x in step_sums(HeavyBall(), group, torch.zeros(1), None, torch.ones(1), {})]
        [0.0, 0.0, 2.0, 2.0, 1.0]
    """
    metric, first = rule.metric(state, group), buffer is None
    eta, prox = rule.effective_lr(group, first=first), group.get("prox")
    d = end - start
    length = weighted_square(d, 1.0)
    square = weighted_square(d, metric) if isinstance(metric, Tensor) else metric * length
    square = square / eta if eta > 0 else torch.zeros_like(length)
    before = rule.energy(start, buffer, metric, group, first=first, state=state)
    if rule.realizes(group) and end.dtype in {
        torch.float32,
        torch.float64,
    }:  # the buffer holds nothing that d does not say
        after = rule.decay(end, metric, group) + 0.5 * rule.momentum(group) * square
    else:
        after = rule.energy(end, rule.buffer(state), metric, group, first=first, state=state)
    if prox is not None:  # a set contributes 0: steps begin and end inside
        before, after = before + prox.value(start), after + prox.value(end)
    return before, after, square, (1.0 - rule.momentum(group)) * square, length


def weighted_square(x: Tensor, metric: Tensor | float) -> Tensor:
    r"""Return :math:`\|x\|_P^2 = \sum P_i |x_i|^2`, summed in float64.

    Args:
        x: real or complex, any shape.
        metric: a number, or weights of the shape of ``x``, for complex ``x`` also of the shape of its :func:`real_view`.

    Examples:
        >>> weighted_square(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])).item()
        3.0
    """
    if is_sharded(x):
        norm = torch.linalg.vector_norm(x if not isinstance(metric, Tensor) else metric.sqrt() * x, dtype=torch.float64)
        return norm * norm if isinstance(metric, Tensor) else metric * norm * norm
    if x.is_complex():
        deep = not isinstance(metric, Tensor) or metric.ndim > x.ndim
        x = torch.view_as_real(x.resolve_conj()) if deep else x.abs()
    # the product with the metric is rounded in its own dtype: all terms are positive, so that is one relative rounding
    return metric * inner(x, x) if not isinstance(metric, Tensor) else inner(metric * x, x)


def inner(x: Tensor, y: Tensor) -> Tensor:
    r"""Return :math:`\sum_i x_i y_i` of real tensors in float64; float32 is summed in pieces.

    Examples:
        >>> inner(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item()
        11.0
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(wide).reshape(-1), y.to(wide).reshape(-1)
    if x.dtype == torch.float64:
        return torch.dot(x, y)
    if x.numel() <= _PIECE or x.device.type != "cpu":
        return (x * y).sum().double()  # in pairs; torch.dot adds one product after the other
    return torch.stack([(a * b).sum() for a, b in zip(x.split(_PIECE), y.split(_PIECE), strict=True)]).double().sum()


def real_view(x: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of two, a real one as it is; both share the memory.

    Adaptive optimizers treat real and imaginary parts as parameters of their own.

    Examples:
        >>> real_view(torch.tensor([1 + 2j])).tolist()
        [[1.0, 2.0]]
    """
    return torch.view_as_real(x) if x.is_complex() else x


def unviewed(x: Tensor, like: Tensor) -> Tensor:
    """Return what :func:`real_view` shows in the form of ``like``.

    Examples:
        >>> unviewed(torch.tensor([[1.0, 2.0]]), like=torch.tensor([0j]))
        tensor([1.+2.j])
    """
    return torch.view_as_complex(x.contiguous()) if like.is_complex() else x


def number(value: Any) -> float:
    """Return a hyper-parameter, a number or a tensor with one element, as a float.

    Within forward-mode differentiation a tensor that carries a tangent stays one, 0-d, so that an update map may be differentiated
    with respect to its hyper-parameters.

    Examples:
        >>> number(torch.tensor([0.5]))
        0.5
        >>> torch.func.jvp(lambda lr: number(lr) * torch.ones(2), (torch.tensor([0.5]),), (torch.tensor([3.0]),))[
        ...     1
        ... ].tolist()
        [3.0, 3.0]
    """
    if not isinstance(value, Tensor):
        return float(value)
    if forward_ad.unpack_dual(value).tangent is not None:
        return cast("float", value.reshape(()))
    return float(value.detach())


def mixed(x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
    """Return ``x.lerp(y, weight)``, for a weight of any floating dtype.

    Examples:
        >>> mixed(torch.zeros(2), torch.ones(2), torch.tensor(0.5, dtype=torch.float64)).tolist()
        [0.5, 0.5]
    """
    return x.lerp(y, weight.to(x.dtype) if isinstance(weight, Tensor) else weight)


def add_scaled_(x: Tensor, y: Tensor, factor: float | Tensor) -> Tensor:
    """Add a multiple of a tensor to another one, in place, and return it; the factor may be a :func:`number` with a tangent.

    Examples:
        >>> add_scaled_(torch.ones(2), torch.ones(2), 0.5).tolist()
        [1.5, 1.5]
    """
    return x.add_(y * factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def zero_energy(like: Tensor) -> Tensor:
    """Return the energy of what costs nothing: a 0-d float64 zero on the device of ``like``.

    Examples:
        >>> zero_energy(torch.ones(2))
        tensor(0., dtype=torch.float64)
    """
    return torch.zeros((), dtype=torch.float64, device=like.device)
