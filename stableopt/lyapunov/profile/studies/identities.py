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
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.optim import Optimizer

from stableopt.constraints.sharding import is_sharded
from stableopt.lyapunov.curvature import apart
from stableopt.lyapunov.profile.plain import plain
from stableopt.lyapunov.profile.studies.determinants import Factors, Step, determinant_factors, log_determinant
from stableopt.lyapunov.profile.tangents.push import push, tangent_names
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import rule_for
from stableopt.optim.curvature import Choice, Curvature, gradients
from stableopt.optim.regularize import regularizer_of
from stableopt.optim.rules import SpectralDescent, UpdateRule
from stableopt.optim.rules.base import State
from stableopt.optim.trial import loss_with_graph

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
        system = _Slice(rule, loss, optimizer, entries, seed)
        if not system.parts:
            return IdentityCheck(
                name,
                reason="each parameter has a prox or a set, is not float32 or float64, is sharded, or is not in the loss",
            )
        with system:
            return replace(_summed(system, steps), optimizer=name)


def _summed(system: _Slice, steps: int) -> IdentityCheck:
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
        law, rough = log_determinant([part for part in laws if isinstance(part, Factors)], H)
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
    closed = " and ".join(dict.fromkeys(part.name for part in laws if isinstance(part, Factors)))
    said = "" if tolerance < 0.1 else f"rounding is {tolerance:.1g}: the check says little"
    return IdentityCheck(
        "", closed, system.entries, steps, expected, measured, error, tolerance, tuple(np.sort(growth / steps)[::-1].tolist()),
        bool(error <= tolerance), system.backend, said,
    )  # fmt: skip


class _Part:
    """Entries of one parameter that move: a line of numbers with its state, or, where a rule needs it, the whole parameter."""

    def __init__(
        self, parameter: Tensor, group: dict[str, Any], index: tuple[Tensor, ...], count: int, whole: bool
    ) -> None:
        self.parameter, self.group, self.index, self.count, self.whole = parameter, group, index, count, whole
        self.state: State = {}

    def of(self, x: Tensor) -> Tensor:
        """Return the entries of a tensor as a line, or a copy of all of it."""
        return x.detach().clone() if self.whole else x.detach()[self.index].reshape(-1)

    def picked(self, x: Tensor) -> Tensor:
        """Return the entries of what :meth:`of` gave, or of many such."""
        return x[(..., *self.index)] if self.whole else x

    def picked_now(self) -> Tensor:
        """Return the present values of the entries."""
        return self.parameter.detach()[self.index].reshape(-1).clone()

    def spread(self, rows: Tensor) -> Tensor:
        """Return ``(k, d)`` in the form of what :meth:`of` gives, zero elsewhere."""
        if not self.whole:
            return rows
        full = rows.new_zeros(rows.shape[0], *self.parameter.shape)
        full[(slice(None), *self.index)] = rows
        return full

    def lines(self, state: State) -> State:
        """Return a state with the entries only."""
        return {k: self.picked(v) if self.whole and _shaped(v, self.parameter) else v for k, v in state.items()}

    def frozen(self, new: State) -> State:
        """Return a state after a step, in which nothing but the entries has changed."""
        if not self.whole:
            return new
        mask = torch.zeros_like(self.parameter, dtype=torch.bool)
        mask[self.index] = True
        return {k: torch.where(mask, v, self.state[k]) if _shaped(v, self.parameter) else v for k, v in new.items()}

    def write(self, values: Tensor) -> None:
        """Set the entries; nobody's graph takes it for a change."""
        with torch.no_grad(), same_version(self.parameter):
            self.parameter[self.index] = values.reshape(self.parameter[self.index].shape)


class _Slice:
    """A training of a few entries. As a context it puts the entries back at its end."""

    def __init__(
        self, rule: UpdateRule, loss: Callable[[], Tensor], optimizer: Optimizer, entries: int, seed: int
    ) -> None:
        self.rule, self.loss, self.optimizer = rule, loss, optimizer
        self.choice, self.backend = Choice(loss), ""
        self.parts = _drawn(self._candidates(), entries, seed, whole=isinstance(rule, SpectralDescent))
        self.entries = sum(part.count for part in self.parts)
        self.eps = max((torch.finfo(part.parameter.dtype).eps for part in self.parts), default=0.0)
        self._moved = False

    def __enter__(self) -> Self:
        self._kept = [part.picked_now() for part in self.parts]
        for part, g in zip(self.parts, self._gradients(), strict=True):
            held = self.optimizer.state.get(part.parameter, {})
            part.state = {k: part.of(v) if _shaped(v, part.parameter) else _copied(v) for k, v in held.items()}
            if not part.state:  # a first step is imagined, of which only the state is taken
                with torch.no_grad():
                    part.state = self.rule.update(part.of(part.parameter), part.of(g), {}, part.group)[1]
        return self

    def __exit__(self, *_: object) -> None:
        if self._moved:
            for part, kept in zip(self.parts, self._kept, strict=True):
                part.write(kept)

    @property
    def dimension(self) -> int:
        """How many numbers move, with their state."""
        return sum(part.count * (1 + len(self._names(part))) for part in self.parts)

    @torch.no_grad()
    def step(self, *, move: bool) -> tuple[Array, Array, list[Factors | str]]:
        """Do one step, and return its derivative, the Hessian, and what is known of each part."""
        grads, H = self._gradients(), self._hessian()
        N, start, columns, begun, laws, after = self.dimension, 0, [], 0, [], []
        identity = torch.eye(N, dtype=torch.float64)
        along = torch.cat([torch.from_numpy(H), torch.zeros(N - len(H), len(H), dtype=torch.float64)])
        order = self._positions()
        along = along[order]  # row i: what the i-th number of the state does to the gradient
        for part, g in zip(self.parts, grads, strict=True):
            names, d = self._names(part), part.count
            rows = {
                name: part.spread(identity[:, start + j * d : start + (j + 1) * d].to(g))
                for j, name in enumerate(("", *names))
            }
            pushed = push(
                self.rule, part.group, part.of(part.parameter), part.of(g), part.state, rows.pop(""),
                part.spread(along[:, begun : begun + d].to(g)), rows,
            )  # fmt: skip
            start, begun = start + d * (1 + len(names)), begun + d
            columns += [part.picked(x) for x in (pushed.d_parameter, *(pushed.d_state[name] for name in names))]
            done = Step(part.group, part.lines(part.state), part.lines(pushed.state), d)
            laws.append(determinant_factors(self.rule, done))
            after.append((part.picked(pushed.parameter), part.frozen(pushed.state)))
        if move:
            self._moved = True
            for part, (value, state) in zip(self.parts, after, strict=True):
                part.write(value)
                part.state = state
        return torch.cat([c.double().cpu() for c in columns], dim=1).numpy().T, H, laws

    def _candidates(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the parameters of which entries can move."""
        found = []
        for group in self.optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                free = "prox" not in group or regularizer_of(group, i) is None
                kind = p.requires_grad and not is_sharded(p) and p.dtype in {torch.float32, torch.float64}
                if free and kind and p.numel():
                    found.append((p, {k: v for k, v in group.items() if k != "params"}))
        if not found:
            return []
        with torch.enable_grad():
            grads = gradients(loss_with_graph(self.loss), [p for p, _ in found])
        return [pair for pair, g in zip(found, grads, strict=True) if g is not None]

    def _gradients(self) -> list[Tensor]:
        parameters = [part.parameter for part in self.parts]
        with torch.enable_grad():
            grads = gradients(loss_with_graph(self.loss), parameters)
        return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, grads, strict=True)]

    def _hessian(self) -> Array:
        """Return the Hessian in the entries, column by column."""
        parameters = [part.parameter for part in self.parts]

        def task(product: Curvature) -> tuple[str, list[Array]]:
            columns = []
            for i, part in enumerate(self.parts):
                for e in range(part.count):
                    v = [torch.zeros_like(p) for p in parameters]
                    v[i][tuple(x[e] for x in part.index)] = 1.0
                    Hv = zip(self.parts, product(v), strict=True)
                    columns.append(torch.cat([h[other.index].double().cpu() for other, h in Hv]).numpy())
            return product.name, columns

        with torch.enable_grad():
            self.backend, columns = self.choice.run(parameters, task)
        return np.stack(columns, axis=1)

    def _positions(self) -> Tensor:
        """Return, for each number of the state, the row of its entry in the Hessian padded with zeros."""
        found: list[int] = []
        entry, zero = 0, self.entries
        for part in self.parts:
            found += range(entry, entry + part.count)
            others = part.count * len(self._names(part))
            found += range(zero, zero + others)
            entry, zero = entry + part.count, zero + others
        return torch.tensor(found)

    def _names(self, part: _Part) -> tuple[str, ...]:
        return tangent_names(self.rule, part.state, part.of(part.parameter))


def _drawn(candidates: list[tuple[Tensor, dict[str, Any]]], entries: int, seed: int, *, whole: bool) -> list[_Part]:
    """Draw entries of all parameters alike."""
    sizes = [p.numel() for p, _ in candidates]
    total = sum(sizes)
    if not total:
        return []
    generator = torch.Generator().manual_seed(seed)
    chosen = set()
    while len(chosen) < min(entries, total):  # no permutation of all entries, of which there may be very many
        chosen |= set(torch.randint(total, (min(entries, total) - len(chosen),), generator=generator).tolist())
    parts, start = [], 0
    for (p, group), size in zip(candidates, sizes, strict=True):
        mine = torch.tensor(sorted(i - start for i in chosen if start <= i < start + size), device=p.device)
        start += size
        if len(mine):
            shape = p.shape or (1,)
            parts.append(_Part(p, group, torch.unravel_index(mine, shape) if p.shape else (), len(mine), whole))
    return parts


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


def _shaped(value: object, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape and like.ndim > 0


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
