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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.linalg.bound import upper
from stableopt.lyapunov.profile.offline import Loss, default_loss
from stableopt.lyapunov.profile.plain import plain
from stableopt.lyapunov.profile.studies.replacing import (
    Batches,
    Influence,
    Run,
    Samples,
    is_mean,
    plan,
    probed,
    step_all,
)
from stableopt.optim import RandomState
from stableopt.optim.ledger import StabilityLedger
from stableopt.theory import gradient_descent_factor

__all__ = ["DataSensitivity", "replace_one"]

Array: TypeAlias = NDArray[np.float64]


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
        probe: weight w -> what the probe changes from the run to the twin; empty without a probe.
        probe_influence: what it changes to first order, :math:`\langle\nabla p(\theta_T), \delta_T\rangle`; NaN if not known.
        why: what is not known, and why: ``influence``, ``bound``, ``mean_bound`` -> one sentence.

    Examples:
        >>> import torch
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
    probe: dict[float, float] = field(default_factory=dict)
    probe_influence: float = math.nan
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
        names = (
            "index",
            "kind",
            "samples",
            "drawn",
            "influence",
            "displacements",
            "gaps",
            "bound",
            "mean_bound",
            "rounding",
        )
        names += ("probe", "probe_influence", "holds", "why")
        return plain({name: getattr(self, name) for name in names})

    def __str__(self) -> str:
        lines = [f"sample {self.index} of {self.samples} {self.kind}, in {self.drawn} of {self.steps} batches"]
        lines.append(f"  influence (to first order)  {self._known('influence', float(self.influence[-1]))}")
        lines += [f"  twin, weight {w:<14.3g} {path[-1]:.6g}" for w, path in self.displacements.items()]
        lines.append(f"  bound for these batches     {self._known('bound', float(self.bound[-1]))}")
        lines.append(f"  bound in the mean           {self._known('mean_bound', self.mean_bound)}")
        if self.probe:
            lines.append(f"  probe, to first order       {self._known('influence', self.probe_influence)}")
            lines += [f"  probe, weight {w:<13.3g} {x:.6g}" for w, x in self.probe.items()]
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
    probe: Callable[[nn.Module], Tensor] | None = None,
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
        probe: of the model at the end, one real number: what its influence is on, such as the loss of a test sample.
        seed: of the order of the samples.

    Returns:
        The sensitivity. What cannot be had says why: the influence of an optimizer without a rule, the bound with momentum.

    Raises:
        ValueError: if an argument is out of range, models differ, or a sample is to be removed from a loss that is no mean over
            samples (batch statistics, dropout).

    Note:
        The bounds are for the weight 1, and for two runs that use the same learning rates. G and L are yours to know.

    Examples:
        >>> import torch
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
    samples = Samples(data, index, replacement)
    todo = list(plan(batches, samples.count, steps, seed))
    weights = [float(w) for w in weights]
    if not weights or not all(0.0 <= w <= 1.0 for w in weights):
        raise ValueError(f"weights must lie in [0, 1], got {weights!r}.")
    base, twins = _runs(make_model, make_optimizer, default_loss if loss is None else loss, weights)
    mean = all(index not in chosen for chosen in todo) or is_mean(base, samples, next(c for c in todo if index in c))
    if replacement is None and not mean:
        raise ValueError(
            "a sample can only be removed from a loss that is a mean over its samples, and this one is not (batch statistics, "
            "dropout, a sum): give a replacement."
        )
    tangent = Influence(base)
    bounds = _Bounds(base, samples.count, lipschitz, smoothness, smallest_curvature)
    paths = _Paths(base, twins, tangent)
    for chosen in todo:
        hits = sum(i == index for i in chosen)
        step_all(base, twins, tangent, samples, chosen)
        bounds.step(hits, len(chosen))
        paths.add()
    mean_bound = bounds.mean(uniform=batches is None or isinstance(batches, int), mean=mean)
    changes, foretold = ({}, math.nan) if probe is None else probed(probe, base, twins, tangent)
    return DataSensitivity(
        index=index,
        kind="removed" if replacement is None else "replaced",
        samples=samples.count,
        drawn=sum(index in chosen for chosen in todo),
        influence=np.array(paths.influence),
        displacements={w: np.array(path) for w, path in paths.displacements.items()},
        gaps={w: np.array(path) for w, path in paths.gaps.items()},
        direction=tuple(tangent.parts()),
        bound=np.array(bounds.path),
        mean_bound=mean_bound,
        rounding=paths.rounding(),
        probe=changes,
        probe_influence=foretold,
        why={name: reason for name, reason in (("influence", tangent.why), *bounds.why.items()) if reason},
    )


def _runs(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    loss: Loss,
    weights: Sequence[float],
) -> tuple[Run, dict[float, Run]]:
    """Make a run and its twins, all from the same random state."""
    random, runs = RandomState.capture(), []
    for _ in range(1 + len(weights)):
        random.restore()
        model = make_model()
        runs.append(Run(model, make_optimizer(model), loss))
    base, *twins = runs
    if any(not np.array_equal(run.flat(), base.flat()) for run in twins):
        raise ValueError("make_model must return the same parameters each time: seed it inside.")
    return base, dict(zip(weights, twins, strict=True))


class _Paths:
    """Norms along the runs."""

    def __init__(self, base: Run, twins: dict[float, Run], tangent: Influence) -> None:
        self.base, self.twins, self.tangent = base, twins, tangent
        self.influence: list[float] = []
        self.displacements: dict[float, list[float]] = {w: [] for w in twins}
        self.gaps: dict[float, list[float]] = {w: [] for w in twins}
        self._largest = 0.0
        self.add()

    def add(self) -> None:
        """Compare the runs where they are."""
        here, d = self.base.flat(), self.tangent.flat()
        self._largest = max(self._largest, float(np.linalg.norm(here)))
        self.influence.append(math.nan if d is None else float(np.linalg.norm(d)))
        for w, twin in self.twins.items():
            apart = twin.flat() - here
            self.displacements[w].append(float(np.linalg.norm(apart)))
            self.gaps[w].append(math.nan if d is None else float(np.linalg.norm(apart - w * d)))

    def rounding(self) -> float:
        """Return what rounding can add to a displacement: a few units in the last place of the parameters in each step."""
        return 4.0 * self.base.eps * len(self.influence) * self._largest


class _Bounds:
    """The bounds of a run of SGD, step by step."""

    def __init__(
        self, run: Run, samples: int, lipschitz: float | None, smoothness: float | None, smallest: float | None
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
