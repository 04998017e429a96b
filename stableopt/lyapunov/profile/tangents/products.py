r"""The gradient of a step together with its derivative along perturbations of the parameters.

The derivative of the gradient along :math:`\delta\theta` is the product :math:`H\,\delta\theta` with the Hessian of the loss of the
very batch, dropout mask and batch statistics of the step. The cheapest way is the graph of the loss that the training builds
anyway: after the training's own backward pass, which is left as it is, the gradient is made once more with a graph of its own, and
that is differentiated along all perturbations.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stableopt.optim import RandomState
from stableopt.optim.curvature import Choice, Curvature, Method, asymmetry, asymmetry_of_rounding, gradients
from stableopt.optim.modules import modules_at_hand
from stableopt.optim.trial import graph_eps, loss_with_graph

__all__ = ["Gradient", "GradientTap", "NoDerivativeError", "first_line"]

Directions = Sequence[Tensor]
"""One tensor ``(k, *shape)`` per parameter."""

_FEW = 10_000
"""Numbers in the parameters up to which products are made together on a CPU: there the calls take the time, else the memory."""
_TRUSTED = ("torch.", "stableopt.")
"""Whose functions have a backward that is the derivative and can be differentiated, or says that it cannot."""


class NoDerivativeError(RuntimeError):
    """A gradient that cannot be differentiated any way that was allowed.

    Examples:
        >>> raise NoDerivativeError("the loss has no second derivative")
        Traceback (most recent call last):
        stableopt.lyapunov.profile.tangents.products.NoDerivativeError: the loss has no second derivative
    """


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


class GradientTap:
    """Take the derivative of a gradient out of a training step, and leave the step as it is.

    Args:
        parameters: leaves, those of the optimizer.
        method: ``auto`` for the graph of the training where it has a second derivative and the other ways where it has not;
            ``graph`` for that alone; ``exact``, ``forward`` or ``difference`` for one way, by further evaluations of the closure.
        model: whose modules may have backward hooks; without it only those that a closure reaches are looked at.

    Attributes:
        value: what the closure has returned.
        gradient: of the step, None before its backward pass and after :meth:`forget`.
        reason: why another way than the graph was taken; empty if it was not.

    Note:
        Where a parameter or a module has a backward hook, or the loss a function of its own with a backward of its own, the second
        pass would not be the derivative of the first: then gradients are compared at a distance (``difference``).

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

    def __init__(self, parameters: Sequence[Tensor], method: str = "auto", model: nn.Module | None = None) -> None:
        self.parameters, self._model = list(parameters), model
        self.value: Any = None
        self.gradient: Gradient | None = None
        self.reason = ""
        self._method = method
        self._graph_works = method in {"auto", "graph"}
        self._looked, self._refused = False, ""
        self._together = sum(p.numel() for p in self.parameters) <= _FEW or any(p.is_cuda for p in self.parameters)
        self._choice: Choice | None = None
        self._loss: Callable[[], Tensor] | None = None

    def evaluate(self, closure: Callable[[], Any], directions: Directions) -> Any:
        """Evaluate the closure of a step, and differentiate its gradient along perturbations.

        Args:
            closure: as torch asks for it.
            directions: ``(k, *shape)`` per parameter.

        Returns:
            What the closure returns.

        Raises:
            NoDerivativeError: if there is no second derivative the way that was asked for; :attr:`value` is then what the closure
                has returned.
        """
        self.gradient = None
        start = RandomState.capture()
        if self._graph_works:
            self._look_at([] if self._looked else modules_at_hand(closure))
        mode = _AfterBackward(self, directions) if self._graph_works else contextlib.nullcontext()
        with mode:
            self.value = closure()
        if self.gradient is not None:
            return self.value
        if isinstance(mode, _AfterBackward):
            self._give_up_graph(mode.failure or "its backward was not seen")
        if self._refused:
            raise NoDerivativeError(self._refused)
        try:
            self._anew(closure, start, directions)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise NoDerivativeError(f"the gradient could not be differentiated ({first_line(error)})") from error
        return self.value

    def backward(self, loss: Tensor, directions: Directions) -> None:
        """Do ``loss.backward()``, and differentiate the gradient along perturbations; called again, both are added up.

        Args:
            loss: one real number with its graph.
            directions: ``(k, *shape)`` per parameter.

        Raises:
            NoDerivativeError: if the gradient has no derivative in this graph, after the backward pass: then a closure is needed,
                for which there are other ways.
        """
        before = self.gradient
        if before is not None and all(p.grad is None or not bool(p.grad.any()) for p in self.parameters):
            before = None  # of a batch whose step was skipped
        self.gradient = None
        if self._graph_works:
            self._look_at([])
        mode = _AfterBackward(self, directions)
        with mode:
            loss.backward()
        if self.gradient is None:
            again = "" if self._method in {"auto", "graph"} else f"method={self._method!r} evaluates the loss again"
            why = self._refused or self.reason or again or mode.failure
            raise NoDerivativeError(
                f"the gradient could not be differentiated ({why}): call optimizer.step(closure), so that another way can be taken"
            )
        if before is not None:
            self.gradient = _sum(before, self.gradient)

    def forget(self) -> None:
        """Forget the gradient: the step is over."""
        self.gradient = None

    def take(self, loss: Tensor, directions: Directions, *, keep: bool) -> str:
        """Differentiate the gradient of a loss whose backward pass is done; called by the mode.

        Args:
            loss: with its graph, which is still there.
            directions: ``(k, *shape)`` per parameter.
            keep: whether somebody else needs the graph afterwards.

        Returns:
            Why that is not possible; empty if it was.
        """
        if not self._graph_works:
            return "another way was taken before"
        with torch.enable_grad():
            grads = gradients(loss, self.parameters, twice=True)
        if any(g is not None and not g.requires_grad for g in grads):
            return "a gradient has no graph: it is constant, or its backward cannot be differentiated"
        kept = [(i, g) for i, g in enumerate(grads) if g is not None]
        rows = directions[0].shape[0]
        if kept and not self._looked:
            if foreign := _foreign(loss):
                return f"{foreign} has a backward of its own"
            if not self._symmetric(kept):
                return "products with the Hessian are not symmetric: a second derivative in it is wrong"
            if graph_eps(loss) > max(torch.finfo(p.dtype).eps for p in self.parameters):
                self.reason = (
                    "a part of the loss is computed in fewer digits than its parameters have, and products with it"
                )
            self._looked = True
        along = self._vmapped(kept, directions, keep=keep) if self._together and rows > 1 else None
        if along is None:
            along = _stacked([self._product(kept, directions, r, keep=keep or r < rows - 1) for r in range(rows)])
        taken = Gradient([None if g is None else g.detach() for g in grads], along, "graph", rows)
        self.gradient = taken if self.gradient is None else _sum(self.gradient, taken)
        return ""

    def _product(
        self, kept: list[tuple[int, Tensor]], directions: Directions, row: int, *, keep: bool = True
    ) -> list[Tensor]:
        if not kept:
            return [torch.zeros_like(p) for p in self.parameters]
        vectors, outputs = [directions[i][row].to(g.dtype) for i, g in kept], [g for _, g in kept]
        made = torch.autograd.grad(outputs, self.parameters, vectors, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(self.parameters, made, strict=True)]

    def _vmapped(self, kept: list[tuple[int, Tensor]], directions: Directions, *, keep: bool) -> list[Tensor] | None:
        """Make all products in one pass; None where that is not possible, and from then on."""
        vectors, outputs = [directions[i].to(g.dtype) for i, g in kept], [g for _, g in kept]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        if not kept:
            return [torch.zeros_like(d) for d in directions]
        try:
            with warnings.catch_warnings():  # of operations that are then done one by one
                warnings.simplefilter("ignore", UserWarning)
                made = torch.autograd.grad(outputs, self.parameters, vectors, **options)
        except RuntimeError:
            self._together = False
            return None
        if not keep:
            self._product(kept, [d[:1] for d in directions], 0, keep=False)  # frees the graph
        return [torch.zeros_like(d) if h is None else h.detach() for d, h in zip(directions, made, strict=True)]

    def _symmetric(self, kept: list[tuple[int, Tensor]]) -> bool:
        """Look once whether two products are those of a symmetric matrix; what is not finite is said later."""
        eps = max(torch.finfo(p.dtype).eps for p in self.parameters)
        found = asymmetry(lambda v: self._product(kept, [x.unsqueeze(0) for x in v], 0), self.parameters)
        return not found > asymmetry_of_rounding(eps)

    def _look_at(self, modules: Iterable[nn.Module]) -> None:
        """Give the graph up where hooks would act on the second pass as well."""
        modules = [*modules, *([] if self._model is None else self._model.modules())]
        hooked = any(p._backward_hooks for p in self.parameters)  # noqa: SLF001 - the only place where they are
        hooked = hooked or any(m._backward_hooks or m._backward_pre_hooks for m in modules)  # noqa: SLF001
        if hooked:
            self._give_up_graph("there are backward hooks, which would change the second pass as well", "difference")

    def _give_up_graph(self, why: str, method: str | None = None) -> None:
        if self._method == "graph":
            self._refused = f"the graph of the training cannot be used ({why}): use method='auto'"
        self._graph_works, self.reason = False, f"the graph is not used: {why}"
        if method is not None or "backward of its own" in why:
            self._method = method or "difference"

    def _anew(self, closure: Callable[[], Any], start: RandomState, directions: Directions) -> None:
        self._loss = partial(loss_with_graph, closure, start, accumulated=True)
        if self._choice is None:
            self._choice = Choice(self._current, cast("Method", self._method))
        rows = directions[0].shape[0] if directions else 0

        def task(product: Curvature) -> tuple[str, list[list[Tensor]]]:
            pairs = list(zip(directions, self.parameters, strict=True))
            return product.name, [product([d[r].to(p.dtype) for d, p in pairs]) for r in range(rows)]

        try:
            values = [None if g is None else g.detach() for g in gradients(self._current(), self.parameters)]
            name, made = self._choice.run(self.parameters, task)
        finally:
            self._loss = None
        first = self.reason.split("; ")[0]
        self.reason = "; ".join(part for part in (first, self._choice.reason) if part)
        self.gradient = Gradient(values, _stacked(made), name, rows)

    def _current(self) -> Tensor:
        if self._loss is None:
            raise RuntimeError("there is no step whose loss could be evaluated.")
        return self._loss()


class _AfterBackward(TorchFunctionMode):
    """Let each ``backward`` be as it is, but keep its graph, and differentiate the gradient after it."""

    def __init__(self, tap: GradientTap, directions: Directions) -> None:
        super().__init__()
        self.failure = ""
        self._tap, self._directions = tap, directions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.backward and func is not torch.autograd.backward:
            return func(*args, **kwargs)
        keep = bool(kwargs.get("retain_graph") or kwargs.get("create_graph"))
        result = func(*args, **(kwargs | {"retain_graph": True}))
        loss = args[0] if isinstance(args[0], Tensor) else None
        weighted = len(args) > 1 or kwargs.get("gradient") is not None or kwargs.get("grad_tensors") is not None
        if self.failure:
            pass
        elif loss is None or weighted or kwargs.get("inputs") is not None:
            self.failure = "backward was given more than a loss"
        else:
            try:
                with torch.no_grad():
                    self.failure = self._tap.take(loss, self._directions, keep=keep)
            except (RuntimeError, ValueError, NotImplementedError) as error:  # what the training would not have met
                self.failure = first_line(error)
        if self.failure:
            self._tap.gradient = None
        return result


def _foreign(loss: Tensor) -> str:
    """Return the name of a function in a graph whose backward is somebody's own; empty if there is none."""
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and not f"{function.__module__}.".startswith(_TRUSTED):
            return function.__name__
        waiting += [following for following, _ in node.next_functions]
    return ""


def first_line(error: Exception) -> str:
    r"""Return the first line of what an error says, its name if it says nothing.

    Examples:
        >>> first_line(RuntimeError("one\ntwo")), first_line(KeyError())
        ('one', 'KeyError')
    """
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _stacked(rows: list[list[Tensor]]) -> list[Tensor]:
    """Return, for each parameter, its rows in one tensor."""
    return [column[0].unsqueeze(0) if len(column) == 1 else torch.stack(column) for column in zip(*rows, strict=True)]


def _sum(first: Gradient, second: Gradient) -> Gradient:
    values = [b if a is None else a if b is None else a + b for a, b in zip(first.values, second.values, strict=True)]
    along = [a + b for a, b in zip(first.along, second.along, strict=True)]
    return Gradient(values, along, second.backend, first.products + second.products)
