"""Two trainings that differ in one sample: the data, the runs, and the derivative of the one by the weight of what is changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from stableopt.lyapunov.profile.offline import Loss
from stableopt.lyapunov.profile.tangents.agreement import NotTheRuleError
from stableopt.lyapunov.profile.tangents.products import GradientTap
from stableopt.lyapunov.profile.tangents.system import PARAMETER, System
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import GuardedOptimizer, RandomState
from stableopt.optim.curvature import dot, gradients
from stableopt.optim.trial import loss_with_graph

__all__ = ["Batches", "Influence", "Run", "Samples", "flat", "is_mean", "plan", "probed", "step_all"]

Array: TypeAlias = NDArray[np.float64]
Batches: TypeAlias = Sequence[Sequence[int]] | int | None


class Samples:
    """The data, with one sample changed where that is asked for.

    Args:
        data: a tensor or a tuple of tensors with one sample per row, or a dataset.
        index: of the sample.
        replacement: a sample, the index of one, or None to remove the sample.

    Raises:
        ValueError: if an index is out of range, or tensors have different lengths.

    Examples:
        >>> Samples(torch.tensor([1.0, 2.0, 3.0]), 1, torch.tensor(9.0)).batch([1, 2, 1], changed=True)
        tensor([9., 3., 9.])
    """

    def __init__(self, data: Any, index: int, replacement: Any) -> None:
        self.tensors = (data,) if isinstance(data, Tensor) else data if isinstance(data, tuple) else None
        self.single = isinstance(data, Tensor)
        self.data, self.index = data, index
        self.count = len(data) if self.tensors is None else len(self.tensors[0])
        if self.tensors is not None and any(len(t) != self.count for t in self.tensors):
            raise ValueError(
                f"tensors of data must have one row per sample, got lengths {[len(t) for t in self.tensors]}."
            )
        for name, i in (("index", index), ("replacement", replacement)):
            if isinstance(i, int) and not 0 <= i < self.count:
                raise ValueError(f"{name} must be from 0 to {self.count - 1}, got {i!r}.")
        self.replacement = self._sample(replacement) if isinstance(replacement, int) else replacement

    def batch(self, chosen: Sequence[int], *, changed: bool = False) -> Any:
        """Return a batch, as it is or with the sample replaced.

        Args:
            chosen: indices of its samples.
            changed: whether the sample is replaced.
        """
        if self.tensors is None:
            return default_collate([self.replacement if changed and i == self.index else self.data[i] for i in chosen])
        rows = torch.tensor(list(chosen))
        parts = [t[rows.to(t.device)] for t in self.tensors]
        if changed:
            new = (self.replacement,) if self.single else self.replacement
            hit = rows == self.index
            for part, value in zip(parts, new, strict=True):
                part[hit.to(part.device)] = torch.as_tensor(value).to(part)
        return parts[0] if self.single else tuple(parts)

    def changed_loss(self, model: nn.Module, loss: Loss, chosen: Sequence[int]) -> Tensor:
        """Return the loss of a batch with the sample replaced, or with its weight 0.

        Args:
            model: that is trained.
            loss: of model and batch.
            chosen: indices of the batch.
        """
        if self.replacement is not None:
            return loss(model, self.batch(chosen, changed=True))
        rest = [i for i in chosen if i != self.index]
        if rest:
            return loss(model, self.batch(rest)) * (len(rest) / len(chosen))
        return 0.0 * loss(model, self.batch(chosen))

    def _sample(self, i: int) -> Any:
        if self.tensors is None:
            return self.data[i]
        return self.data[i] if self.single else tuple(t[i] for t in self.tensors)


class Run:
    """One training.

    Args:
        model: that is trained.
        optimizer: of its parameters.
        loss: of model and batch.

    Examples:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> Run(net, torch.optim.SGD(net.parameters(), lr=0.5), lambda m, b: m(b).sum()).lr()
        [0.5]
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.eps = max((torch.finfo(p.dtype).eps for p in self.parameters), default=0.0)

    def flat(self) -> Array:
        """Return the parameters as one line of float64."""
        return flat(self.parameters)

    def lr(self) -> list[float]:
        """Return the learning rates that the last step used."""
        report = self.optimizer.last_step if isinstance(self.optimizer, GuardedOptimizer) else None
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return (
            rates if report is None else [r if math.isfinite(r) else lr for r, lr in zip(report.lr, rates, strict=True)]
        )


class Influence:
    """The derivative of a run by the weight of the replacement.

    Args:
        run: whose steps are told by :meth:`evaluate`, :meth:`force` and :meth:`advance`, in this order.

    Attributes:
        why: one sentence if the derivative is not known, else empty.

    Examples:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> run = Run(net, torch.optim.SGD(net.parameters(), lr=0.5), lambda m, b: m(b).sum())
        >>> Influence(run).parts()
        [tensor([[0.]])]
    """

    def __init__(self, run: Run) -> None:
        self.why, self.run = "", run
        try:
            self.system: System | None = System(run.optimizer)
        except ValueError as error:
            self.system, self.why = None, str(error)
            return
        self.tap = GradientTap(self.system.parameters, model=run.model)
        self.system.columns = [{PARAMETER: torch.zeros_like(p.detach())[None]} for p in self.system.parameters]

    def evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Evaluate the closure of a step, and differentiate its gradient along the present tangent.

        Args:
            closure: as torch asks for it.
        """
        if self.system is None:
            return closure()
        self._before = self.system.before()
        return self.tap.evaluate(closure, self.system.directions())

    def advance(self) -> None:
        """Push through the step that was just taken."""
        if self.system is None or self.tap.gradient is None:
            return
        try:
            self.system.advance(self._before, self.tap.gradient, [p.grad for p in self.system.parameters])
        except (NotTheRuleError, ValueError) as error:
            self.system, self.why = None, str(error)

    def force(self, changed: Callable[[], Tensor], start: RandomState) -> None:
        """Add to the derivative of the gradient what the replacement does to it: before the step, at its parameters.

        Args:
            changed: returns the changed loss of the batch with its graph.
            start: the random state of the step.
        """
        if self.system is None or self.tap.gradient is None:
            return
        gradient = self.tap.gradient
        with torch.enable_grad():
            others = gradients(loss_with_graph(changed, start), self.system.parameters)
        for i, (g, other) in enumerate(zip(gradient.values, others, strict=True)):
            new = torch.zeros_like(gradient.along[i][0]) if other is None else other.detach()
            gradient.along[i] = gradient.along[i] + (new if g is None else new - g)

    def parts(self) -> list[Tensor]:
        """Return the tangent of each parameter, nothing if it is not known."""
        return [] if self.system is None else [column[PARAMETER][0] for column in self.system.columns]

    def flat(self) -> Array | None:
        """Return the tangent as one line of float64."""
        parts = self.parts()
        return flat(parts) if parts else None


def plan(batches: Batches, count: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the samples of each step.

    Args:
        batches: of each step, a size, or None for all samples.
        count: of all samples.
        steps: how many.
        seed: of the order of the samples.

    Raises:
        ValueError: if something is out of range.

    Examples:
        >>> list(plan([[0, 1], [1]], 2, 3, 0))
        [[0, 1], [1], [0, 1]]
        >>> sorted(i for chosen in plan(2, 4, 2, 0) for i in chosen)
        [0, 1, 2, 3]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}.")
    if batches is None:
        yield from itertools.repeat([*range(count)], steps)
        return
    if not isinstance(batches, int):
        given = [[int(i) for i in chosen] for chosen in batches]
        if not given or any(not chosen or min(chosen) < 0 or max(chosen) >= count for chosen in given):
            raise ValueError(f"batches must be indices from 0 to {count - 1}, and none empty.")
        yield from (given[t % len(given)] for t in range(steps))
        return
    if not 1 <= batches <= count:
        raise ValueError(f"a batch must have from 1 to {count} samples, got {batches!r}.")
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        order = order or torch.randperm(count, generator=generator).tolist()
        yield order[:batches]
        order = order[batches:]


def is_mean(run: Run, samples: Samples, chosen: Sequence[int]) -> bool:
    """Return whether the loss of a batch is the mean of the losses of a sample and of the others, weighted as they are many.

    Args:
        run: whose model and loss are asked.
        samples: with the index of the one sample.
        chosen: indices of the batch.

    Examples:
        >>> net = nn.Linear(1, 1)
        >>> samples, sgd = Samples(torch.tensor([[1.0], [2.0]]), 0, None), torch.optim.SGD(net.parameters(), lr=0.5)
        >>> is_mean(Run(net, sgd, lambda m, b: m(b).mean()), samples, [0, 1])
        True
        >>> is_mean(Run(net, sgd, lambda m, b: m(b).sum() + 1), samples, [0, 1])
        False
    """
    one, rest = [i for i in chosen if i == samples.index], [i for i in chosen if i != samples.index]
    random = RandomState.capture()
    try:
        with undisturbed(run.model), torch.no_grad():
            values = []
            for part in (chosen, one, rest):
                random.restore()
                values.append(float(run.loss(run.model, samples.batch(part))) * len(part) if part else 0.0)
    except ValueError:  # a batch of one sample has no statistics
        return False
    whole, first, second = values
    return abs(whole - first - second) <= 64.0 * run.eps * len(chosen) * max(1.0, abs(whole), abs(first), abs(second))


def step_all(base: Run, twins: dict[float, Run], tangent: Influence, samples: Samples, chosen: Sequence[int]) -> None:
    """Do one step of all runs, from the same random state.

    Args:
        base: the run as it is.
        twins: weight -> run with the sample mixed with its replacement at that weight.
        tangent: of the base.
        samples: with the sample and its replacement.
        chosen: indices of the batch.

    Examples:
        >>> def run():
        ...     net = nn.Linear(1, 1, bias=False)
        ...     nn.init.zeros_(net.weight)
        ...     return Run(net, torch.optim.SGD(net.parameters(), lr=0.5), lambda m, b: m(b).mean())
        >>> base, twin = run(), run()
        >>> tangent = Influence(base)
        >>> step_all(base, {1.0: twin}, tangent, Samples(torch.tensor([[1.0], [2.0]]), 1, torch.tensor([4.0])), [0, 1])
        >>> base.flat(), twin.flat(), tangent.flat()
        (array([-0.75]), array([-1.25]), array([-0.5]))
    """
    hit = samples.index in chosen
    start = RandomState.capture()

    def plain(run: Run) -> Tensor:
        return run.loss(run.model, samples.batch(chosen))

    def changed(run: Run) -> Tensor:
        return samples.changed_loss(run.model, run.loss, chosen)

    def closure() -> Tensor:
        base.optimizer.zero_grad()
        value = plain(base)
        value.backward()
        return value

    tangent.evaluate(closure)
    if hit:
        tangent.force(lambda: changed(base), start)
    evaluated = RandomState.capture()
    base.optimizer.step()
    tangent.advance()
    end = RandomState.capture()
    for w, run in twins.items():
        start.restore()
        run.optimizer.zero_grad()
        if not hit or w == 0.0:
            value = plain(run)
        elif w == 1.0:
            value = changed(run)
        else:
            value = (1.0 - w) * plain(run) + w * loss_with_graph(lambda run=run: changed(run), start)
        value.backward()
        evaluated.restore()
        run.optimizer.step()
    end.restore()


def probed(
    probe: Callable[[nn.Module], Tensor], base: Run, twins: dict[float, Run], tangent: Influence
) -> tuple[dict[float, float], float]:
    """Return what a probe changes from a run to its twins, and to first order.

    Args:
        probe: of a model, one real number with its graph.
        base: the run.
        twins: weight -> run.
        tangent: of the base.

    Examples:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> run = Run(net, torch.optim.SGD(net.parameters(), lr=0.5), lambda m, b: m(b).mean())
        >>> probed(lambda m: m.weight.sum(), run, {1.0: run}, Influence(run))
        ({1.0: 0.0}, 0.0)
    """
    random = RandomState.capture()
    value = loss_with_graph(lambda: probe(base.model), random)
    changes = {
        w: float(loss_with_graph(lambda run=run: probe(run.model), random).detach() - value.detach())
        for w, run in twins.items()
    }
    parts = tangent.parts()
    if not parts:
        return changes, math.nan
    grads = gradients(value, base.parameters)
    return changes, math.fsum(dot([g], [d]) for g, d in zip(grads, parts, strict=True) if g is not None)


def flat(tensors: Sequence[Tensor]) -> Array:
    """Return tensors as one line of float64, real and imaginary parts beside one another.

    Examples:
        >>> flat([torch.ones(1, 2), torch.tensor([2j])])
        array([1., 1., 0., 2.])
    """
    parts = [(torch.view_as_real(t) if t.is_complex() else t).detach().reshape(-1).double().cpu() for t in tensors]
    return torch.cat(parts).numpy()
