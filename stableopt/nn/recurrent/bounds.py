r"""What is proved about one step of a recurrent cell, and the gain of a sequence that follows.

A cell :math:`h_t = F(h_{t-1}, x_t)` is bounded in a norm of the state by two numbers,

.. math:: \|F(h, x) - F(h', x')\|_P \le a\,\|h - h'\|_P + b\,\|x - x'\| .

With :math:`a < 1` it contracts: two runs on the same input approach each other by :math:`a` per step, and two runs from the same
state on two inputs stay together. By Young's inequality for the convolution with :math:`a^k`, for every length and every
:math:`p \in [1, \infty]`,

.. math:: \Bigl(\sum_t \|h_t - h'_t\|_P^p\Bigr)^{1/p} \le \frac{b}{1 - a} \Bigl(\sum_t \|x_t - x'_t\|^p\Bigr)^{1/p} .
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.dispatch import check_forward, named, require_norm
from stableopt.nn.sharded import refuse_spread

__all__ = ["FEATURE_NORMS", "CellBound", "cell_bound", "cell_rule", "sequence_gain"]

FEATURE_NORMS = {"l2": "l2", "linf": "linf", "l1": "l1", "token_max": "l2"}
"""The norm of one time step that belongs to a norm of whole sequences; over time it is l2, linf, l1 and linf."""


_ONE = Bound.point(1.0)


@dataclass(frozen=True)
class CellBound:
    r"""The proved constants of one step of a cell.

    Args:
        state: :math:`a`, the factor of a difference of states in the norm :math:`\|\cdot\|_P`.
        input: :math:`b`, from the plain norm of the input into :math:`\|\cdot\|_P`.
        output: the constant from :math:`\|\cdot\|_P` of the state to the plain norm of the cell's output; 1 for the state itself.
        metric: what :math:`P` is, for printing.
        peak: a bound of :math:`\max_t\|h_t - h'_t\|_P / \max_t\|x_t - x'_t\|` for every length that is known to be better than
            :math:`b/(1-a)`; only for ``"linf"``, the norm that takes the maximum over time. None for no such bound.
        initial: the largest modulus of an entry of the initial states from which all this holds; infinity for all states.

    Examples:
        >>> CellBound(Bound.point(0.5), Bound.point(1.0)).gain().upper
        2.0
    """

    state: Bound
    input: Bound
    output: Bound = _ONE
    metric: str = "the norm of the state"
    peak: Bound | None = None
    initial: float = math.inf

    @property
    def contracts(self) -> bool:
        """Whether the state is proved to contract: :math:`a < 1`."""
        return self.state.proved and self.state.upper < 1.0

    def gain(self, length: int | None = None) -> Bound:
        r"""Return the gain from input to output sequences.

        .. math:: c\,b \sum_{k<T} a^k \le \frac{c\,b}{1 - a}

        Args:
            length: :math:`T`, the largest number of steps; None for any, which needs :math:`a < 1`.

        Returns:
            A bound from 0 to the gain, infinite for a cell that does not contract over unlimited time.

        Raises:
            ValueError: if the length is no positive integer.

        Examples:
            >>> CellBound(Bound.point(2.0), Bound.point(1.0)).gain(3).upper
            7.0
        """
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise ValueError(f"length must be an integer >= 1 or None, got {length!r}.")
        proved = self.state.proved and self.input.proved and self.output.proved
        a, ends = Bound.point(self.state.upper), []
        if a.upper < 1.0:
            ends.append((self.input.upper / (1.0 - a)).upper)
        if length is not None:
            ends.append((self.input.upper * _powers(a, length)).upper)
        if self.peak is not None:
            ends.append(self.peak.upper)
            proved = proved and self.peak.proved
        if not ends:
            return Bound(0.0, math.inf if self.input.upper > 0.0 else 0.0, proved)
        return Bound(0.0, (self.output.upper * Bound.point(min(ends))).upper, proved)


def _powers(a: Bound, length: int) -> Bound:
    r"""Bound :math:`\sum_{k<T} a^k` from above, by halving: the sum of :math:`2n` terms is :math:`(1 + a^n)` times that of n."""
    total, power = Bound.point(1.0), a  # the sum of n terms and a^n, for n = 1
    for bit in bin(length)[3:]:
        total, power = total * (1.0 + power), power * power
        if bit == "1":
            total, power = 1.0 + a * total, a * power
    return Bound.point(total.upper)


@functools.singledispatch
def cell_rule(cell: nn.Module, norm: str) -> CellBound:  # noqa: ARG001 the interface of the rules
    """Return the constants of one step of a cell; register a function for a class of your own, call :func:`cell_bound`.

    Args:
        cell: the cell; a rule reads its current parameters.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``, of one input and one output.

    Raises:
        UncertifiableError: for a class without a rule.

    Examples:
        >>> cell_rule(nn.Identity(), "l2")
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: no rule is known for one step of Identity. ...
    """
    name = type(cell).__name__
    raise UncertifiableError(
        f"no rule is known for one step of {name}. Register one: @stableopt.nn.cell_rule.register({name}) on a function "
        "(cell, norm) -> CellBound."
    )


def cell_bound(cell: nn.Module, norm: str = "l2") -> CellBound:
    """Bound one step of a recurrent cell, for the numbers stored now.

    Args:
        cell: a cell with a rule; it is left as it is.
        norm: ``"l2"``, ``"linf"``, ``"l1"``, or ``"token_max"``, whose single steps are measured in l2.

    Returns:
        The constants, proved.

    Raises:
        TypeError: if ``cell`` is no module.
        ValueError: if the norm is unknown, or a weight holds NaN or infinity.
        UncertifiableError: if no rule is known for the class or for the norm, or a hook or subclass may change the map.

    Examples:
        >>> cell_bound(nn.Identity())
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: no rule is known for one step of Identity. ...
    """
    require_norm(norm)
    if not isinstance(cell, nn.Module):
        raise TypeError(f"cell_bound needs a torch.nn.Module, got {type(cell).__name__}.")
    refuse_spread(cell, UncertifiableError)
    if any(t.is_meta for t in (*cell.parameters(), *cell.buffers())):
        raise UncertifiableError(f"{named(cell, '')} is on the meta device, which holds no numbers.")
    for kind in type(cell).__mro__:
        if kind in cell_rule.registry and kind is not object:
            check_forward(cell, kind)
            break
    with torch.no_grad():
        return cell_rule(cell, FEATURE_NORMS[norm])


def sequence_gain(cell: nn.Module, norm: str, length: int | None = None) -> Bound:
    """Bound the map from input to output sequences that a cell makes from a fixed initial state.

    The moduli of that state must be within :attr:`CellBound.initial`, as zeros always are.

    Args:
        cell: a cell with a rule.
        norm: of whole sequences, without the batch: ``"l2"`` and ``"l1"`` sum over time and features, ``"linf"`` is the largest
            entry, ``"token_max"`` the largest Euclidean norm of a time step.
        length: the largest number of steps, None for any.

    Returns:
        A bound from 0 to the gain.

    Raises:
        UncertifiableError: if no rule is known, or the cell is not proved to contract and no length is given.

    Examples:
        >>> sequence_gain(nn.Identity(), "l2")
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: no rule is known for one step of Identity. ...
    """
    bound = cell_bound(cell, norm)
    gain = bound.gain(length)
    if math.isinf(gain.upper):
        raise UncertifiableError(
            f"{type(cell).__name__} is not proved to contract in {bound.metric}: one step has the factor {bound.state.upper:.6g}, "
            "so its gain has no bound for every length. Give the largest length, or use a cell that contracts by construction."
        )
    return gain
