r"""What all recurrent cells share: the input map, the numbers that a whole sequence needs once, and limits of a matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import gram_norm
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import rounding_slack
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes
from stableopt.nn.weights.isometry import one_matrix, stored

__all__ = ["RecurrentCell", "capped", "check_memory", "cyclic", "initial_steps", "logit", "proof_slack"]

_SMALLEST = 1e-30
"""Floor of a norm that is divided by."""


class RecurrentCell(nn.Module, ABC):
    r"""A cell :math:`h^+ = F(h, Ux + b)` whose state contracts in a fixed norm; subclasses say how.

    A subclass has the parameters ``weight_input`` (:math:`U`, before its limit), ``bias`` and those of its own, and defines
    :meth:`prepared` and :meth:`advance`. A sequence calls ``prepared`` once, applies ``U`` to all steps at once, and then advances.

    Args:
        input_size: number of features of :math:`x`.
        hidden_size: number of units.
        activation: ``"tanh"``, ``"relu"``, ``"leaky_relu"``, ``"softplus"`` or ``"hardtanh"``: slopes in [0, 1].
        gain: a limit of the gain from input to output sequences in the norm of the cell, which scales :math:`U` down where it has
            to; None for none.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].
    """

    norm: str
    """The norm, ``"l2"`` or ``"linf"``, in which ``gain`` is promised for every value of the parameters."""

    def __init__(self, input_size: int, hidden_size: int, *, activation: str, gain: float | None) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        check_unit_slopes(activation, type(self).__name__)
        if gain is not None:
            check_positive(gain=gain)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.activation = activation
        self.gain = None if gain is None else float(gain)
        self.weight_input = nn.Parameter(torch.empty(hidden_size, input_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self) -> None:
        """Draw a new input matrix and set the bias to zero; subclasses draw theirs, too."""
        nn.init.xavier_uniform_(self.weight_input)
        nn.init.zeros_(self.bias)

    @abstractmethod
    def prepared(self) -> tuple[Tensor, ...]:
        """Return what all steps of a sequence need: first the input matrix that is used, then what ``advance`` takes."""

    @abstractmethod
    def advance(self, state: Tensor, drive: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the next state.

        Args:
            state: of shape ``(..., hidden_size)``.
            drive: :math:`Ux + b`, of the same shape.
            prepared: what :meth:`prepared` returns.
        """

    def drive(self, input: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:  # noqa: A002 the name torch uses
        """Return :math:`Ux + b`, for any number of steps at once."""
        return F.linear(input, prepared[0], self.bias)

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state.

        Args:
            input: :math:`x`, of shape ``(..., input_size)``.
            state: :math:`h`, of shape ``(..., hidden_size)``; None for zeros.
        """
        prepared = self.prepared()
        drive = self.drive(input, prepared)
        return self.advance(torch.zeros_like(drive) if state is None else state, drive, prepared)

    def activate(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the activation of each entry."""
        return UNIT_SLOPES[self.activation](input)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        gain = "" if self.gain is None else f", gain={self.gain}"
        return f"{self.input_size}, {self.hidden_size}, activation={self.activation!r}{gain}"


def check_memory(memory: int, rate: float) -> None:
    """Refuse a cap of the rate outside (0, 1), and a memory that does not fit below it.

    Args:
        memory: number of steps over which the new cell remembers.
        rate: the cap of the factor of one step.

    Raises:
        ValueError: if the rate is outside (0, 1), the memory is no positive integer, or ``1 - 1 / memory`` is not below the rate.

    Examples:
        >>> check_memory(16, 0.99)
    """
    check_sizes(memory=memory)
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate is the cap of the factor of one step and must lie in (0, 1), got {rate!r}.")
    if 1.0 - 1.0 / memory >= rate:
        raise ValueError(
            f"a memory of {memory} steps has the factor {1.0 - 1.0 / memory:.6g} per step, which is not below rate={rate!r}; lower "
            "the memory or raise the rate towards 1."
        )


def capped(
    V: Tensor,
    limit: float | Tensor,
    norm: str,
    *,
    steps: int = 6,
    dtype: torch.dtype | None = None,
    folded: Callable[[Tensor], tuple[Tensor, float]] = one_matrix,
) -> Tensor:
    r"""Return :math:`V \min(1, r/U(V))` with an upper bound U of its norm: at most the limit, also after rounding.

    Args:
        V: the matrix.
        limit: :math:`r > 0`, a number or a 0-d tensor; in ``"linf"`` also one number for each row, of shape ``(n, 1)``.
        norm: ``"l2"``, where all entries are scaled alike, or ``"linf"``, where each row is scaled by itself.
        steps: of the Gram iteration; the norm is overestimated by at most :math:`n^{2^{-(\text{steps}+1)}}`.
        dtype: of the result; None for that of ``V``.
        folded: the linear map to the matrix whose Euclidean norm is limited.

    Returns:
        The matrix, computed in at least float32.

    Examples:
        >>> capped(torch.tensor([[3.0, 1.0], [0.5, 0.0]]), 2.0, "linf").round(decimals=3)
        tensor([[1.5000, 0.5000],
                [0.5000, 0.0000]])
    """
    W, dtype = wide(V), V.dtype if dtype is None else dtype
    with full_precision(W):
        cap = (limit if isinstance(limit, Tensor) else W.new_full((), limit)) * (1.0 - rounding_slack(W))
        if norm == "l2":
            matrices, factor = folded(W)
            size = factor * gram_norm(matrices[0], steps)
        else:  # rounding changes each entry by half a unit, and subnormal ones by half of the smallest
            kind = torch.finfo(dtype)
            cap = ((1.0 - kind.eps) * cap - V.shape[1] * kind.smallest_normal * kind.eps).clamp_min(0.0)
            size = W.abs().sum(1, keepdim=True)
        W = (cap / size.clamp_min(_SMALLEST)).clamp_max(1.0) * W
        return stored(W, dtype, cap, folded) if norm == "l2" else W.to(dtype)


def proof_slack(terms: int, rate: float) -> float:
    """Return by what fraction a gain is lowered so that its proof, which divides by ``1 - factor``, does not exceed its limit.

    Args:
        terms: number of units.
        rate: the cap of the factor.

    Examples:
        >>> 0.0 < proof_slack(64, 0.99) < 1e-10
        True
    """
    return 8.0 * (terms + 12) * 2.0**-52 / (1.0 - rate)


def logit(fraction: Tensor) -> Tensor:
    """Return the number whose sigmoid is a fraction, kept away from 0 and 1.

    Examples:
        >>> logit(torch.tensor([0.5])).tolist()
        [0.0]
    """
    return fraction.clamp(1e-4, 1.0 - 1e-4).logit()


def initial_steps(memory: int, margin: float, n: int) -> Tensor:
    r"""Return steps from the one with :math:`1 - \tau\,\text{margin} = 1 - 1/\text{memory}` up to 0.95, with equal quotients.

    Args:
        memory: the number of steps over which the slowest unit forgets.
        margin: one minus the norm of what is mixed in, positive.
        n: the number of units.

    Examples:
        >>> initial_steps(4, 1.0, 1).tolist()
        [0.25]
    """
    slowest = min(0.95, 1.0 / (memory * margin))
    return torch.logspace(math.log2(slowest), math.log2(0.95), n, base=2.0)


def cyclic(weight: Tensor, size: float) -> None:
    r"""Fill a square matrix in place with a random cycle of all units, with random signs, times a number, plus a little noise.

    A dense random matrix with rows of the absolute sum 1 has a Euclidean norm of about :math:`n^{-1/2}`: a state is averaged away
    in one step. A cycle has the norm 1 in l2 as in linf, and hands the state on.

    Args:
        weight: the matrix.
        size: the absolute value of the entries of the cycle.

    Examples:
        >>> weight = torch.zeros(3, 3)
        >>> cyclic(weight, 1.0)
        >>> bool((weight.abs().round().sum(1) == 1.0).all())
        True
    """
    n = len(weight)
    with torch.no_grad():
        nn.init.normal_(weight, std=0.1 / n)
        order = torch.randperm(n, device=weight.device)
        signs = torch.randint(0, 2, (n,), device=weight.device) * 2 - 1
        weight[order, order.roll(1)] += size * signs.to(weight.dtype)
