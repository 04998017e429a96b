r"""A self-test on the user's own model: the sum of all exponents of a training is known, whatever the loss is.

A few entries of the parameters are let move, all others are constants of the loss. What moves, with its optimizer state, is a
training of its own, small enough to write its derivative A down. :math:`\log|\det A|` must then be what
:mod:`stableopt.lyapunov.profile.studies.determinants` says: :math:`d\ln\beta` for SGD with momentum,
:math:`d\ln\beta_1\beta_2` for Adam.
It is the sum of all exponents, so everything that goes into exponents is tested at once: products with the Hessian, update maps,
their derivatives, and the state that the optimizer has come to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.curvature import apart
from stableopt.lyapunov.profile.plain import plain
from stableopt.lyapunov.profile.studies.determinants import DeterminantFactors, determinant_factors, log_determinant
from stableopt.lyapunov.profile.studies.slices import Slice
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import rule_for

__all__ = ["IdentityCheck", "check_identities"]

Array: TypeAlias = NDArray[np.float64]

_ROUNDINGS = 16.0
"""Relative roundings that an entry of the derivative is taken to have seen."""


@dataclass(frozen=True)
class IdentityCheck:
    r"""What :func:`check_identities` found.

    Args:
        optimizer: the name of its class.
        name: the closed form, d the number of entries; empty if there is none.
        entries: d.
        steps: over which logarithms are summed.
        expected: the closed form.
        measured: :math:`\sum_t\log|\det A_t|`.
        error: how far the two are apart.
        tolerance: what rounding can amount to, to first order: :math:`16\,\epsilon\,\mathrm{tr}(|A^{-1}||A|)`, summed, for the
            machine epsilon of the parameters.
        exponents: of all directions over these steps, largest first, in units in which the first step is balanced; their sum times
            the steps is ``measured``.
        holds: whether the error is within the tolerance; None if nothing is known.
        backend: how products with the Hessian were made.
        reason: one sentence if nothing is known, or the tolerance says nothing; else empty.

    Examples:
        >>> IdentityCheck("Rprop", reason="nothing is known").holds is None
        True
    """

    optimizer: str
    name: str = ""
    entries: int = 0
    steps: int = 0
    expected: float = math.nan
    measured: float = math.nan
    error: float = math.nan
    tolerance: float = math.nan
    exponents: tuple[float, ...] = ()
    holds: bool | None = None
    backend: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what is not known is None.

        Examples:
            >>> IdentityCheck("Rprop").as_dict()["error"] is None
            True
        """
        return plain(asdict(self))

    def __str__(self) -> str:
        if self.holds is None:
            return f"identity of {self.optimizer}: not checked, {self.reason}"
        if not self.holds:
            return (
                f"identity {self.name} of {self.optimizer} FAILS: {self.measured:.10g} instead of {self.expected:.10g}, "
                f"{self.error:.1g} apart where rounding is {self.tolerance:.1g}"
            )
        error = max(self.error, np.finfo(np.float64).eps)
        said = f"identity {self.name} of {self.optimizer} ({self.entries} entries): {self.expected:.6g}, holds to {error:.0e}"
        return f"{said}; {self.reason}" if self.reason else said


def check_identities(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: Optimizer,
    *,
    entries: int = 8,
    steps: int = 1,
    seed: int = 0,
) -> IdentityCheck:
    r"""Compare the sum of all exponents of a few entries with its closed form, and leave model and optimizer as they are.

    Args:
        model: in the mode in which it is trained.
        loss: returns the loss of a fixed batch with its graph, forward only.
        optimizer: that trains the model; before its first step the check begins after a first one, which is imagined.
        entries: d, how many entries of the parameters move, drawn at random; about two passes forward and backward each.
        steps: how many steps are done, each with the loss at the entries as they have moved.
        seed: of the draw.

    Returns:
        The check. ``holds`` is None, with a reason, for an optimizer without a rule, for one of which no identity is known (Muon
        with Nesterov's momentum), and where each parameter has a prox, a set, half precision or complex numbers.

    Raises:
        ValueError: if entries or steps are not positive, or the loss is not one real number with a graph.

    Note:
        The identity holds for any symmetric H, so it does not test that products with the Hessian are right, only that they are
        used alike; where the closed form contains H (SGD without momentum), that they are symmetric.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        >>> x = torch.ones(5, 3, dtype=torch.float64)
        >>> found = check_identities(
        ...     net, lambda: net(x).square().mean(), torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        ... )
        >>> round(found.expected, 9) == round(8 * math.log(0.9 * 0.999 * 0.95), 9), found.error < 1e-10, found.holds
        (True, True, True)
    """
    if entries < 1 or steps < 1:
        raise ValueError(f"entries and steps must be at least 1, got {entries!r} and {steps!r}.")
    name = type(optimizer).__name__
    rule = rule_for(optimizer)
    if rule is None:
        return IdentityCheck(
            name, reason="nothing is known about its update; register a rule with stableopt.optim.rule_for.register"
        )
    if determinant_factors.dispatch(type(rule)) is determinant_factors.dispatch(object):
        return IdentityCheck(name, reason=f"no identity is known for the determinant of {type(rule).__name__}")
    with undisturbed(model), apart(model, loss):
        system = Slice(rule, loss, optimizer, entries, seed)
        if not system.parts:
            return IdentityCheck(
                name,
                reason="each parameter has a prox or a set, is not float32 or float64, is sharded, or is not in the loss",
            )
        with system:
            return replace(_summed(system, steps), optimizer=name)


def _summed(system: Slice, steps: int) -> IdentityCheck:
    """Sum logarithms over steps."""
    expected = measured = tolerance = 0.0
    Q = np.eye(system.dimension)
    growth = np.zeros(system.dimension)
    laws, units = [], np.ones(system.dimension)
    for t in range(steps):
        A, H, laws = system.step(move=t + 1 < steps)
        refused = next((law for law in laws if isinstance(law, str)), "")
        if refused:
            return IdentityCheck("", entries=system.entries, reason=refused)
        law, rough = log_determinant([part for part in laws if isinstance(part, DeterminantFactors)], H)
        value, spread = _log_abs_det(A)
        expected, measured = expected + law, measured + value
        tolerance += (
            rough + (_ROUNDINGS * system.eps + len(A) * np.finfo(np.float64).eps) * spread if law > -math.inf else 0.0
        )
        units = _units(A) if t == 0 else units
        Q, R = np.linalg.qr(_balanced(A, units) @ Q)
        with np.errstate(divide="ignore"):
            growth += np.log(np.abs(np.diag(R)))
    error = 0.0 if expected == measured else abs(expected - measured)
    closed = " and ".join(dict.fromkeys(part.name for part in laws if isinstance(part, DeterminantFactors)))
    holds, said = _judged(expected, measured, error, tolerance)
    return IdentityCheck(
        "", closed, system.entries, steps, expected, measured, error, tolerance, tuple(np.sort(growth / steps)[::-1].tolist()),
        holds, system.backend, said,
    )  # fmt: skip


def _judged(expected: float, measured: float, error: float, tolerance: float) -> tuple[bool | None, str]:
    """Return whether an identity holds, None if that cannot be said, and the reason or what limits the check."""
    if expected == -math.inf < measured:
        return None, (
            "the closed form is minus infinity, as the step takes a direction to zero, and rounding leaves a finite "
            f"determinant ({measured:.3g})"
        )
    return bool(error <= tolerance), "" if tolerance < 0.1 else f"rounding is {tolerance:.1g}: the check says little"


def _log_abs_det(A: Array) -> tuple[float, float]:
    r"""Return :math:`\log|\det A|` and :math:`\mathrm{tr}(|A^{-1}||A|)`, what relative changes of entries do to it.

    Examples:
        >>> value, spread = _log_abs_det(np.diag([2.0, 1e-9]))
        >>> round(value - math.log(2e-9), 12), spread
        (0.0, 2.0)
    """
    B = _balanced(A, _units(A))
    value = float(np.linalg.slogdet(B)[1])
    if not math.isfinite(value):
        return value, math.inf
    return value, float(np.sum(np.abs(np.linalg.inv(B)).T * np.abs(B)))


def _units(A: Array) -> Array:
    r"""Return units c, powers of 2, that make rows and columns of :math:`A_{ij}c_j/c_i` equally large: those of a state are any."""
    away, units = np.abs(A) * (1.0 - np.eye(len(A))), np.ones(len(A))
    for _ in range(16):
        for i in range(len(A)):
            row, column = away[i].sum(), away[:, i].sum()
            if row > 0.0 and column > 0.0:
                scale = 2.0 ** round(0.5 * math.log2(row / column))
                away[i] /= scale
                away[:, i] *= scale
                units[i] *= scale
    return units


def _balanced(A: Array, units: Array) -> Array:
    return A * units / units[:, None]
