r"""The gradient of a step together with its derivative along perturbations of the parameters.

The derivative of the gradient along :math:`\delta\theta` is the product :math:`H\,\delta\theta` with the Hessian of the loss of the
very batch, dropout mask and batch statistics of the step. The cheapest way is the graph of the backward that the training makes
anyway: it is kept with a graph of its own for a moment, used for all perturbations, and given back as the plain gradient it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stableopt.optim import RandomState
from stableopt.optim.curvature import Choice, Curvature, no_second_derivative
from stableopt.optim.trial import loss_with_graph

__all__ = ["Gradient", "GradientTap"]

Directions = Sequence[Tensor]
"""One tensor ``(k, *shape)`` per parameter."""


@dataclass
class Gradient:
    """The gradient of a step, and its derivative along k perturbations.

    Args:
        values: one tensor per parameter, None for one that the loss does not depend on.
        along: ``(k, *shape)`` per parameter; zero where the gradient does not depend on the parameters.
        backend: how the products were made: ``graph``, ``exact``, ``forward`` or ``difference``.
        products: how many there were.

    Examples:
        >>> Gradient([torch.ones(2)], [torch.zeros(1, 2)], "graph", 1).backend
        'graph'
    """

    values: list[Tensor | None]
    along: list[Tensor]
    backend: str
    products: int


_FEW = 10_000
"""Numbers in the parameters up to which products are made together on a CPU: there the calls take the time, else the memory."""


class GradientTap:
    """Take the derivative of a gradient out of a training step, and leave the step as it is.

    Args:
        parameters: leaves, those of the optimizer.
        method: ``auto`` for the graph of the training where it has a second derivative and the other ways where it has not;
            ``graph`` for that alone; ``exact``, ``forward`` or ``difference`` for one way, by further evaluations of the closure.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> tap = GradientTap([w])
        >>> def closure():
        ...     w.grad = None
        ...     loss = (w**3).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = tap.evaluate(closure, [torch.ones(1, 2)])
        >>> tap.gradient.along, w.grad
        ([tensor([[ 6., 12.]])], tensor([ 3., 12.]))
    """

    def __init__(self, parameters: Sequence[Tensor], method: str = "auto") -> None:
        self.parameters = list(parameters)
        self.gradient: Gradient | None = None
        self.reason = ""
        self._method = method
        self._graph_works = method in {"auto", "graph"}
        self._together = sum(p.numel() for p in self.parameters) <= _FEW or any(p.is_cuda for p in self.parameters)
        self._choice: Choice | None = None
        self._closure: Callable[[], Any] | None = None
        self._start: RandomState | None = None

    def evaluate(self, closure: Callable[[], Any], directions: Directions) -> Any:
        """Evaluate the closure of a step, and differentiate its gradient along perturbations.

        Args:
            closure: as torch asks for it.
            directions: ``(k, *shape)`` per parameter.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: if there is no second derivative the way that was asked for.
        """
        self.gradient = None
        start = RandomState.capture()
        if self._graph_works:
            mode = _KeepGraph(self, directions)
            with mode:
                value = closure()
            if self.gradient is not None:
                return value
            self._give_up_graph(mode.failure or "its backward was not seen, or a gradient has no graph")
        else:
            value = closure()
        self._anew(closure, start, directions)
        return value

    def backward(self, loss: Tensor, directions: Directions) -> None:
        """Do ``loss.backward()``, and differentiate the gradient along perturbations; called again, both are added up.

        Args:
            loss: one real number with its graph.
            directions: ``(k, *shape)`` per parameter.

        Raises:
            RuntimeError: if the backward has no second derivative: then a closure is needed, for which there are other ways.
        """
        if not self._graph_works:
            raise RuntimeError(
                f"method={self._method!r} evaluates the loss again, for which it needs a closure: call optimizer.step(closure), or "
                "use method='auto'."
            )
        before = self.gradient
        self.gradient = None
        mode = _KeepGraph(self, directions)
        with mode:
            loss.backward()
        if self.gradient is None:
            raise RuntimeError(
                f"the gradient could not be differentiated ({mode.failure or 'it has no graph'}): call optimizer.step(closure), so "
                "that another way can be taken."
            )
        if before is not None:
            self.gradient = _sum(before, self.gradient)

    def forget(self) -> None:
        """Forget the gradient: the step is over."""
        self.gradient = None

    def _give_up_graph(self, why: str) -> None:
        if self._method == "graph":
            raise RuntimeError(f"the graph of the training has no second derivative ({why}): use method='auto'.")
        self._graph_works, self.reason = False, f"graph said: {why}"

    def _anew(self, closure: Callable[[], Any], start: RandomState, directions: Directions) -> None:
        self._closure, self._start = closure, start
        if self._choice is None:
            method: Any = self._method if self._method != "graph" else "auto"
            self._choice = Choice(lambda: loss_with_graph(self._current(), self._start, accumulated=True), method)
        grads = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        rows = directions[0].shape[0] if directions else 0

        def task(product: Curvature) -> tuple[str, list[list[Tensor]]]:
            return product.name, [
                product([d[r].to(p.dtype) for d, p in zip(directions, self.parameters, strict=True)])
                for r in range(rows)
            ]

        try:
            name, made = self._choice.run(self.parameters, task)
        finally:
            self._closure = None
        along = _stacked(made)
        self.reason = "; ".join(part for part in (self.reason.split("; ")[0], self._choice.reason) if part)
        self.gradient = Gradient(grads, along, name, rows)

    def _current(self) -> Callable[[], Any]:
        if self._closure is None:
            raise RuntimeError("there is no step whose loss could be evaluated.")
        return self._closure

    def take(self, grads: list[Tensor | None], directions: Directions) -> str:
        """Differentiate gradients that have a graph; called by the mode, and says why that is not possible, if so.

        Args:
            grads: of the parameters, with their graphs.
            directions: ``(k, *shape)`` per parameter.
        """
        if any(g is not None and not g.requires_grad for g in grads):
            return "a gradient has no graph: it is constant, or its backward cannot be differentiated"
        kept = [(i, g) for i, g in enumerate(grads) if g is not None]
        rows = directions[0].shape[0]
        along = self._vmapped(kept, directions) if self._together and rows > 1 else None
        if along is None:
            along = _stacked([self._product(kept, directions, r) for r in range(rows)])
        values = [None if g is None else g.detach().clone() for g in grads]
        taken = Gradient(values, along, "graph", rows)
        self.gradient = taken if self.gradient is None else _sum(self.gradient, taken)
        return ""

    def _product(self, kept: list[tuple[int, Tensor]], directions: Directions, row: int) -> list[Tensor]:
        vectors = [directions[i][row].to(g.dtype) for i, g in kept]
        outputs = [g for _, g in kept]
        made = torch.autograd.grad(outputs, self.parameters, vectors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(self.parameters, made, strict=True)]

    def _vmapped(self, kept: list[tuple[int, Tensor]], directions: Directions) -> list[Tensor] | None:
        """Make all products in one pass; None where that is not possible, and from then on."""
        vectors, outputs = [directions[i].to(g.dtype) for i, g in kept], [g for _, g in kept]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        try:
            with warnings.catch_warnings():  # of operations that are then done one by one
                warnings.simplefilter("ignore", UserWarning)
                made = torch.autograd.grad(outputs, self.parameters, vectors, **options)
        except RuntimeError:
            self._together = False
            return None
        return [torch.zeros_like(d) if h is None else h.detach() for d, h in zip(directions, made, strict=True)]


class _KeepGraph(TorchFunctionMode):
    """Let ``backward`` keep the graph of the gradient for as long as the derivatives take."""

    def __init__(self, tap: GradientTap, directions: Directions) -> None:
        super().__init__()
        self.failure = ""
        self._tap, self._directions = tap, directions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func is not torch.Tensor.backward and func is not torch.autograd.backward) or self.failure:
            return func(*args, **kwargs)
        parameters = self._tap.parameters
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with warnings.catch_warnings():  # of the cycle between a parameter and its gradient, which is cut below
                warnings.filterwarnings(
                    "ignore", message="Using backward\\(\\) with create_graph=True", category=UserWarning
                )
                result = func(*args, **(kwargs | {"create_graph": True}))
            grads = [None if p.grad is None else p.grad for p in parameters]
            try:
                with torch.no_grad():
                    self.failure = self._tap.take(grads, self._directions)
            except RuntimeError as error:
                if not no_second_derivative(error):
                    raise
                self.failure = str(error).strip().splitlines()[0]
            if self.failure:
                self._tap.gradient = None
        finally:
            for p, old in zip(parameters, before, strict=True):
                new = p.grad
                if new is None:
                    p.grad = old
                elif old is None:
                    p.grad = new.detach()
                else:
                    p.grad = old.add_(new.detach()) if not old.requires_grad else (old + new).detach()
        return result


def _stacked(rows: list[list[Tensor]]) -> list[Tensor]:
    """Return, for each parameter, its rows in one tensor."""
    return [column[0].unsqueeze(0) if len(column) == 1 else torch.stack(column) for column in zip(*rows, strict=True)]


def _sum(first: Gradient, second: Gradient) -> Gradient:
    values = [b if a is None else a if b is None else a + b for a, b in zip(first.values, second.values, strict=True)]
    along = [a + b for a, b in zip(first.along, second.along, strict=True)]
    return Gradient(values, along, second.backend, first.products + second.products)
