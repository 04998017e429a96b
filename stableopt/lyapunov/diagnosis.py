"""What a diagnosis says: the ways to make products with the Hessian, the tiers of the monitor, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stableopt.lyapunov.profile.studies.identities import IdentityCheck

__all__ = ["BUDGET", "Diagnosis", "Tier", "Way", "advise"]

BUDGET = 0.05
"""The share of the time of the run that the monitor takes by default."""
_NEAR = 1e-2  # two ways that differ by less agree


@dataclass(frozen=True)
class Way:
    """One way to make a product with the Hessian, on this loss.

    Args:
        name: ``graph``, ``exact``, ``forward`` or ``difference``.
        works: whether it does.
        why: one sentence if it does not, or if its products are doubtful; else empty.
        cost: of one product from nothing, in units of one forward and backward pass; for ``graph`` without the forward pass.
        further: of each further product at the same parameters, in the same unit.
        difference: of its product from that of the first way that works, relative; NaN for that one.

    Examples:
        >>> Way("exact", True, "", 3.0, 1.5, float("nan")).of(4)
        7.5
    """

    name: str
    works: bool
    why: str = ""
    cost: float = math.nan
    further: float = math.nan
    difference: float = math.nan

    def of(self, products: int) -> float:
        """Return the cost of several products at the same parameters.

        Args:
            products: how many.
        """
        return self.cost + (products - 1) * self.further


@dataclass(frozen=True)
class Tier:
    """One instrument of the monitor, on this model.

    Args:
        name: as in :class:`stableopt.lyapunov.Every`.
        measures: what.
        runs: whether it can.
        why: one sentence if it cannot, or not fully; else empty.
        cost: of a look, in units of one forward and backward pass.
        every: the interval, in steps, at which the default budget allows it.

    Examples:
        >>> Tier("energy", "the loss after the step", True, "", 0.4, 8).every
        8
    """

    name: str
    measures: str
    runs: bool
    why: str
    cost: float
    every: int


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`stableopt.lyapunov.doctor.diagnose` found.

    Args:
        parameters: how many numbers are trained.
        seconds: of one forward and backward pass.
        repeatable: whether the loss gives the same value again, with the same parameters, buffers and random numbers.
        unused: names of parameters that the loss does not depend on.
        kinks: names of the modules with activations that have kinks.
        operations: kinds of operations with kinks in the graph of the loss, which may sit outside of modules.
        statistics: names of the modules that carry running statistics.
        random: names of the modules that draw random numbers in their present mode.
        ways: each way to make a product with the Hessian.
        chosen: the name of the one that the monitor takes; empty if none works.
        tiers: each instrument of the monitor.
        notes: sentences on what to do or to know.
        identity: the self-test of tangents on a few entries of the model; None without an optimizer.

    Examples:
        >>> found = Diagnosis(3, 1e-3, True, (), (), (), (), (), (Way("exact", True, "", 3.0, 1.6),), "exact", (), ())
        >>> print(str(found).splitlines()[3].split())
        ['exact*', 'yes', '3', 'fb', '1.6', 'fb']
    """

    parameters: int
    seconds: float
    repeatable: bool
    unused: tuple[str, ...]
    kinks: tuple[str, ...]
    operations: tuple[str, ...]
    statistics: tuple[str, ...]
    random: tuple[str, ...]
    ways: tuple[Way, ...]
    chosen: str
    tiers: tuple[Tier, ...]
    notes: tuple[str, ...]
    identity: IdentityCheck | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what is not known is None.

        Examples:
            >>> Diagnosis(3, 1e-3, True, (), (), (), (), (), (Way("exact", False),), "", (), ()).as_dict()["ways"][0][
            ...     "cost"
            ... ]
        """
        return _plain(asdict(self))

    def __str__(self) -> str:
        lines = [f"{self.parameters} parameters, {1e3 * self.seconds:.3g} ms for forward and backward (fb)", ""]
        lines.append(f"{'Hessian products':<18s}{'works':<7s}{'first':>8s}{'further':>9s}{'differs':>9s}")
        for way in self.ways:
            numbers = (_fb(way.cost), _fb(way.further), "" if math.isnan(way.difference) else f"{way.difference:.0e}")
            mark = "*" if way.name == self.chosen else ""
            row = f"{way.name + mark:<18s}{'yes' if way.works else 'no':<7s}{numbers[0]:>8s}{numbers[1]:>9s}{numbers[2]:>9s}"
            lines.append(row + (f"  {way.why}" if way.why else ""))
        lines += ["", f"{'monitor':<18s}{'runs':<7s}{'look':>8s}{'every':>9s}  at a budget of {BUDGET:.0%}"]
        for tier in self.tiers:
            every = str(tier.every) if tier.runs else "-"
            row = f"{tier.name:<18s}{'yes' if tier.runs else 'no':<7s}{_fb(tier.cost):>8s}{every:>9s}  {tier.measures}"
            lines.append(row + (f" ({tier.why})" if tier.why else ""))
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip()


def advise(found: Diagnosis, limits: str, values: tuple[float, float]) -> tuple[str, ...]:
    """Return the sentences that belong to a diagnosis.

    Args:
        found: all but the notes.
        limits: what is known about those of the optimizer.
        values: the loss, evaluated twice.

    Examples:
        >>> found = Diagnosis(1, 1.0, True, (), (), (), ("norm",), (), (), "exact", (), ())
        >>> advise(found, "", (1.0, 1.0))[0]
        'batch statistics are part of the curvature; running statistics are put back after each look'
    """
    ways = {way.name: way for way in found.ways}
    rough = bool(found.kinks or found.operations)
    notes: Sequence[tuple[bool, str]] = (
        (
            not found.repeatable,
            f"the loss is not repeatable ({values[0]:.6g}, then {values[1]:.6g}): draw the batch outside of it",
        ),
        (not found.chosen, "no product with the Hessian can be made: curvature stays unknown"),
        (found.chosen == "difference", "products are differences of gradients: good to a few digits in float32"),
        (
            rough and "difference" in ways and ways["difference"].difference > _NEAR,
            "with kinks a difference measures their jumps, too, and autograd does not: the two are different quantities",
        ),
        (
            rough and found.chosen == "difference",
            "the loss has kinks and only differences work: the curvature depends on their step",
        ),
        (
            not rough and any(way.works and way.difference > _NEAR for way in found.ways),
            "the ways disagree though no kink was seen: something is hidden from autograd (no_grad, detach, a custom backward)",
        ),
        (
            bool(found.unused),
            f"the loss does not depend on {', '.join(found.unused[:3])}{' and others' if len(found.unused) > 3 else ''}",
        ),
        (bool(found.random), "each look draws the same masks of dropout, so its readings can be compared"),
        (
            bool(found.statistics),
            "batch statistics are part of the curvature; running statistics are put back after each look",
        ),
        (True, limits),
        (found.identity is not None, f"{found.identity}: the sum of all exponents, on a slice of this model"),
    )
    return tuple(note for holds, note in notes if holds)


def _fb(cost: float) -> str:
    return "-" if math.isnan(cost) else f"{cost:.2g} fb" if cost < 100 else f"{cost:.0f} fb"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
