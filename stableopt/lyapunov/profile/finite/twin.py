r"""The finite-size twin: how the distance of two runs grows, where nothing can be differentiated.

A second run with parameters :math:`\theta' = \theta + \varepsilon v` gets the same batches, closures and random numbers. With
:math:`d_t` the distance of the two states, :math:`\log(d_{t+1}/d_t)` is the growth in step :math:`t`, and its mean tends to the
largest exponent as :math:`\varepsilon \to 0`. At a size that is not small it is another quantity, the *finite-size* exponent.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.errors import StabilityError
from stableopt.lyapunov.hooks import Closure, StepHooks
from stableopt.lyapunov.profile.finite.ground import RESOLUTION, Ground, default_size, look, refuse_half, refuse_size
from stableopt.lyapunov.profile.finite.shadow import Shadow
from stableopt.lyapunov.profile.tangents.agreement import Footprint
from stableopt.optim import GuardedOptimizer

__all__ = ["Twin"]

_OBSERVED = 10
"""Steps of which the median update gives the size, where it is to be that of an update."""


class Twin:
    r"""Run a perturbed copy beside a training run, and record how the distance grows; the run stays as it is, bit for bit.

    The twin does its step after that of the run, in the same model and optimizer, with the same closure and random numbers, and
    with its own state: momentum, second moments, buffers, decisions of a guard. When the distance leaves ``[lo, hi]`` times its
    size, the whole difference of the states is scaled back to the size.

    Args:
        model: that is trained.
        optimizer: of any kind, also LBFGS or one that nobody knows.
        size: :math:`\varepsilon`, in units of :math:`\|\theta\|` at the beginning. None for 1e-3 in float32 and 1e-5 in float64,
            1e-6 there with kinks; with ``finite_size`` for the median of the first 10 updates.
        seed: of the direction.
        renormalize: lo and hi; ``(1, 1)`` for each step.
        scales: what a tensor of the state counts in the distance, by its name (``{"momentum_buffer": lr}``): then it is in units
            of the parameters. None for parameters alone.
        finite_size: measure the exponent at a size that is meant to be finite, beside the infinitesimal one: kinks and large sizes
            are then no reason to refuse.

    Attributes:
        size: :math:`\varepsilon`; None until it is known.
        kinks: names of what the model has of kinks, in order of appearance.
        steps: how many steps have a growth.
        renormalized: how often the difference was scaled back.
        restarts: how often both runs met (growth :math:`-\infty`), after which a new direction begins.
        stopped: why there is no growth any more; empty while there is.

    Raises:
        ValueError: where the number would not be what it says: parameters in half precision or in shards; a size below the
            resolution of the numbers, or above 1e-2 without ``finite_size``; and in the first step, without ``finite_size``, a
            model with kinks in float32, or in float64 with a size above 1e-6; autocast; a step without closure.

    Note:
        One step costs one more evaluation with gradient, one more step of the optimizer and a few copies of the parameters:
        measured 1.2 forward and backward passes for a small convolutional network, 1.2 (SGD) to 1.5 (AdamW) for a perceptron with
        512 samples in a batch, up to 2.3 with 128, where the step of the optimizer itself counts. The closure is called twice and
        must give the same batch; what is done between ``backward`` and ``step`` belongs into it. Hooks of the optimizer see the
        steps of the run only, and what they change is not part of the map. The perturbation is in the parameters; the state of the
        optimizer departs by itself. Where parameters or state are changed between two steps the twin stops. A run whose parameters
        grow until they do not resolve the distance any more stops the twin.

    Examples:
        >>> w = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (torch.tensor([1.0, 1.5]) * w.square()).sum()
        ...     loss.backward()
        ...     return loss
        >>> with Twin(nn.ParameterList([w]), optimizer, renormalize=(1, 1)) as twin:
        ...     for _ in range(40):
        ...         _ = optimizer.step(closure)
        >>> abs(twin.growth[-1] - math.log(0.5)) < 1e-8
        np.True_
        >>> twin.label
        'finite-size twin, eps = 1e-05'
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        size: float | None = None,
        *,
        seed: int = 0,
        renormalize: tuple[float, float] = (0.1, 10.0),
        scales: Mapping[str, float] | None = None,
        finite_size: bool = False,
    ) -> None:
        low, high = (float(x) for x in renormalize)
        if not 0.0 < low <= 1.0 <= high < math.inf:
            raise ValueError(f"renormalize needs 0 < lo <= 1 <= hi, got {renormalize!r}.")
        if isinstance(optimizer, GuardedOptimizer) and optimizer.param_groups[0]["guard"] == "lazy":
            raise ValueError("a lazy guard judges a step by the next one, and a twin has none; use guard='backtrack'.")
        self._model, self._optimizer, self._seed = model, optimizer, seed
        self._low, self._high, self._scales = low, high, dict(scales or {})
        self._finite = finite_size
        self._eps = refuse_half(optimizer)
        if size is not None:
            refuse_size(size, low, self._eps, finite_size=finite_size)
        self.size = size
        self.kinks: tuple[str, ...] = ()
        self.renormalized, self.restarts, self.stopped = 0, 0, ""
        self._growth: list[float] = []
        self._distances: list[float] = []
        self._updates: list[float] = []
        self._shadow: Shadow | None = None
        self._ground: Ground | None = None
        self._closure: Closure | None = None
        self._by_hand = False
        self._before_it: list[Tensor] = []
        self._last = self._target = math.nan
        self._left: Footprint | None = None
        self._hooks = StepHooks(optimizer, self._before, self._after)

    @property
    def growth(self) -> NDArray[np.float64]:
        r"""The growth :math:`\log(d_{t+1}/d_t)` of each step, for :func:`stableopt.lyapunov.profile.exponent`."""
        return np.array(self._growth, dtype=np.float64)

    @property
    def distances(self) -> NDArray[np.float64]:
        """The distance after each step, before it is scaled back; in units of the metric."""
        return np.array(self._distances, dtype=np.float64)

    @property
    def steps(self) -> int:
        """How many steps have a growth."""
        return len(self._growth)

    @property
    def clipped(self) -> int:
        """Entries of second moments that scaling up would have made negative, and that were set to 0."""
        return 0 if self._shadow is None else self._shadow.clipped

    @property
    def label(self) -> str:
        """What the numbers are, with their size."""
        size = "not known yet" if self.size is None else f"{self.size:.3g}"
        return f"{'finite-size exponent' if self._finite else 'finite-size twin'}, eps = {size}"

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> Self:
        """Take part in each step of the optimizer from now on.

        Examples:
            >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
            >>> Twin(nn.Identity(), optimizer).attach().detach()
        """
        if self._hooks.attach():
            # first, so that it gets the closure of the user and not what a monitor makes of it
            before: Any = self._optimizer._optimizer_step_pre_hooks  # noqa: SLF001 an OrderedDict
            before.move_to_end(next(reversed(before)), last=False)
        return self

    def detach(self) -> None:
        """End; the growth stays."""
        self._hooks.remove()
        self._left = None

    def step(self, closure: Closure) -> Any:
        """Do one step of the optimizer and one of the twin; of use where it is not attached, or where ``step`` takes no closure.

        Args:
            closure: as torch asks for it: zero the gradients, evaluate, call ``backward``, return the loss.

        Returns:
            What the step of the optimizer returns.

        Examples:
            >>> w = nn.Parameter(torch.ones(1))
            >>> optimizer = torch.optim.SGD([w], lr=0.5)
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     (w * w / 2).sum().backward()
            >>> twin = Twin(nn.ParameterList([w]), optimizer)
            >>> twin.step(closure), w.item(), twin.steps
            (None, 0.5, 1)
        """
        optimizer = self._optimizer
        if _takes_closure(optimizer):
            attached = self._hooks.attach()
            try:
                return optimizer.step(closure)
            finally:
                if attached:
                    self.detach()
        self._by_hand = True
        try:
            self._see_before(closure)
            with torch.enable_grad():
                closure()
            value = optimizer.step()
            self._see_after(lambda: (closure(), optimizer.step()))
        finally:
            self._by_hand = False
        return value

    def _before(self, closure: Closure | None, _trial: bool) -> None:
        if not self._by_hand:
            self._closure = closure
            self._see_before(closure)

    def _after(self) -> None:
        closure, self._closure = self._closure, None
        if closure is not None and not self._by_hand:
            self._see_after(lambda: self._optimizer.step(closure))

    def _see_before(self, closure: Closure | None) -> None:
        if self.stopped:
            return
        if self._left is not None and (change := self._left.change(self._optimizer)):
            self.stopped = f"before step {self.steps}: {change}"
            return
        if closure is None:
            raise ValueError("a twin evaluates the loss again: call optimizer.step(closure), or twin.step(closure).")
        if self._ground is None:
            self._ground = look(self._model, closure)
            self.kinks = self._ground.kinks
            self._ground.refuse(self._eps, self.size, finite_size=self._finite)
        if self.size is None and not self._finite:
            self.size = default_size(self._eps, self.kinks)
            refuse_size(self.size, self._low, self._eps, finite_size=False)
        if self.size is None:
            self._before_it = [p.detach().clone() for p in self._parameters()]
            return
        if self._shadow is None:
            self._begin(Shadow(self._model, self._optimizer), self.size)
        if self._shadow is not None:
            self._shadow.begin()

    def _begin(self, shadow: Shadow, size: float) -> None:
        norm = shadow.norm()
        if not 0.0 < norm < math.inf:
            raise ValueError(f"the size of a twin is in units of the norm of the parameters, which is {norm}.")
        self._shadow, self._target = shadow, size * norm
        shadow.perturb(self._target, self._seed)
        self._last = shadow.distance(self._scales)

    def _see_after(self, step: Callable[[], Any]) -> None:
        if self.stopped:
            return
        shadow = self._shadow
        if shadow is None:
            self._observe()
            return
        try:
            shadow.run(step)
            self._left = Footprint(self._optimizer)
        except StabilityError as error:
            self.stopped = f"the twin's step {self.steps} was refused: {error}"
            return
        distance = shadow.distance(self._scales)
        if not math.isfinite(distance):
            self.stopped = f"the distance is {distance} after step {self.steps}"
            return
        if self._low * self._target < RESOLUTION * self._eps * shadow.norm():
            self.stopped = (
                f"the parameters have grown so far in step {self.steps} that they do not resolve the distance"
            )
            return
        self._distances.append(distance)
        self._growth.append(math.log(distance / self._last) if distance > 0.0 else -math.inf)
        self._last = distance
        if distance == 0.0:
            self.restarts += 1
            shadow.copy()
            shadow.perturb(self._target, self._seed + self.restarts)
        elif not self._low * self._target <= distance <= self._high * self._target:
            self.renormalized += 1
            shadow.rescale(self._target / distance)
        else:
            return
        self._last = shadow.distance(self._scales)

    def _observe(self) -> None:
        """Learn how large an update is, in units of the norm of the parameters."""
        now = self._parameters()
        moved = sum(
            float((p.detach() - old).double().square().sum()) for p, old in zip(now, self._before_it, strict=True)
        )
        size = sum(float(old.double().square().sum()) for old in self._before_it)
        self._before_it = []
        self._updates.append(math.sqrt(moved / size) if size > 0.0 else 0.0)
        if len(self._updates) == _OBSERVED:
            self.size = statistics.median(self._updates)
            try:
                refuse_size(self.size, self._low, self._eps, finite_size=True)
            except ValueError as error:  # the run goes on
                self.stopped = f"the median update cannot be a size: {error}"

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]


def _takes_closure(optimizer: Optimizer) -> bool:
    parameters = inspect.signature(optimizer.step).parameters.values()
    return any(p.name == "closure" or p.kind is p.VAR_POSITIONAL for p in parameters)
