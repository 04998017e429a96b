r"""A ledger of learning rates: from a few sums, kept step by step, the uniform stability of the run follows.

Uniform stability bounds how much the loss of any example can change when one of the n training samples is replaced: the gap between
training and test loss, in the mean (THEORY T4). The laws are in :mod:`stableopt.theory.stochastic`; what they ask for is checked
here.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from stableopt.linalg.bound import Real, lower, upper
from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.rules import HeavyBall, rule_for
from stableopt.theory import (
    accumulated_convex_stability,
    accumulated_nonsmooth_displacement,
    accumulated_stability,
    gradient_descent_factor,
    nonconvex_stability,
    strongly_convex_stability,
)

__all__ = ["StabilityLedger"]

_NUMBERS = (
    "steps", "total", "squares", "largest", "rise", "log_growth", "drift",
    "most_momentum", "least_decay", "most_decay", "most_shrink", "unequal", "adapted", "nonconvex_sets", "ascents",
)  # fmt: skip


class StabilityLedger:
    r"""Keep the sums of the learning rates of an optimizer, a few additions per step, and bound the stability of the run.

    A hook after each step adds the learning rate that was used: that of the group, for our optimizers that of ``last_step`` (0 for
    a step that was undone). With the smoothness L and the smallest curvature :math:`\mu` of the loss of a sample it also keeps
    the growth :math:`\gamma_t = \max(|1-\eta_t\mu|, |1-\eta_tL|)` and the propagated sum :math:`S_{t+1} = \gamma_tS_t+\eta_t`.

    Args:
        optimizer: the ledger reads it after each of its steps; a bound can be had if it is SGD without momentum.
        smoothness: L >= 0, without the weight decay; None if :meth:`propagated` is not asked for.
        smallest_curvature: :math:`\mu \le L`: 0 for convex losses, positive for strongly convex ones; None for :math:`-L`, which
            holds for every L-smooth loss.

    Attributes:
        steps: T, how many steps were recorded.
        total: :math:`\sum_t\eta_t`.
        squares: :math:`\sum_t\eta_t^2`.
        largest: :math:`\max_t\eta_t`.
        rise: :math:`\max_t t\eta_t`, t from 1: the smallest c with :math:`\eta_t \le c/t`.
        log_growth: :math:`\sum_t\log\gamma_t`; 0 without a smoothness.
        drift: S; 0 without a smoothness.
        adapted: in how many steps a guard changed the learning rate.

    Raises:
        TypeError: if the optimizer is none.
        ValueError: if a group has no learning rate, or an argument is out of range.

    Note:
        The weight decay :math:`\omega` is part of the step and accounted for: it adds :math:`\omega` to :math:`\mu` and L, and
        cancels in the difference of two runs on one batch, so G stays that of the loss. What the ledger cannot see is yours to
        know: that samples are drawn uniformly, that gradients are not clipped (clipping is no gradient of a convex loss), and that
        learning rates do not follow the data.

    References:
        Hardt, Recht and Singer, Train faster, generalize better, 2016; Bassily et al., Stability of stochastic gradient descent on
        nonsmooth convex losses, 2020.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> ledger = StabilityLedger(optimizer)
        >>> for _ in range(2):
        ...     w.grad = torch.ones(1)
        ...     optimizer.step()
        >>> ledger.total, ledger.convex(lipschitz=1.0, samples=4, smoothness=4.0)
        (1.0, 0.5)
    """

    def __init__(
        self, optimizer: Optimizer, *, smoothness: float | None = None, smallest_curvature: float | None = None
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"an optimizer is needed, a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has a group without lr: there is nothing to record.")
        if smoothness is None and smallest_curvature is not None:
            raise ValueError("smallest_curvature needs smoothness, the other end of the curvatures.")
        if smoothness is not None:
            gradient_descent_factor(0.0, -smoothness if smallest_curvature is None else smallest_curvature, smoothness)
        self.smoothness, self.smallest_curvature = smoothness, smallest_curvature
        self.steps, self.adapted = 0, 0
        self.total = self.squares = self.largest = self.rise = self.log_growth = self.drift = 0.0
        self.most_momentum, self.least_decay, self.most_decay, self.most_shrink = 0.0, math.inf, 0.0, 0.0
        self.unequal, self.nonconvex_sets, self.ascents = 0, 0, 0
        self._other = "" if isinstance(rule_for(optimizer), HeavyBall) else type(optimizer).__name__
        self._hook = optimizer.register_step_post_hook(self._record)

    def close(self) -> None:
        """Stop recording; the sums stay."""
        self._hook.remove()

    @property
    def growth(self) -> float:
        r"""How much one difference between two runs can have grown: :math:`\prod_t\gamma_t`; NaN without a smoothness."""
        return math.nan if self.smoothness is None else math.exp(min(self.log_growth, 709.0))

    def convex(self, lipschitz: Real, samples: int, *, smoothness: Real, same_rates: bool = False) -> Real:
        r"""Bound the uniform stability for convex losses: :math:`\frac{2G^2}{n}\sum_t\eta_t`, all :math:`\eta_t \le 2/(L+\omega)`.

        Args:
            lipschitz: G, of the loss of a sample, without the weight decay.
            samples: n.
            smoothness: L, of the loss of a sample, without the weight decay.
            same_rates: accept learning rates that a guard has fitted to the data: the bound then compares two runs with the same.

        Returns:
            The bound, in units of the loss.

        Raises:
            ValueError: with the reason, if the run was not what the theorem speaks of.
        """
        self._check(same_rates)
        return accumulated_convex_stability(lipschitz, samples, self.total, self.largest, smoothness + self.most_decay)

    def strongly_convex(
        self, lipschitz: Real, samples: int, *, strong: Real, smoothness: Real, same_rates: bool = False
    ) -> Real:
        r"""Bound the uniform stability for m-strongly convex losses: :math:`\frac{2G^2}{(m+\omega)n}`.

        All :math:`\eta_t \le 1/(L+\omega)`.

        Args:
            lipschitz: G, without the weight decay, on a set that the run does not leave: a strongly convex loss has no other.
            samples: n.
            strong: m of the loss of a sample without the weight decay, 0 if only the decay is strongly convex.
            smoothness: L, without the weight decay.
            same_rates: as for :meth:`convex`.

        Returns:
            The bound, for any number of steps.

        Raises:
            ValueError: with the reason, if the run was not what the theorem speaks of.
        """
        self._check(same_rates)
        most = upper(smoothness) + self.most_decay
        if self.largest * most > 1.0:
            raise ValueError(
                f"the theorem needs every lr to be at most 1 / (smoothness + weight decay) = {1 / most:.6g}, "
                f"but {self.largest:.6g} was used; convex() allows twice as much."
            )
        if lower(strong) > upper(smoothness):
            raise ValueError(f"strong cannot exceed smoothness, got {strong!r} > {smoothness!r}.")
        return strongly_convex_stability(lipschitz, samples, strong + (self.least_decay if self.steps else 0.0))

    def nonconvex(self, lipschitz: Real, samples: int, *, smoothness: Real, same_rates: bool = False) -> float:
        r"""Bound the uniform stability for losses in [0, 1] that need not be convex, with c = ``rise``.

        Args:
            lipschitz: G, without the weight decay.
            samples: n >= 2.
            smoothness: L > 0, without the weight decay.
            same_rates: as for :meth:`convex`.

        Returns:
            The bound; far above 1, so empty, unless learning rates fall like 1/t.

        Raises:
            ValueError: with the reason, if the run was not what the theorem speaks of.
        """
        self._check(same_rates, convex=False)
        if self.most_shrink > 2.0:
            raise ValueError(
                f"the decay must not overshoot: lr times weight_decay reached {self.most_shrink:.6g}, at most 2 is allowed."
            )
        if self.rise == 0.0:
            return 0.0
        return nonconvex_stability(lipschitz, samples, smoothness, self.rise, self.steps)

    def nonsmooth(self, lipschitz: Real, samples: int, *, same_rates: bool = False) -> Real:
        r"""Bound the uniform stability for convex losses with kinks: :math:`G^2(2\sqrt{\sum\eta_t^2}+\frac4n\sum\eta_t)`.

        Args:
            lipschitz: G, without the weight decay.
            samples: n; one sample per step, drawn with replacement.
            same_rates: as for :meth:`convex`.

        Returns:
            The bound; the first term does not vanish with n. No learning rate is too large.

        Raises:
            ValueError: with the reason, if the run was not what the theorem speaks of.
        """
        self._check(same_rates)
        if self.most_shrink > 1.0:
            raise ValueError(
                f"the decay must not overshoot: lr times weight_decay reached {self.most_shrink:.6g}, at most 1 is allowed."
            )
        return lipschitz * accumulated_nonsmooth_displacement(lipschitz, samples, self.total, self.squares)

    def propagated(self, lipschitz: Real, samples: int, *, same_rates: bool = False) -> Real:
        r"""Bound the uniform stability from the recorded growth: :math:`\frac{2G^2}{n}S_T`. No learning rate is too large.

        It is the sharpest bound of the ledger: for :math:`\mu \ge 0` and small learning rates it is at most those of
        :meth:`convex` and :meth:`strongly_convex`.

        Args:
            lipschitz: G, without the weight decay.
            samples: n; batches of any size.
            same_rates: as for :meth:`convex`.

        Returns:
            The bound.

        Raises:
            ValueError: with the reason, if the ledger was made without a smoothness or the run was not what the law speaks of.
        """
        if self.smoothness is None:
            raise ValueError(
                "no growth was recorded: make the ledger with smoothness=, and smallest_curvature= if known."
            )
        self._check(same_rates, convex=False)
        if self.ascents:
            raise ValueError(
                f"the recorded growth is that of descent, but {self.ascents} groups' steps maximized: their growth is that of "
                "curvatures with the other sign."
            )
        return accumulated_stability(lipschitz, samples, self.drift)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: the sums, and what the checks need."""
        own = {"smoothness": self.smoothness, "smallest_curvature": self.smallest_curvature}
        return own | {name: getattr(self, name) for name in _NUMBERS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved sums.

        Args:
            state_dict: as returned by :meth:`state_dict`.

        Raises:
            ValueError: if it lacks a number, or was kept for other curvatures.
        """
        missing = [name for name in _NUMBERS if name not in state_dict]
        if missing:
            raise ValueError(f"the state of a ledger needs {', '.join(missing)}.")
        for name in ("smoothness", "smallest_curvature"):
            if state_dict.get(name) != getattr(self, name):
                raise ValueError(
                    f"the state was kept with {name}={state_dict.get(name)!r}, this ledger has {getattr(self, name)!r}."
                )
        for name in _NUMBERS:
            setattr(self, name, state_dict[name])

    def _record(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Add the step just taken; torch calls this."""
        groups = optimizer.param_groups
        lrs = [float(group["lr"]) for group in groups]
        report = optimizer.last_step if isinstance(optimizer, GuardedOptimizer) else None
        if report is not None:
            self.adapted += report.scale != 1.0 or report.action == "restarted"
            if (
                groups[0]["guard"] != "lazy"
            ):  # a lazy guard reports the step before: count what was scheduled, which is not less
                lrs = [used if math.isfinite(used) else lr for used, lr in zip(report.lr, lrs, strict=True)]
        eta = max(lrs)
        self.steps += 1
        self.total += eta
        self.squares += eta * eta
        self.largest = max(self.largest, eta)
        self.rise = max(self.rise, self.steps * eta)
        self.unequal += min(lrs) != eta
        self._note_settings(groups, lrs)
        if self.smoothness is not None:
            self._grow(eta, [float(group.get("weight_decay", 0.0)) for group in groups])

    def _note_settings(self, groups: list[dict[str, Any]], lrs: list[float]) -> None:
        for group, lr in zip(groups, lrs, strict=True):
            omega = float(group.get("weight_decay", 0.0))
            self.most_momentum = max(self.most_momentum, float(group.get("momentum", 0.0)))
            self.least_decay, self.most_decay = min(self.least_decay, omega), max(self.most_decay, omega)
            self.most_shrink = max(self.most_shrink, lr * omega)
            self.ascents += bool(group.get("maximize", False))
            self.nonconvex_sets += any(not g.convex for g in _regularizers(group))

    def _grow(self, eta: float, decays: list[float]) -> None:
        L = float(self.smoothness or 0.0)
        mu = -L if self.smallest_curvature is None else self.smallest_curvature
        growth = float(upper(gradient_descent_factor(eta, mu + min(decays), L + max(decays))))
        self.log_growth += math.log(growth) if growth > 0 else -math.inf
        self.drift = growth * self.drift + eta

    def _check(self, same_rates: bool, *, convex: bool = True) -> None:
        """Refuse with a sentence what the theorems do not speak of."""
        if self._other:
            raise ValueError(
                f"the bounds are for SGD; {self._other} steps in a metric of its own, in which a gradient step on a convex "
                "loss can separate two runs."
            )
        if self.most_momentum > 0:
            raise ValueError(
                f"the bounds are for SGD without momentum, but momentum {self.most_momentum:g} was used: with it a step is not "
                "nonexpansive in the parameters alone."
            )
        if self.unequal:
            raise ValueError(
                f"the bounds need one learning rate for all groups, but in {self.unequal} steps they differed."
            )
        if self.ascents and convex:
            raise ValueError(
                f"the bounds for convex losses are for descent, but {self.ascents} groups' steps maximized: "
                "ascent on a convex loss "
                "separates two runs."
            )
        if self.nonconvex_sets:
            kind = "convex" if convex else "any"
            raise ValueError(
                f"the bounds for {kind} losses need convex penalties and sets, whose prox separates nothing; a group has "
                "another one."
            )
        if self.adapted and not same_rates:
            raise ValueError(
                f"in {self.adapted} steps a guard fitted the learning rate to the data, so a run on other data would use others; "
                "same_rates=True bounds the difference of two runs that use the same."
            )


def _regularizers(group: dict[str, Any]) -> list[Any]:
    """Return the penalties and sets of a group, one or one per parameter."""
    found: list[Any] = []
    for key in ("prox", "constraint"):
        value = group.get(key)
        found += value if isinstance(value, list | tuple) else [value]
    return [g for g in found if g is not None]
