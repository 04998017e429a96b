"""A second state of a training run, stepped in the objects of the first one, which is put back bit for bit."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.optim import Optimizer

from stableopt.lyapunov.lengths import read
from stableopt.lyapunov.undisturbed import Snapshot, undisturbed
from stableopt.optim import GuardedOptimizer
from stableopt.optim.copies import _is_number, copied
from stableopt.optim.snapshot import MOMENTA, OF_SCHEDULERS

__all__ = ["NONNEGATIVE", "Shadow"]

_NOT_COPIED = frozenset({"params", "prox", "constraint"})
_NOT_OWN = frozenset({
    "param_groups", "state", "defaults", "last_step", "_versions", "_memory", "_pending", "_process_group", "_warned",
    "_opt_called",
})  # fmt: skip
"""Attributes of an optimizer that no step changes, or that :meth:`Shadow.run` treats by itself."""
NONNEGATIVE = frozenset({
    "acc_delta", "col_var", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "row_var", "running_var", "square_avg", "sum", "variance",
})  # fmt: skip
"""Names of second moments in torch's optimizers and of variances in its layers, which cannot be negative."""
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


class Shadow:
    r"""Another state :math:`(\theta', u')` of a model and its optimizer, which goes through the same steps.

    It is kept beside the state of the run. For one step it takes its place: parameters by a copy in place, everything else (state,
    numbers of groups, attributes, gradients) by exchanging references, so that what belongs to the run is never written into. No
    hook of the optimizer is called meanwhile.

    Args:
        model: whose buffers belong to the state.
        optimizer: any torch optimizer over some of its parameters.

    Attributes:
        clipped: entries of second moments (:data:`NONNEGATIVE`) that :meth:`rescale` would have made negative, and that are 0.

    Note:
        Learning rates, and the momentum where a scheduler sets it, are those of the run. Objects in the state of an optimizer that
        are no tensors, numbers, lists, tuples or dictionaries are copied in the beginning, and :meth:`rescale` leaves them.
        Python attributes that a model changes by itself are shared.

    Examples:
        >>> w = nn.Parameter(torch.tensor([2.0]))
        >>> model = nn.ParameterList([w])
        >>> optimizer = torch.optim.SGD([w], lr=0.25)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> shadow = Shadow(model, optimizer)
        >>> shadow.perturb(1.0)
        >>> shadow.begin()
        >>> _ = optimizer.step(closure)
        >>> shadow.run(lambda: optimizer.step(closure))
        >>> w.item(), shadow.distance()
        (1.0, 0.5)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._start: Snapshot | None = None
        self.clipped = 0
        self.copy()

    @torch.no_grad()
    def copy(self) -> None:
        """Begin anew at the state of the run."""
        optimizer = self._optimizer
        self._parameters = _unique([p for group in optimizer.param_groups for p in group["params"]])
        self._leaves = _unique([*self._parameters, *self._model.parameters()])  # a closure gives gradients to them all
        self._values = [p.detach().clone() for p in self._parameters]
        self._states = {key: copied(state) for key, state in optimizer.state.items()}
        self._groups = [copied(_numbers(group, _of_the_run(group))) for group in optimizer.param_groups]
        self._attributes = copied(_attributes(optimizer))
        self._report: Any = getattr(optimizer, "last_step", None)
        self._buffers = [
            (module, name, buffer.detach().clone())
            for module in self._model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def perturb(self, size: float, seed: int = 0) -> None:
        r"""Move :math:`\theta'` by a vector of a given length in a random direction, uniform on the sphere.

        Args:
            size: the length in units of the parameters.
            seed: of the direction.
        """
        generator = torch.Generator().manual_seed(seed)
        moves = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu") * float(p.requires_grad)
            for p in self._parameters
        ]
        length = math.sqrt(sum(float(move.square().sum()) for move in moves))
        for value, move in zip(self._values, moves, strict=True):
            value.copy_(value.double() + (move * (size / length)).to(value.device))

    def norm(self) -> float:
        r"""Return :math:`\|\theta\|` of the run, over the parameters that are trained."""
        return _length([p.detach() for p in self._parameters if p.requires_grad])

    @torch.no_grad()
    def distance(self, scales: Mapping[str, float] | None = None) -> float:
        r"""Return :math:`\bigl(\|\theta'-\theta\|^2 + \sum_n s_n^2 \|u'_n-u_n\|^2\bigr)^{1/2}`.

        Args:
            scales: :math:`s_n` by the name of a tensor in the state; what is not named does not count.

        Raises:
            ValueError: if no state of the optimizer has a tensor of that name, though it has some.
        """
        parts = [value - p for value, p in zip(self._values, self._parameters, strict=True)]
        seen: set[str] = set()
        for key in {**self._optimizer.state, **self._states}:
            mine, real = self._states.get(key, {}), self._optimizer.state.get(key, {})
            if not isinstance(mine, dict) or not isinstance(real, dict):
                continue
            seen |= {k for k, v in {**mine, **real}.items() if isinstance(v, Tensor) and v.is_floating_point()}
            parts += [s * _difference(mine.get(name), real.get(name)) for name, s in (scales or {}).items()]
        unknown = sorted(set(scales or {}) - seen)
        if seen and unknown:
            raise ValueError(f"the state has no tensor called {unknown[0]!r}; it has {', '.join(sorted(seen))}.")
        return _length(parts)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        r"""Move everything to :math:`s + c\,(s' - s)`, s the state of the run: parameters, state, numbers, buffers.

        Integers, and numbers that are whole in both states (counters), stay as they are.

        Args:
            factor: :math:`c \ge 0`.
        """
        for value, p in zip(self._values, self._parameters, strict=True):
            value.copy_(self._between(value, p.detach(), factor))
        real = self._optimizer.state
        self._states = {k: self._between(v, real.get(k), factor) for k, v in self._states.items()}
        self._groups = [
            self._between(mine, group, factor)
            for mine, group in zip(self._groups, self._optimizer.param_groups, strict=True)
        ]
        self._attributes = self._between(self._attributes, vars(self._optimizer), factor)
        self._buffers = [(m, n, self._between(buffer, getattr(m, n), factor, n)) for m, n, buffer in self._buffers]

    def _between(self, mine: Any, real: Any, factor: float, name: object = "") -> Any:
        if isinstance(mine, Tensor):
            return self._tensor_between(mine, real, factor, nonnegative=name in NONNEGATIVE)
        if isinstance(mine, float) and isinstance(real, float) and mine != real:
            whole = mine.is_integer() and real.is_integer()
            return mine if whole or not math.isfinite(mine - real) else real + factor * (mine - real)
        if type(mine) is dict and isinstance(real, dict):
            return {k: self._between(v, real.get(k), factor, k) for k, v in mine.items()}
        if type(mine) is list and isinstance(real, list | tuple) and len(real) == len(mine):
            return [self._between(v, r, factor) for v, r in zip(mine, real, strict=True)]
        if type(mine) is tuple and isinstance(real, tuple) and len(real) == len(mine):
            return tuple(self._between(v, r, factor) for v, r in zip(mine, real, strict=True))
        return mine

    def _tensor_between(self, mine: Tensor, real: Any, factor: float, *, nonnegative: bool) -> Tensor:
        if not (isinstance(real, Tensor) and real.shape == mine.shape and mine.is_floating_point()):
            return mine
        real = real.detach()
        if mine.ndim == 0 and float(mine).is_integer() and float(real).is_integer():
            return mine
        moved = (mine - real).mul_(factor).add_(real)
        if factor > 1.0 and nonnegative:
            self.clipped += int((moved < 0).sum())
            moved.clamp_min_(0.0)
        return moved

    def begin(self) -> None:
        """Remember with what the step of the run begins: random state, training modes, gradients and learning rates."""
        self._start = Snapshot(self._model)
        self._gradients = [None if p.grad is None else p.grad.detach().clone() for p in self._leaves]
        self._rates = [
            {k: copied(v) for k, v in group.items() if k in _of_the_run(group) - _NOT_COPIED}
            for group in self._optimizer.param_groups
        ]

    def run(self, step: Callable[[], Any]) -> None:
        """Do the step that the run has done since :meth:`begin`, and put back the state of the run, also after an error.

        Args:
            step: evaluates the gradients and steps the optimizer.

        Raises:
            RuntimeError: without :meth:`begin`.
        """
        if self._start is None:
            raise RuntimeError("begin() comes before the step of the run, and run() after it.")
        with (
            undisturbed(self._model, self._start),
            same_version((*self._parameters,)),
            self._in_place(),
            torch.enable_grad(),
        ):
            step()
        self._start = None

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        optimizer = self._optimizer
        values = [p.detach().clone() for p in self._parameters]
        gradients, states = [p.grad for p in self._leaves], dict(optimizer.state)
        groups, attributes = [dict(group) for group in optimizer.param_groups], dict(vars(optimizer))
        hooks = {name: getattr(torch_optimizer, name) for name in _GLOBAL_HOOKS}
        try:
            torch.clear_autocast_cache()
            self._enter()
            yield
            self._leave()
        finally:
            for name, table in hooks.items():
                setattr(torch_optimizer, name, table)
            for p, value in zip(self._parameters, values, strict=True):
                p.data.copy_(value)
            for p, gradient in zip(self._leaves, gradients, strict=True):
                p.grad = gradient
            _replace(optimizer.state, states)
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                _replace(group, kept)
            _replace(vars(optimizer), attributes)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _enter(self) -> None:
        optimizer = self._optimizer
        for name in _GLOBAL_HOOKS:
            setattr(torch_optimizer, name, OrderedDict())
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(optimizer, name, OrderedDict())
        for p, value in zip(self._parameters, self._values, strict=True):
            p.data.copy_(value)
        for p, gradient in zip(self._leaves, self._gradients, strict=True):
            p.grad = gradient
        _replace(optimizer.state, self._states)
        for group, mine, rates in zip(optimizer.param_groups, self._groups, self._rates, strict=True):
            theirs = _numbers(group, _of_the_run(group))
            _replace(group, {k: v for k, v in group.items() if k not in theirs} | mine | rates)
        theirs = _attributes(optimizer)
        _replace(vars(optimizer), {k: v for k, v in vars(optimizer).items() if k not in theirs} | self._attributes)
        if isinstance(optimizer, GuardedOptimizer):
            vars(optimizer).update(_versions={}, _memory=None, last_step=self._report)
        for module, name, buffer in self._buffers:
            getattr(module, name).data.copy_(buffer)

    @torch.no_grad()
    def _leave(self) -> None:
        optimizer = self._optimizer
        for value, p in zip(self._values, self._parameters, strict=True):
            value.copy_(p)
        self._states = dict(optimizer.state)
        self._groups = [_numbers(group, _of_the_run(group)) for group in optimizer.param_groups]
        self._attributes = _attributes(optimizer)
        self._report = getattr(optimizer, "last_step", None)
        self._buffers = [(m, n, getattr(m, n).detach().clone()) for m, n, _ in self._buffers]


def _numbers(table: Mapping[str, Any], spared: frozenset[str]) -> dict[str, Any]:
    return {k: v for k, v in table.items() if k not in spared and _is_number(v)}


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer has of numbers beside groups and state."""
    return {k: v for k, v in _numbers(vars(optimizer), _NOT_OWN).items() if not k.startswith("_optimizer_")}


def _of_the_run(group: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys of a group that the shadow does not have for itself."""
    scheduled = "base_momentum" in group or "max_momentum" in group
    return _NOT_COPIED | OF_SCHEDULERS | (MOMENTA if scheduled else frozenset())


def _replace(table: Any, content: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(content)


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _difference(mine: Any, real: Any) -> Tensor:
    """Return the difference of two tensors, of which one that is not there is zero."""
    if isinstance(mine, Tensor) and isinstance(real, Tensor):
        return mine - real
    found = next((t for t in (mine, real) if isinstance(t, Tensor)), torch.zeros(()))
    return found.detach()


def _length(parts: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float64)) for x in parts]
    return math.sqrt(float(torch.tensor(read(norms), dtype=torch.float64).square().sum()))
