"""A training of a few entries of the parameters, all others constants of the loss, and the derivative of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.optim import Optimizer

from stableopt.constraints.sharding import is_sharded
from stableopt.lyapunov.profile.studies.determinants import DeterminantFactors, Step, determinant_factors
from stableopt.lyapunov.profile.tangents.agreement import copied
from stableopt.lyapunov.profile.tangents.push import push, tangent_names
from stableopt.optim.curvature import Choice, Curvature, gradients
from stableopt.optim.regularize import regularizer_of
from stableopt.optim.rules import SpectralDescent, UpdateRule
from stableopt.optim.rules.base import State
from stableopt.optim.trial import loss_with_graph

__all__ = ["Slice"]

Array: TypeAlias = NDArray[np.float64]


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


class Slice:
    """A training of a few entries. As a context it puts the entries back at its end.

    Args:
        rule: of the optimizer.
        loss: returns the loss of a fixed batch with its graph.
        optimizer: that trains the model, left as it is.
        entries: how many entries move, drawn at random from those that can.
        seed: of the draw.

    Attributes:
        parts: the entries, by parameter; none if no parameter can move.
        entries: how many move.
        eps: of the coarsest dtype of their parameters.
        backend: how products with the Hessian were made.

    Examples:
        >>> from stableopt.optim import rule_for
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> with Slice(rule_for(optimizer), lambda: 0.5 * w.square().sum(), optimizer, 2, 0) as system:
        ...     A, H, _ = system.step(move=False)
        >>> A.tolist() == [[0.9, 0.0], [0.0, 0.9]], H.tolist()
        (True, [[1.0, 0.0], [0.0, 1.0]])
    """

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
            moving = tangent_names(self.rule, held, part.parameter)  # of a number also what is shaped like a count
            part.state = {
                k: part.of(v) if k in moving or _shaped(v, part.parameter) else copied(v) for k, v in held.items()
            }
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
    def step(self, *, move: bool) -> tuple[Array, Array, list[DeterminantFactors | str]]:
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
                    columns.append(torch.cat([h[other.index].reshape(-1).double().cpu() for other, h in Hv]).numpy())
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


def _shaped(value: object, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape and like.ndim > 0
