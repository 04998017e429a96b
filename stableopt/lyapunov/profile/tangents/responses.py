r"""The response of a training to its mechanism: to an error in one update, and to a hyper-parameter.

.. math:: D_{e_s}\theta_t\,e = \Pi_\theta\,\Phi(t, s + 1)\,(e, 0), \qquad
          D_\eta\theta_{t+1} = \Pi_\theta\bigl(A_t\, D_\eta s_t + \partial_\eta U_t\bigr) .

Both are carried along with the directions of the profile, without being made orthonormal. A response that becomes huge or tiny is
kept as a multiple of a power of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stableopt.lyapunov.profile.tangents.system import PARAMETER, System
from stableopt.optim.rules.base import real_view, unviewed

__all__ = ["ErrorResponses", "HyperResponse", "Responses"]

_DIFFERENTIABLE = ("lr", "momentum", "dampening", "weight_decay", "alpha", "eps")
_RANGE = 2.0**40
"""How far a response may leave 1 before it is scaled."""


@dataclass(frozen=True)
class ErrorResponses:
    r"""What errors of unit norm in single updates do to the parameters later.

    Args:
        starts: ``(e,)`` the steps in whose update the errors were made.
        log_norms: ``(e, W + 1)`` :math:`\log\|D_{e_s}\theta_t\,e\|` for t = s+1, s+2, …; NaN where the run ended before.

    Examples:
        >>> ErrorResponses(np.array([0]), np.zeros((1, 2))).peak
        0.0
    """

    starts: NDArray[np.int64]
    log_norms: NDArray[np.float64]

    @property
    def peak(self) -> float:
        """The largest response, as a logarithm; minus infinity without any.

        Examples:
            >>> ErrorResponses(np.array([0]), np.array([[0.0, 1.5]])).peak
            1.5
        """
        finite = self.log_norms[~np.isnan(self.log_norms)]
        return float(finite.max()) if finite.size else -math.inf


@dataclass(frozen=True)
class HyperResponse:
    r"""What a change of a hyper-parameter does to the parameters.

    Args:
        name: of the hyper-parameter.
        start: how many steps were taken before.
        log_norms: ``(n,)`` :math:`\log\|D_\eta\theta_t\|` after each step.

    Examples:
        >>> HyperResponse("lr", 0, np.zeros(3)).log_norms.shape
        (3,)
    """

    name: str
    start: int
    log_norms: NDArray[np.float64]


def _numbers_of(groups: list[dict[str, Any]]) -> list[str]:
    """Return the names of what is a number other than zero in all groups."""
    names = [n for n, v in groups[0].items() if isinstance(v, float | Tensor) and n in _DIFFERENTIABLE]
    return sorted(n for n in names if all(float(group.get(n, 0.0)) != 0.0 for group in groups))


class Responses:
    """Carry responses to errors and hyper-parameters through the steps of a system.

    Args:
        system: with its perturbations.
        every: an error is made every so many steps, and followed as long; None for none.
        hyper: names of hyper-parameters.
        seed: of the directions of the errors.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> system = System(torch.optim.SGD([w], lr=0.1))
        >>> system.begin(1, seed=0)
        >>> responses = Responses(system, None, ("lr",), seed=0)
        >>> responses.begin()
        >>> responses.forcing()
        {'lr': tensor([0., 1.], dtype=torch.float64)}
    """

    def __init__(self, system: System, every: int | None, hyper: tuple[str, ...], seed: int) -> None:
        self._system, self._every, self._hyper = system, every, hyper
        self._generator = torch.Generator().manual_seed(seed + 1)
        self._directions = 0
        self._first = -1
        self._starts: list[int] = []
        self._errors: list[list[float]] = []
        self._hyper_norms: dict[str, list[float]] = {name: [] for name in hyper}
        self._exponents: list[int] = []
        known = _numbers_of(system.optimizer.param_groups)
        for name in hyper:
            if name not in known:
                raise ValueError(
                    "hyper names a hyper-parameter of the optimizer that is a number other than zero (at zero a rule "
                    f"leaves out what belongs to it), one of {', '.join(known)}; got {name!r}."
                )

    @property
    def _rows(self) -> int:
        return (self._every is not None) + len(self._hyper)

    def begin(self) -> None:
        """Add the rows of the responses to those of the directions; they begin at zero."""
        columns = self._system.columns
        self._directions = len(columns[0][PARAMETER])
        self._exponents = [0] * self._rows
        if self._rows:
            for column in columns:
                for name, value in column.items():
                    column[name] = torch.cat([value, value.new_zeros(self._rows, *value.shape[1:])])

    def forcing(self) -> dict[str, Tensor] | None:
        """Return the tangents of the hyper-parameters for the step to come, None if there are none."""
        if not self._hyper:
            return None
        device = self._system.parameters[0].device
        found = {}
        for offset, name in enumerate(self._hyper, start=int(self._every is not None)):
            tangent = torch.zeros(self._directions + self._rows, dtype=torch.float64, device=device)
            tangent[self._directions + offset] = 2.0 ** -self._exponents[offset]
            found[name] = tangent
        return found

    def advanced(self, step: int) -> None:
        """Measure the responses after a step, and make an error in it if it is time.

        Args:
            step: the number of the step, from 0.
        """
        if self._first < 0:
            self._first = step
        for offset, name in enumerate(self._hyper, start=int(self._every is not None)):
            self._hyper_norms[name].append(self._measured(offset))
        if self._every is not None:
            if self._errors:
                self._errors[-1].append(self._measured(0))
            if (step - self._first) % self._every == 0:
                self._strike()
                self._starts.append(step)
                self._errors.append([self._measured(0)])

    def errors(self) -> ErrorResponses | None:
        """Return the responses to errors, None if none were made."""
        if not self._errors or self._every is None:
            return None
        table = np.full((len(self._errors), self._every + 1), math.nan)
        for i, norms in enumerate(self._errors):
            table[i, : len(norms)] = norms
        return ErrorResponses(np.array(self._starts, dtype=np.int64), table)

    def hyper(self) -> tuple[HyperResponse, ...]:
        """Return the responses to hyper-parameters."""
        return tuple(HyperResponse(n, max(self._first, 0), np.array(norms)) for n, norms in self._hyper_norms.items())

    def _measured(self, offset: int) -> float:
        """Return the logarithm of a response; scale the row if it leaves its range."""
        row = self._directions + offset
        square = sum(
            torch.linalg.vector_norm(real_view(c[PARAMETER][row]), dtype=torch.float64) ** 2
            for c in self._system.columns
        )
        norm = math.sqrt(float(square))
        log_norm = math.log(norm) + self._exponents[offset] * math.log(2.0) if norm > 0 else -math.inf
        if norm > _RANGE or 0.0 < norm < 1.0 / _RANGE:
            shift = math.frexp(norm)[1]
            for column in self._system.columns:
                for value in column.values():
                    value[row] *= 2.0**-shift
            self._exponents[offset] += shift
        return log_norm

    def _strike(self) -> None:
        """Begin the row of errors anew: a random direction of unit norm in the parameters."""
        row, columns = self._directions, self._system.columns
        drawn = []
        for column in columns:
            view = real_view(column[PARAMETER][row])
            drawn.append(torch.randn(view.shape, generator=self._generator, dtype=torch.float64).to(view))
        size = math.sqrt(sum(float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2 for d in drawn))
        for column, d in zip(columns, drawn, strict=True):
            for name, value in column.items():
                value[row] = unviewed(d / size, value[row]) if name == PARAMETER else 0.0
        self._exponents[0] = 0
