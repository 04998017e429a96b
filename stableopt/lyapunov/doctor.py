"""What can be measured on a model with its loss, which way, and at what cost: asked before a long run and not during it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from stableopt.lyapunov.budget import Every, intervals
from stableopt.lyapunov.curvature import CurvatureProbe, apart
from stableopt.lyapunov.diagnosis import BUDGET, Diagnosis, Tier, Way, advise
from stableopt.lyapunov.layers import LayerProbe
from stableopt.lyapunov.profile.studies.identities import IdentityCheck, check_identities
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.lyapunov.vitals import Names, measure_vitals
from stableopt.optim import RandomState, evaluate_again
from stableopt.optim.agree import Alone
from stableopt.optim.curvature import (
    Curvature,
    Difference,
    Exact,
    Forward,
    Graph,
    acceptable_asymmetry,
    asymmetry,
    dot,
    gradients,
)
from stableopt.optim.limits import known_limits
from stableopt.optim.modules import buffers_put_back

__all__ = ["Diagnosis", "Tier", "Way", "diagnose"]

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_CAUSES = ("a second derivative in torch is silently wrong", "kinks or rounding are larger than the curvature")
_SECONDS = 2.0  # about so long is timed for each way

_NONSMOOTH = (
    "Relu",
    "LeakyRelu",
    "Prelu",
    "Rrelu",
    "Hardtanh",
    "Hardswish",
    "Hardsigmoid",
    "Threshold",
    "Softshrink",
    "Hardshrink",
)
_NONSMOOTH += (
    "Abs",
    "Sign",
    "Clamp",
    "Max",
    "Min",
    "Sort",
    "Topk",
    "Median",
    "Kthvalue",
    "MaxPool",
    "AdaptiveMaxPool",
    "L1Loss",
)


def diagnose(model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer | None = None) -> Diagnosis:
    """Find out what can be measured on a model with its loss, and leave both as they were.

    Args:
        model: in the mode in which it is trained.
        loss: returns the loss of a fixed batch with its graph, forward only.
        optimizer: that will train it, to see whether its limits are known; None to leave that out.

    Returns:
        The diagnosis. Costs are measured here and now, the least of a few rounds, good to about 20 % on a quiet machine.

    Raises:
        TypeError: if the model is no module, or the loss cannot be called.
        ValueError: if nothing of the model is trained, or the loss is not one real number with a graph.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 1))
        >>> found = diagnose(model, lambda: model(torch.ones(4, 2)).square().mean())
        >>> found.kinks, found.random
        (('1',), ('2',))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"diagnose needs a torch.nn.Module as model, got {type(model).__name__}.")
    if not callable(loss):
        raise TypeError(f"diagnose needs a function that returns the loss with its graph, got {type(loss).__name__}.")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train.")
    with undisturbed(model), apart(model, loss):
        return _Examination(model, loss, optimizer, named).result()


class _Examination:
    """A model and its loss on the table."""

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer | None, named: Mapping[str, Tensor]
    ) -> None:
        self.model, self.loss, self.named = model, loss, named
        self.parameters = list(named.values())
        self.given = optimizer
        self.optimizer = optimizer or torch.optim.SGD(self.parameters, lr=0.1)
        self.start = RandomState.capture()
        self.fb: list[float] = []
        generator = torch.Generator().manual_seed(0)
        self.v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in self.parameters]

    def result(self) -> Diagnosis:
        """Examine."""
        value, operations, unused = self._first_look()
        again = self._again(lambda: float(self.loss().detach()))
        eps = max(torch.finfo(p.dtype).eps for p in self.parameters)
        repeatable = abs(again - value) <= 100.0 * eps * abs(value)
        ways = self._ways()
        chosen = next((way.name for way in ways if way.works and way.name != "graph"), "")
        layers = LayerProbe(self.model, self.loss)
        tiers, kinks = self._tiers(layers, repeatable=repeatable)
        statistics_, drawing = _kinds(self.model)
        found = Diagnosis(
            parameters=sum(p.numel() for p in self.parameters),
            seconds=min(self.fb),
            repeatable=repeatable,
            unused=unused,
            kinks=kinks,
            operations=operations,
            statistics=statistics_,
            random=drawing,
            ways=ways,
            chosen=chosen,
            tiers=tiers,
            notes=(),
        )
        found = replace(found, identity=self._identity())
        return replace(found, notes=advise(found, self._limits(), (value, again)))

    def _first_look(self) -> tuple[float, tuple[str, ...], tuple[str, ...]]:
        """Return the loss, the operations with kinks in its graph, and the parameters that it does not reach."""

        def look() -> tuple[float, tuple[str, ...], tuple[str, ...]]:
            value = self.loss()
            grads = gradients(value, self.parameters)
            unused = tuple(name for name, g in zip(self.named, grads, strict=True) if g is None)
            return float(value.detach()), _nonsmooth(value), unused

        return self._again(look)

    def _again(self, run: Callable[[], Any]) -> Any:
        self.start.restore()
        with torch.enable_grad(), buffers_put_back(self.loss):
            return run()

    def _relative(self, *runs: Callable[[], float]) -> list[float]:
        """Return the least times of a few rounds in units of a forward and backward pass, timed in the same rounds.

        Args:
            runs: each returns the seconds that it took.
        """
        rounds: list[list[float]] = []
        began = time.perf_counter()
        while len(rounds) < 4 or (len(rounds) < 7 and time.perf_counter() - began < _SECONDS):
            passes = self._seconds(lambda: torch.autograd.grad(self.loss(), self.parameters, allow_unused=True))
            rounds.append([passes, *(run() for run in runs)])
        unit, *others = (min(column) for column in zip(*rounds[1:], strict=True))  # the first warms up
        self.fb.append(unit)
        return [other / unit for other in others]

    def _seconds(self, run: Callable[[], object]) -> float:
        """Return the time of a run."""

        def timed() -> float:
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            return time.perf_counter() - began

        return self._again(timed)

    def _wait(self) -> None:
        if any(p.is_cuda for p in self.parameters):
            torch.cuda.synchronize()

    def _ways(self) -> tuple[Way, ...]:
        """Try each way, time it, and compare its product with that of the first that works."""
        ways: list[Way] = []
        reference: list[Tensor] | None = None
        for name in ("graph", "exact", "forward", "difference"):
            try:
                Hv, why = self._product(name)
                cost, further = self._times(name)
            except (RuntimeError, ValueError) as error:
                ways.append(Way(name, works=False, why=_first_sentence(error)))
                continue
            doubt = bool(why)
            gap = math.nan if reference is None else _gap(Hv, reference)
            reference = Hv if reference is None and not doubt else reference
            ways.append(Way(name, not doubt, why, cost, further, gap))
        return tuple(ways)

    def _open(self, name: str) -> Curvature:
        if name == "graph":
            return Graph(self.loss(), self.parameters)
        return {"exact": Exact, "forward": Forward, "difference": Difference}[name](self.loss, self.parameters)

    def _product(self, name: str) -> tuple[list[Tensor], str]:
        def make() -> tuple[list[Tensor], str]:
            # each kernel of attention has dropout masks of its own, which is not what is compared
            same_kernel = sdpa_kernel(SDPBackend.MATH) if name == "difference" else nullcontext()
            with same_kernel, self._open(name) as product:
                Hv = product(self.v)
                found = asymmetry(product)
                if found > acceptable_asymmetry(product):
                    return Hv, f"its products are not symmetric ({found:.1g}): " + _CAUSES[name == "difference"]
            return Hv, ""

        return self._again(make)

    def _times(self, name: str) -> list[float]:
        """Return the cost of the first product and of a further one."""

        def first() -> float:
            opened = self._open(name)

            def run() -> None:
                with opened as product:
                    product(self.v)

            return self._seconds(run)

        def further() -> float:
            with self._open(name) as product:
                product(self.v)
                return self._seconds(lambda: product(self.v))

        return self._relative(lambda: self._again(first), lambda: self._again(further))

    def _tiers(self, layers: LayerProbe, *, repeatable: bool) -> tuple[tuple[Tier, ...], tuple[str, ...]]:
        """Let each instrument look, and plan the intervals."""
        names = Names(self.model, self.optimizer)
        curvature = CurvatureProbe(self.model, self.optimizer, self.loss)
        seen: dict[str, Any] = {}
        looks: dict[str, tuple[str, Callable[[], Any]]] = {
            "vitals": (
                "norms, what is not finite",
                lambda: measure_vitals(names.parameters(), {}, Alone, names.buffers()),
            ),
            "energy": ("the same batch before and after", lambda: evaluate_again(self.loss)),
            "sharpness": ("sharpness, trace", lambda: seen.update(curvature=curvature.measure())),
            "layers": ("norms, growth and kinks of layers", lambda: seen.update(layers=layers.measure())),
            "gaps": ("proofs for constrained weights", layers.gaps),
        }
        costs, failed = {}, {}
        for name, (_, look) in looks.items():
            try:
                (costs[name],) = self._relative(lambda look=look: self._seconds(look))
            except Exception as error:  # whatever it is, the other instruments are there
                failed[name] = _first_sentence(error)
        if not repeatable:
            failed["energy"] = "the loss is not repeatable"
            costs.pop("energy", None)
        plan = intervals(costs, {name: getattr(Every(), name) for name in costs}, BUDGET)
        reasons = {
            "energy": "needs a closure, or the loss told",
            "sharpness": getattr(seen.get("curvature"), "reason", ""),
            "layers": getattr(seen.get("layers"), "reason", ""),
        }
        works = {"sharpness": seen.get("curvature") is not None and seen["curvature"].products > 0}
        tiers = tuple(
            Tier(
                name,
                measures,
                name in costs and works.get(name, True),
                failed.get(name, reasons.get(name, "")),
                costs.get(name, math.nan),
                plan.get(name, 0),
            )
            for name, (measures, _) in looks.items()
        )
        return tiers, tuple(seen["layers"].kinks) if "layers" in seen else ()

    def _identity(self) -> IdentityCheck | None:
        """Check the sum of all exponents on a few entries."""
        if self.given is None:
            return None
        try:
            return self._again(lambda: check_identities(self.model, self.loss, self.optimizer))
        except (RuntimeError, ValueError) as error:  # no products with the Hessian, or no derivative of the update
            return IdentityCheck(type(self.given).__name__, reason=_first_sentence(error))

    def _limits(self) -> str:
        """Say what is known about the limits of the optimizer."""
        if self.given is None:
            return "give the optimizer as well to see whether its stability limits are known"
        try:
            rule = known_limits(self.given)
            limits = sorted({float(rule.limit(group)) for group in self.given.param_groups})
        except ValueError as error:
            return f"only the plain sharpness can be measured: {error}"
        numbers = ", ".join(f"{limit:.4g}" for limit in limits)
        return f"the sharpness limit of {type(self.given).__name__} is {numbers}, in its metric"


def _nonsmooth(value: Tensor) -> tuple[str, ...]:
    """Return the kinds of operations with kinks in a graph."""
    waiting, seen, found = [value.grad_fn], {value.grad_fn, None}, set()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        kind = type(node).__name__.partition("Backward")[0]
        if any(kind == known or (known.endswith("Pool") and kind.startswith(known)) for known in _NONSMOOTH):
            found.add(kind)
        following = [n for n, _ in node.next_functions if n not in seen]
        seen.update(following)
        waiting += following
    return tuple(sorted(found))


def _kinds(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of modules with running statistics, and of those that draw random numbers now."""
    carrying, drawing = [], []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            carrying.append(name)
        rate = getattr(module, "p" if isinstance(module, _DROPOUT) else "dropout", None)
        if module.training and (isinstance(module, nn.RReLU) or (isinstance(rate, float) and rate > 0.0)):
            drawing.append(name)
    return tuple(carrying), tuple(drawing)


def _gap(a: list[Tensor], b: list[Tensor]) -> float:
    apart_by = [x - y for x, y in zip(a, b, strict=True)]
    size = math.sqrt(dot(b, b))
    return math.sqrt(dot(apart_by, apart_by)) / size if size > 0.0 else 0.0


def _first_sentence(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0].split(". ")[0].rstrip(".") if said else type(error).__name__
