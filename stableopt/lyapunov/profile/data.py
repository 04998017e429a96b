r"""What one training sample does to a training: the same run with it replaced, to first order, in full, and as theory bounds it.

With the sample j of n mixed with its replacement at weight w, the loss of each batch that it is in is
:math:`(1-w)f_B+wf_{B'}`, for a mean over samples :math:`f_B+\frac wB(\ell_{j'}-\ell_j)`. The influence is the derivative at w = 0,
pushed through the run with the forcing :math:`\nabla f_{B'}-\nabla f_B`; the twin is a second run with w as it is, the same
batches and the same random numbers. Two runs of SGD on a loss of smoothness L whose samples are G-Lipschitz are at most

.. math:: \|\theta_{t+1}-\theta'_{t+1}\| \le \gamma_t\|\theta_t-\theta'_t\| + \eta_t\frac{2G}{B}\,[j \in \text{batch } t]

apart, :math:`\gamma_t = \max(|1-\eta_t\mu|, |1-\eta_tL|)`; the mean over batches drawn uniformly is the law of
:class:`stableopt.optim.StabilityLedger` (THEORY T4, Hardt, Recht and Singer 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from stableopt.linalg.bound import upper
from stableopt.lyapunov.profile.offline import Loss, default_loss
from stableopt.lyapunov.profile.products import GradientTap
from stableopt.lyapunov.profile.system import PARAMETER, NotTheRuleError, System
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import GuardedOptimizer, RandomState
from stableopt.optim.curvature import gradients
from stableopt.optim.ledger import StabilityLedger
from stableopt.optim.trial import loss_with_graph
from stableopt.theory import gradient_descent_factor

__all__ = ["DataSensitivity", "replace_one"]

Array: TypeAlias = NDArray[np.float64]
Batches: TypeAlias = Sequence[Sequence[int]] | int | None


@dataclass(frozen=True)
class DataSensitivity:
    r"""How far apart a run and the same run with one sample changed are, t = 0, ..., T.

    Args:
        index: of the sample.
        kind: ``replaced``, or ``removed`` (its loss has weight 0, batches count as before).
        samples: n.
        drawn: in how many steps it was in the batch.
        influence: :math:`\|\delta_t\|`, the derivative by the weight, ``(T + 1,)``; NaN where it is not known.
        displacements: weight w -> :math:`\|\theta'_t-\theta_t\|`, ``(T + 1,)``.
        gaps: weight w -> :math:`\|\theta'_t-\theta_t-w\delta_t\|`, which is of the order :math:`w^2`.
        direction: :math:`\delta_T`, one tensor per parameter; empty if not known.
        bound: of the displacement at weight 1, for these batches, ``(T + 1,)``; NaN if not applicable.
        mean_bound: of the mean displacement at the end over uniformly drawn batches, by the ledger; NaN if not applicable.
        rounding: what rounding of both runs can add to a displacement, an estimate.
        why: what is not known, and why: ``influence``, ``bound``, ``mean_bound`` -> one sentence.

    Examples:
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> found = replace_one(
        ...     lambda: nn.Linear(1, 1, bias=False, dtype=torch.float64),
        ...     lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
        ...     (x,),
        ...     lambda m, batch: m(batch[0]).mean(),
        ...     1,
        ...     replacement=(torch.tensor([0.0], dtype=torch.float64),),
        ...     steps=3,
        ...     lipschitz=2.0,
        ...     smoothness=0.0,
        ... )
        >>> float(found.influence[-1]), round(found.displacement, 9), found.holds, round(float(found.bound[-1]), 9)
        (1.5, 1.5, True, 3.0)
    """

    index: int
    kind: str
    samples: int
    drawn: int
    influence: Array = field(repr=False)
    displacements: dict[float, Array] = field(repr=False)
    gaps: dict[float, Array] = field(repr=False)
    direction: tuple[Tensor, ...] = field(repr=False)
    bound: Array = field(repr=False)
    mean_bound: float = math.nan
    rounding: float = 0.0
    why: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.influence) - 1

    @property
    def displacement(self) -> float:
        """How far the run with the sample changed in full is away at the end; NaN if weight 1 was not asked for."""
        path = self.displacements.get(1.0)
        return math.nan if path is None else float(path[-1])

    @property
    def holds(self) -> bool | None:
        """Whether the displacement was below its bound all along, but for rounding; None if there is none."""
        path = self.displacements.get(1.0)
        if path is None or np.isnan(self.bound).any():
            return None
        return bool(np.all(path <= self.bound + self.rounding))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the direction; what is not known is None."""
        return {
            "index": self.index,
            "kind": self.kind,
            "samples": self.samples,
            "drawn": self.drawn,
            "influence": _plain(self.influence),
            "displacements": {str(w): _plain(path) for w, path in self.displacements.items()},
            "gaps": {str(w): _plain(path) for w, path in self.gaps.items()},
            "bound": _plain(self.bound),
            "mean_bound": _plain(np.array([self.mean_bound]))[0],
            "rounding": self.rounding,
            "holds": self.holds,
            "why": self.why,
        }

    def __str__(self) -> str:
        lines = [f"sample {self.index} of {self.samples} {self.kind}, in {self.drawn} of {self.steps} batches"]
        lines.append(f"  influence (to first order)  {self._known('influence', float(self.influence[-1]))}")
        lines += [f"  twin, weight {w:<14.3g} {path[-1]:.6g}" for w, path in self.displacements.items()]
        lines.append(f"  bound for these batches     {self._known('bound', float(self.bound[-1]))}")
        lines.append(f"  bound in the mean           {self._known('mean_bound', self.mean_bound)}")
        return "\n".join(lines)

    def _known(self, name: str, value: float) -> str:
        return f"not applicable: {self.why[name]}" if name in self.why else f"{value:.6g}"


def replace_one(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    data: Any,
    loss: Loss | None,
    index: int,
    replacement: Any = None,
    *,
    steps: int,
    batches: Batches = None,
    weights: Sequence[float] = (1.0,),
    lipschitz: float | None = None,
    smoothness: float | None = None,
    smallest_curvature: float | None = None,
    seed: int = 0,
) -> DataSensitivity:
    r"""Train, and train again with one sample replaced or removed, with all else the same.

    Args:
        make_model: makes the model; called again for each run, from the same random state.
        make_optimizer: is given the model.
        data: a tensor, or a tuple of tensors, with one sample per row, or a dataset with length and items.
        loss: is given the model and a batch, and returns the mean over its samples; None as for :func:`stableopt.profile`.
        index: j, the sample.
        replacement: a sample like those of the data (a tuple of rows without batch dimension), or the index of another one; None to
            remove the sample: its loss then counts 0 and the batch as large as before.
        steps: T.
        batches: indices of each step, repeated if they are fewer than the steps; or a size, for all samples in an order drawn anew
            each time through; None for all samples at each step.
        weights: of the replacement, each a run: 1 for the sample replaced in full, small ones to see the influence.
        lipschitz: G of the loss of every sample, the replacement included, where both runs go; None if not known.
        smoothness: L of the loss, as for the ledger.
        smallest_curvature: :math:`\mu`, 0 for a convex loss; None for -L.
        seed: of the order of the samples.

    Returns:
        The sensitivity. What cannot be had says why: the influence of an optimizer without a rule, the bound with momentum.

    Raises:
        ValueError: if an argument is out of range, models differ, or a sample is to be removed from a loss that is no mean over
            samples (batch statistics, dropout).

    Note:
        The bounds are for the weight 1, and for two runs that use the same learning rates. G and L are yours to know.

    Examples:
        >>> x, y = torch.randn(20, 2, dtype=torch.float64), torch.randint(2, (20,))
        >>> def model():
        ...     torch.manual_seed(0)
        ...     return nn.Linear(2, 2, dtype=torch.float64)
        >>> found = replace_one(
        ...     model,
        ...     lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
        ...     (x, y),
        ...     None,
        ...     3,
        ...     4,
        ...     steps=10,
        ...     batches=5,
        ...     weights=(1.0, 1e-4),
        ... )
        >>> bool(found.gaps[1e-4][-1] < 1e-3 * found.displacements[1e-4][-1])
        True
    """
    samples = _Samples(data, index, replacement)
    plan = list(_plan(batches, samples.count, steps, seed))
    weights = [float(w) for w in weights]
    if not weights or not all(0.0 <= w <= 1.0 for w in weights):
        raise ValueError(f"weights must lie in [0, 1], got {weights!r}.")
    evaluate = default_loss if loss is None else loss
    random = RandomState.capture()
    runs = []
    for _ in range(1 + len(weights)):
        random.restore()
        model = make_model()
        runs.append(_Run(model, make_optimizer(model), evaluate))
    base, twins = runs[0], runs[1:]
    if any(not np.array_equal(run.flat(), base.flat()) for run in twins):
        raise ValueError("make_model must return the same parameters each time: seed it inside.")
    first = next((chosen for chosen in plan if index in chosen), None)
    mean = first is None or _is_mean(base, samples, first)
    if replacement is None and not mean:
        raise ValueError(
            "a sample can only be removed from a loss that is a mean over its samples, and this one is not (batch statistics, "
            "dropout, a sum): give a replacement."
        )
    tangent = _Tangent(base)
    bounds = _Bounds(base, samples.count, lipschitz, smoothness, smallest_curvature)
    paths = _Paths(weights)
    paths.add(base, twins, tangent)
    for chosen in plan:
        hits = sum(i == index for i in chosen)
        _step(base, dict(zip(weights, twins, strict=True)), tangent, samples, chosen, hit=hits > 0)
        bounds.step(hits, len(chosen))
        paths.add(base, twins, tangent)
    mean_bound = bounds.mean(uniform=batches is None or isinstance(batches, int), mean=mean)
    why = {name: reason for name, reason in (("influence", tangent.why), *bounds.why.items()) if reason}
    return DataSensitivity(
        index=index,
        kind="removed" if replacement is None else "replaced",
        samples=samples.count,
        drawn=sum(index in chosen for chosen in plan),
        influence=np.array(paths.influence),
        displacements={w: np.array(path) for w, path in paths.displacements.items()},
        gaps={w: np.array(path) for w, path in paths.gaps.items()},
        direction=tuple(tangent.parts()),
        bound=np.array(bounds.path),
        mean_bound=mean_bound,
        rounding=paths.rounding(base.eps),
        why=why,
    )


class _Samples:
    """The data, with one sample changed where that is asked for."""

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
        """Return a batch, as it is or with the sample replaced."""
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

    def _sample(self, i: int) -> Any:
        if self.tensors is None:
            return self.data[i]
        return self.data[i] if self.single else tuple(t[i] for t in self.tensors)

    def changed_loss(self, model: nn.Module, loss: Loss, chosen: Sequence[int]) -> Tensor:
        """Return the loss of a batch with the sample replaced, or with its weight 0."""
        if self.replacement is not None:
            return loss(model, self.batch(chosen, changed=True))
        rest = [i for i in chosen if i != self.index]
        if rest:
            return loss(model, self.batch(rest)) * (len(rest) / len(chosen))
        return 0.0 * loss(model, self.batch(chosen))


class _Run:
    """One training."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.eps = max((torch.finfo(p.dtype).eps for p in self.parameters), default=0.0)

    def flat(self) -> Array:
        """Return the parameters as one line of float64."""
        return _flat(self.parameters)

    def lr(self) -> list[float]:
        """Return the learning rates that the last step used."""
        report = self.optimizer.last_step if isinstance(self.optimizer, GuardedOptimizer) else None
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return (
            rates if report is None else [r if math.isfinite(r) else lr for r, lr in zip(report.lr, rates, strict=True)]
        )


class _Tangent:
    """The derivative of a run by the weight of the replacement."""

    def __init__(self, run: _Run) -> None:
        self.why, self.run = "", run
        try:
            self.system: System | None = System(run.optimizer)
        except ValueError as error:
            self.system, self.why = None, str(error)
            return
        self.tap = GradientTap(self.system.parameters)
        self.system.columns = [{PARAMETER: torch.zeros_like(p.detach())[None]} for p in self.system.parameters]

    def evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Evaluate the closure of a step, and differentiate its gradient along the present tangent."""
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
        return _flat(parts) if parts else None


class _Paths:
    """Norms along the runs."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self.influence: list[float] = []
        self.displacements: dict[float, list[float]] = {w: [] for w in weights}
        self.gaps: dict[float, list[float]] = {w: [] for w in weights}
        self._largest = 0.0

    def add(self, base: _Run, twins: Sequence[_Run], tangent: _Tangent) -> None:
        """Compare the runs where they are."""
        here, d = base.flat(), tangent.flat()
        self._largest = max(self._largest, float(np.linalg.norm(here)))
        self.influence.append(math.nan if d is None else float(np.linalg.norm(d)))
        for w, twin in zip(self.weights, twins, strict=True):
            apart = twin.flat() - here
            self.displacements[w].append(float(np.linalg.norm(apart)))
            self.gaps[w].append(math.nan if d is None else float(np.linalg.norm(apart - w * d)))

    def rounding(self, eps: float) -> float:
        """Return what rounding can add to a displacement: a few units in the last place of the parameters in each step."""
        return 4.0 * eps * len(self.influence) * self._largest


class _Bounds:
    """The bounds of a run of SGD, step by step."""

    def __init__(
        self, run: _Run, samples: int, lipschitz: float | None, smoothness: float | None, smallest: float | None
    ) -> None:
        self.run, self.samples, self.why = run, samples, {"bound": "", "mean_bound": ""}
        self.G, self.L, self.path = lipschitz, smoothness, [0.0]
        self.mu = -smoothness if smallest is None and smoothness is not None else smallest
        self._ledger = None
        if lipschitz is None or smoothness is None:
            missing = " and ".join(n for n, x in (("lipschitz", lipschitz), ("smoothness", smoothness)) if x is None)
            self.why = dict.fromkeys(self.why, f"it needs {missing} of the loss of a sample")
        else:
            self._ledger = StabilityLedger(run.optimizer, smoothness=smoothness, smallest_curvature=smallest)

    def step(self, hits: int, size: int) -> None:
        """Add the step just taken."""
        if self.G is None or self.L is None or self.mu is None:
            self.path.append(math.nan)
            return
        eta = max(self.run.lr())
        decays = [float(group.get("weight_decay", 0.0)) for group in self.run.optimizer.param_groups]
        growth = float(upper(gradient_descent_factor(eta, self.mu + min(decays), self.L + max(decays))))
        grown = growth * self.path[-1] + eta * 2.0 * self.G * hits / size
        self.path.append(grown * (1.0 + 8.0 * np.finfo(np.float64).eps))

    def mean(self, *, uniform: bool, mean: bool) -> float:
        """Return the bound of the ledger; where it does not apply, neither does that for the batches of the run."""
        if self._ledger is None or self.G is None:
            return math.nan
        self._ledger.close()
        try:
            value = float(upper(self._ledger.propagated(1.0, self.samples))) * self.G
        except ValueError as error:
            return self._none(str(error))
        if not mean:
            return self._none("the loss is no mean over the samples of its batch (batch statistics, dropout, a sum).")
        if not uniform:
            self.why["mean_bound"] = "the batches were given, and nothing says that they were drawn uniformly"
            return math.nan
        return value

    def _none(self, why: str) -> float:
        self.path, self.why = [math.nan] * len(self.path), dict.fromkeys(self.why, why)
        return math.nan


def _is_mean(run: _Run, samples: _Samples, chosen: Sequence[int]) -> bool:
    """Return whether the loss of a batch is the mean of the losses of a sample and of the others, weighted as they are many."""
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


def _step(
    base: _Run, twins: dict[float, _Run], tangent: _Tangent, samples: _Samples, chosen: Sequence[int], *, hit: bool
) -> None:
    """Do one step of all runs, from the same random state."""
    start = RandomState.capture()

    def plain(run: _Run) -> Tensor:
        return run.loss(run.model, samples.batch(chosen))

    def changed(run: _Run) -> Tensor:
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


def _plan(batches: Batches, count: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the samples of each step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}.")
    if batches is None:
        yield from ([*range(count)] for _ in range(steps))
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


def _flat(tensors: Sequence[Tensor]) -> Array:
    parts = [(torch.view_as_real(t) if t.is_complex() else t).detach().reshape(-1).double().cpu() for t in tensors]
    return torch.cat(parts).numpy()


def _plain(path: Array) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in path.tolist()]
