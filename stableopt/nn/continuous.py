r"""Continuous depth: a stack as the discretization of a flow, with its step limit and the rate of the flow (T7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.arguments import check_positive
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.residual.fields import Field, check_field, field_bound, field_norm
from stableopt.nn.residual.runge_kutta import (
    RungeKuttaBlock,
    contractivity_radius,
    runge_kutta_step,
    step_bound,
    tableau_of,
)
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.theory import ButcherTableau, flow_factor

__all__ = ["ContinuousDepth", "FlowBound", "flow_bound"]


@dataclass(frozen=True)
class FlowBound:
    r"""What is proved about a flow: the difference of two solutions is at its end at most ``factor`` times that at its start.

    Args:
        time: T.
        rate: :math:`m`, the mean over time of the rate: the logarithmic norm of the derivative is at most :math:`-m`.
        factor: :math:`e^{-mT}`, from 0.

    Examples:
        >>> from stableopt.nn import GradientField
        >>> flow = ContinuousDepth(GradientField(3, strong=0.5), time=2.0).flow()
        >>> flow.rate.lower, round(flow.factor.upper, 6)
        (0.5, 0.367879)
    """

    time: Bound
    rate: Bound
    factor: Bound


class ContinuousDepth(nn.Module):
    r"""The flow of a field over a time, integrated by steps that cannot expand.

    .. math::
        \dot h = f_k(h) \;\text{ for }\; t \in \Bigl[\tfrac{k}{K}T, \tfrac{k+1}{K}T\Bigr), \qquad
        \tau_k = \min\Bigl(\frac{T}{K n_k},\; c\,\tau_{\max}(f_k)\Bigr), \quad n_k \text{ steps of } \tau_k \text{ for each field.}

    One field is a neural differential equation with shared weights; several are one with weights that are constant in time by
    pieces. The step is that of the time T as long as it is below the limit of the method along the field
    (:class:`RungeKuttaBlock`). If training makes the field so steep that it is not, the steps stop at the limit: the map still
    does not expand, but it is the flow over a shorter time, :meth:`reached`. :meth:`refine` then takes as many steps as T needs.

    The flow contracts by :math:`e^{-mT}` where the rate :math:`m` of the field is positive (:meth:`flow`), and the proved constant
    of the steps, :func:`stableopt.nn.lipschitz`, approaches that number as they get smaller: :math:`(1 - \tau m)^{T/\tau} \to
    e^{-mT}`.

    Args:
        fields: a :class:`Field`, or a sequence of them in the order of time; all with a limit in one norm.
        time: T > 0.
        method: as in :class:`RungeKuttaBlock`.
        steps: n, the number of steps for each field; None for as many as the present limit asks for.

    Raises:
        TypeError: if a field is no :class:`Field`.
        ValueError: if there is no field, their norms differ, an argument is out of range, the method has no limit but 0, or the
            given number of steps makes a step longer than its limit; the sentence says how many it takes. On the meta device,
            if no number of steps is given.

    Note:
        The numbers of steps are settings, not part of ``state_dict``. A method of higher order follows the flow more closely, but
        allows no longer steps; adaptive integrators such as Dormand-Prince have no step at which they are nonexpansive.

    References:
        Chen, Rubanova, Bettencourt and Duvenaud, *Neural Ordinary Differential Equations*, 2018; Söderlind, *The Logarithmic Norm*,
        2006.

    Examples:
        >>> from stableopt.nn import DissipativeField, lipschitz
        >>> _ = torch.manual_seed(0)
        >>> field = DissipativeField(4, rate=0.5)
        >>> flow = ContinuousDepth(field, time=2.0)
        >>> lipschitz(flow).upper < 1.0
        True
        >>> fine = ContinuousDepth(field, time=2.0, steps=2000)
        >>> 0.999 < lipschitz(fine).upper / fine.flow().factor.upper < 1.001
        True
    """

    def __init__(
        self,
        fields: Field | Sequence[Field],
        *,
        time: float = 1.0,
        method: str | ButcherTableau = "euler",
        steps: int | None = None,
    ) -> None:
        super().__init__()
        listed = [fields] if isinstance(fields, Field) else list(fields)
        if not listed:
            raise ValueError("ContinuousDepth needs at least one field.")
        for field in listed:
            if not isinstance(field, Field):
                raise TypeError(f"the fields of ContinuousDepth must be Fields, got {type(field).__name__}.")
        if len(norms := {field.norm for field in listed}) > 1:
            raise ValueError(f"the fields of ContinuousDepth must have their limits in one norm, got {sorted(norms)}.")
        check_positive(time=time)
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"steps must be an integer >= 1 or None, got {steps!r}.")
        self.tableau = tableau_of(method)
        self.norm = listed[0].norm
        self.radius = contractivity_radius(self.tableau, self.norm)
        self.time = float(time)
        self.fields = nn.ModuleList(listed)
        self.steps = [1 if steps is None else steps] * len(listed)
        if steps is None:
            self.refine()
        else:
            self._require(steps)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the state at the end."""
        state = input
        for field, count in zip(self.fields, self.steps, strict=True):
            step = self._step(field, count)
            for _ in range(count):
                state = runge_kutta_step(field, state, step, self.tableau)
        return state

    def step_sizes(self) -> list[Tensor]:
        r"""Return the step :math:`\tau_k` for each field, 0-d tensors, at least float32 and differentiable.

        Examples:
            >>> from stableopt.nn import GradientField
            >>> [round(float(tau.detach()), 6) for tau in ContinuousDepth(GradientField(3), steps=4).step_sizes()]
            [0.25]
        """
        return [self._step(field, count) for field, count in zip(self.fields, self.steps, strict=True)]

    @torch.no_grad()
    def reached(self) -> float:
        """Return the time that the steps reach now, the time T unless a limit is in the way.

        Examples:
            >>> from stableopt.nn import GradientField
            >>> round(ContinuousDepth(GradientField(3), time=3.0).reached(), 6)
            3.0
        """
        return sum(n * float(step) for n, step in zip(self.steps, self.step_sizes(), strict=True))

    @torch.no_grad()
    def refine(self) -> list[int]:
        """Take as many steps as the time needs at the present limits, and return their numbers.

        Call it between optimizer steps, where :meth:`reached` falls short of the time, or before a deployment.

        Raises:
            ValueError: if a field has no limit that is positive and finite in number: a parameter is NaN or infinite or too large.

        Examples:
            >>> from stableopt.nn import GradientField
            >>> field = GradientField(3)
            >>> flow = ContinuousDepth(field, time=3.0)
            >>> _ = nn.init.constant_(field.weight, 2.0)
            >>> flow.refine()
            [55]
        """
        self.steps = [self._needed(field) for field in self.fields]
        return self.steps

    def flow(self, norm: str | None = None) -> FlowBound:
        """Return what is proved about the flow itself, the limit of many steps, over the whole time.

        Args:
            norm: None for the norm of the fields.

        Examples:
            >>> from stableopt.nn import InfNormField
            >>> ContinuousDepth(InfNormField(3, rate=0.5), time=2.0).flow().factor.upper < 0.37
            True
        """
        share = Bound.point(self.time) / len(self.fields)
        return _flow(((field, share) for field in self.fields), self.norm if norm is None else norm)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"time={self.time}, method={self.tableau.name!r}, steps={self.steps}"

    def _step(self, field: nn.Module, count: int) -> Tensor:
        limit = self._limit(field)
        return limit.clamp_max(self.time / (len(self.fields) * count))

    def _limit(self, field: nn.Module) -> Tensor:
        if not isinstance(field, Field):
            raise TypeError(f"the fields of ContinuousDepth must be Fields, got {type(field).__name__}.")
        return (1.0 - 2.0**-22) * self.radius * field.step_limit()

    def _needed(self, field: nn.Module) -> int:
        if (tensor := self._limit(field).detach()).is_meta:
            raise ValueError("the meta device holds no numbers to take a step limit from; give the number of steps.")
        limit = float(tensor)
        if not 0.0 < limit < math.inf:
            raise ValueError(
                f"no number of steps reaches the time {self.time}: the step limit of {type(field).__name__} is {limit}; its "
                "parameters are NaN, infinite or too large."
            )
        share = self.time / len(self.fields)
        count = max(1, math.ceil(share / limit))
        return count if share / count <= limit else count + 1

    def _require(self, steps: int) -> None:
        for field in self.fields:
            if any(p.is_meta for p in field.parameters()):
                continue
            if (needed := self._needed(field)) > steps:
                raise ValueError(
                    f"steps={steps} makes steps of {self.time / (len(self.fields) * steps):.6g}, above the limit "
                    f"{float(self._limit(field).detach()):.6g} of {self.tableau.name} along {type(field).__name__}. Take at least "
                    f"{needed} steps, or steps=None for as many as it takes."
                )


@torch.no_grad()
def flow_bound(stack: Iterable[nn.Module], norm: str = "l2") -> FlowBound:
    r"""Return what is proved about the flow that a stack of blocks discretizes.

    Block l with the step :math:`\tau_l` follows its field :math:`f_l` over the time :math:`\tau_l`: the stack is near the flow over
    the time :math:`\sum_l\tau_l`, and its constant near :math:`\exp(-\sum_l\tau_l m_l)` where the steps are small.

    Args:
        stack: blocks of the class :class:`RungeKuttaBlock`, such as :class:`DissipativeBlock`.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Raises:
        UncertifiableError: if a block is of another class.

    Examples:
        >>> from stableopt.nn import DissipativeBlock, lipschitz
        >>> stack = nn.Sequential(*[DissipativeBlock(4, rate=0.5, depth=16) for _ in range(16)])
        >>> 0.99 < lipschitz(stack).upper / flow_bound(stack).factor.upper < 1.01
        True
    """
    parts = []
    for block in stack:
        if not isinstance(block, RungeKuttaBlock):
            raise UncertifiableError(
                f"flow_bound needs blocks that step along a field, got {type(block).__name__}. Use RungeKuttaBlock or "
                "DissipativeBlock."
            )
        parts.append((block.field, Bound.point(float(block.step_size())) * block.substeps))
    return _flow(parts, norm)


def _flow(parts: Iterable[tuple[nn.Module, Bound]], norm: str) -> FlowBound:
    time, grown, factor = Bound.point(0.0), Bound.point(0.0), Bound.point(1.0)
    for field, share in parts:
        if not isinstance(field, Field):
            raise TypeError(f"a flow needs Fields, got {type(field).__name__}.")
        rate = field_bound(field, norm).rate
        time, grown = time + share, grown + share * rate
        piece = flow_factor(Bound.point(rate.lower), share)
        factor = factor * (piece if isinstance(piece, Bound) else Bound.point(piece)).upper
    mean = grown / time if time.lower > 0.0 else grown
    return FlowBound(time, mean, Bound(0.0, factor.upper))


@lipschitz_rule.register(ContinuousDepth)
def _continuous(module: ContinuousDepth, norm: str) -> Bound:
    total = Bound.point(1.0)
    for field, step, count in zip(module.fields, module.step_sizes(), module.steps, strict=True):
        tau = float(step.detach())
        if not isinstance(field, Field) or not math.isfinite(tau):
            raise ValueError(f"no bound holds for ContinuousDepth with NaN or infinite parameters (step {tau}).")
        one = Bound.point(step_bound(module.tableau, field_bound(field, norm), tau).upper)
        total = total * one**count
    return Bound(0.0, total.upper)


@uniform_rule.register(ContinuousDepth)
def _uniform(module: ContinuousDepth, norm: str) -> Bound | None:
    for field in module.fields:
        if not isinstance(field, Field) or field.norm != module.norm:  # replaced: the steps are limited for another one
            return None
        check_field(field)
    return Bound(0.0, 1.0) if norm == module.norm or (norm == TOKEN_MAX and module.norm == "l2") else None


@token_rule.register(ContinuousDepth)
def _token(module: ContinuousDepth) -> Bound:
    for field in module.fields:
        if isinstance(field, Field):
            field_norm(field, TOKEN_MAX)
    return _continuous(module, "l2")
