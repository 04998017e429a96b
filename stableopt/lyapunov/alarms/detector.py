"""A sequential test of how often something happens, whatever the dependence between the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["EDetector", "finite_number"]

_LARGE = 1e300
"""More evidence than this is as good as this: it keeps the sums finite."""


class EDetector:
    r"""Notice that an event comes more often than a healthy run has it.

    Null hypothesis: given the past, the event comes with probability :math:`P(v_t=1\mid v_1,\dots,v_{t-1})\le p_0`. For each
    alternative rate :math:`q > p_0`, with the likelihood ratio
    :math:`L_t = q/p_0` if the event comes and :math:`(1-q)/(1-p_0)` if it does not,

    .. math::
        M_t = (M_{t-1} + 1)\,L_t, \qquad M_0 = 0 .

    Under the null hypothesis :math:`E[L_t\mid\text{past}]\le 1`, so :math:`M_t - t` is a supermartingale, and the first time
    :math:`\tau` at which the mean of M over the rates reaches a threshold A has :math:`E[\tau]\ge A`: with ``run_length`` as the
    threshold, the mean number of observations until a false alarm is at least ``run_length``. The events may depend on each other
    in any way.

    Args:
        null: :math:`p_0` in (0, 1).
        run_length: A, a finite number > 1: the mean number of observations until a false alarm is at least this.
        rates: the alternatives q, each in (p0, 1); by default four rates between p0 and 1.

    Raises:
        ValueError: if a number is out of range.

    Note:
        The bound is on the mean: a false alarm in the first n observations has a probability of at most :math:`n/A`, since
        :math:`P(\tau\le n) \le E[M_{\tau\wedge n}]/A \le n/A`.

    References:
        Shin, Ramdas, Rinaldo, *E-detectors: a nonparametric framework for sequential change detection*, NEJSDS 2023.

    Examples:
        >>> detector = EDetector(null=0.1, run_length=1e4)
        >>> steps = 0
        >>> while detector.statistic < detector.run_length:
        ...     steps, _ = steps + 1, detector.update(True)
        >>> steps
        5
    """

    def __init__(self, null: float, run_length: float, rates: Sequence[float] | None = None) -> None:
        self.null = finite_number("EDetector", "null", null, low=0.0, high=1.0)
        self.run_length = finite_number("EDetector", "run_length", run_length, low=1.0)
        if rates is None:  # from a rate that is a little too high to one where it nearly always comes
            rates = [null + (1.0 - null) * share for share in (0.1, 0.3, 0.6, 0.9)]
        self.rates = tuple(finite_number("EDetector", "each of rates", q, low=self.null, high=1.0) for q in rates)
        if not self.rates:
            raise ValueError("EDetector needs at least one rate, got none: leave rates out to have four.")
        self._come = tuple(q / self.null for q in self.rates)
        self._stay = tuple((1.0 - q) / (1.0 - self.null) for q in self.rates)
        self.reset()

    @property
    def statistic(self) -> float:
        """The mean of M over the rates, to be compared with ``run_length``.

        Examples:
            >>> EDetector(null=0.1, run_length=1e4).statistic
            0.0
        """
        return self._statistic

    @property
    def evidence(self) -> tuple[int, int, int]:
        """How often the event came, among how many observations, since which step: where the likelihood sees the change.

        Examples:
            >>> detector = EDetector(null=0.1, run_length=1e4)
            >>> for step, event in enumerate([False, False, True, True, False, True], start=1):
            ...     _ = detector.update(event, step)
            >>> detector.evidence
            (3, 4, 3)
        """
        best = max(range(len(self._sums)), key=self._sums.__getitem__)
        came, seen, since = self._since[best]
        return came, seen, since

    @property
    def alert(self) -> bool:
        """Whether the last observations speak for a change, far from enough for an alarm: a reason to look more often.

        Examples:
            >>> detector = EDetector(null=0.1, run_length=1e4)
            >>> _ = detector.update(True)
            >>> detector.alert
            True
        """
        return max(self._peaks) > 4.0

    def reset(self) -> None:
        """Forget the evidence.

        Examples:
            >>> detector = EDetector(null=0.1, run_length=1e4)
            >>> _ = detector.update(True)
            >>> detector.reset()
            >>> detector.statistic, detector.evidence
            (0.0, (0, 0, 0))
        """
        self._sums = [0.0] * len(self.rates)
        self._peaks = [1.0] * len(self.rates)
        self._since = [[0, 0, 0] for _ in self.rates]
        self._statistic, self._at_rest = 0.0, False

    def update(self, event: bool, step: int = 0) -> float:
        """Take one observation and return the statistic.

        Args:
            event: whether it came.
            step: at which step, for :attr:`evidence`.

        Examples:
            >>> detector = EDetector(null=0.25, run_length=100.0, rates=[0.5])
            >>> detector.update(True), detector.update(True)
            (2.0, 6.0)
        """
        if self._at_rest and not event:
            return self._statistic
        before = list(self._sums)
        for i, ratio in enumerate(self._come if event else self._stay):
            self._sums[i] = min((self._sums[i] + 1.0) * ratio, _LARGE)
            self._note(i, event, step, ratio)
        self._at_rest = self._sums == before and not event  # a quiet run stays where it is
        self._statistic = math.fsum(self._sums) / len(self._sums)
        return self._statistic

    def _note(self, i: int, event: bool, step: int, ratio: float) -> None:
        """Keep where the likelihood of rate i sees the change: the highest product of ratios up to now, and its first step."""
        if self._peaks[i] * ratio <= 1.0:
            self._peaks[i], self._since[i] = 1.0, [0, 0, 0]
            return
        came, seen, since = self._since[i]
        self._peaks[i] = min(self._peaks[i] * ratio, _LARGE)
        self._since[i] = [came + event, seen + 1, since if seen else step]

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence.

        Examples:
            >>> EDetector(null=0.1, run_length=1e4, rates=[0.5]).state_dict()
            {'sums': [0.0], 'peaks': [1.0], 'since': [[0, 0, 0]]}
        """
        return {"sums": list(self._sums), "peaks": list(self._peaks), "since": [list(row) for row in self._since]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: as :meth:`state_dict` gave it.

        Raises:
            ValueError: if it has another number of rates.

        Examples:
            >>> detector = EDetector(null=0.1, run_length=1e4)
            >>> detector.load_state_dict(detector.state_dict())
        """
        if len(state["sums"]) != len(self.rates):
            raise ValueError(
                f"this EDetector has {len(self.rates)} rates, the state is of one with {len(state['sums'])}: make both alike."
            )
        self._sums, self._peaks = list(state["sums"]), list(state["peaks"])
        self._since = [list(row) for row in state["since"]]
        self._statistic, self._at_rest = math.fsum(self._sums) / len(self._sums), False


def finite_number(owner: str, name: str, value: object, *, low: float, high: float = math.inf) -> float:
    """Return a number that lies strictly between two others.

    Args:
        owner: who needs it, for the message.
        name: of the argument, for the message.
        value: what was given.
        low: it must be greater.
        high: it must be less.

    Raises:
        ValueError: if it is not such a number.

    Examples:
        >>> finite_number("Increase", "null", 0.1, low=0.0, high=1.0)
        0.1
        >>> finite_number("Increase", "null", 2.0, low=0.0, high=1.0)
        Traceback (most recent call last):
        ValueError: Increase needs null as a number between 0 and 1, got 2.0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        where = f"a number between {low:g} and {high:g}" if math.isfinite(high) else f"a finite number > {low:g}"
        raise ValueError(f"{owner} needs {name} as {where}, got {value!r}.")
    return float(value)
