"""One evaluation of a loss with hooks on all modules of a model, which are gone afterwards."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stableopt.optim import RandomState, evaluate_again
from stableopt.optim.trial import untraced

__all__ = ["Observer", "ProbeError", "Walk", "eager", "floating", "replaced"]


class ProbeError(Exception):
    """A probe that does not show what is asked for; the message is the reason in a reading.

    Examples:
        >>> raise ProbeError("the probe did not call the model")
        Traceback (most recent call last):
        stableopt.lyapunov.layers.walk.ProbeError: the probe did not call the model
    """


class Observer(Protocol):
    """What is told about the calls of a walk. A call is named by the path of its module, from the second one on with a number."""

    def start(self) -> None:
        """Forget everything: an evaluation begins."""
        ...

    def source(self, x: Tensor) -> Tensor:
        """Take the source, and return what takes its place."""
        ...

    def enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the arguments of a call, and return those that take their place; None leaves them."""
        ...

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """See the output of a call."""
        ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        """Take the floating-point outputs of the model, and return what takes their place."""
        ...


class Walk:
    """Evaluate a loss and tell an observer about every call of a module, in order.

    The first outermost call of a module of the model is *the* call; later ones are not watched. Its first tensor is the source. If
    that one has no floating-point numbers (token indices), the source is the first output of a module in it that has, the one of
    the embedding.

    Args:
        model: whose modules get hooks for the time of the evaluation.
        probe: evaluates a loss by calling the model.
        observer: is told.

    Raises:
        ProbeError: in :meth:`run`, if the probe never calls the model.

    Examples:
        >>> class Names:
        ...     def start(self):
        ...         pass
        ...
        ...     def source(self, x):
        ...         return x
        ...
        ...     def enter(self, name, module, args, kwargs):
        ...         print(name or "model")
        ...
        ...     def leave(self, name, module, output):
        ...         pass
        ...
        ...     def result(self, outputs):
        ...         return outputs
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> Walk(model, lambda: model(torch.ones(1, 2)).sum(), Names()).run()
        model
        0
        1
    """

    def __init__(self, model: nn.Module, probe: Callable[[], Any], observer: Observer) -> None:
        self._model, self._probe, self._observer = model, probe, observer
        self._counts: Counter[str] = Counter()
        self._stack: list[str] = []
        self._begun = self._done = False

    def run(self, start: RandomState | None = None) -> None:
        """Evaluate the loss once, without gradients and without leaving a trace (:func:`stableopt.optim.evaluate_again`).

        Args:
            start: the random state to begin with.
        """
        with self._hooks(), eager():
            evaluate_again(self, start)
        if not self._done:
            raise ProbeError("the probe did not call the model")

    def run_in(self, transform: Callable[[Callable[[], Any]], Any], start: RandomState | None = None) -> Any:
        """Evaluate the loss where a transform does: inside of one of ``torch.func``, with a graph, or several times.

        Gradients are off (a transform may turn them on), ``backward`` does nothing, and random states are put back at the end;
        buffers are not.

        Args:
            transform: gets the function that evaluates the loss.
            start: the random state to begin with.

        Returns:
            What the transform returns.

        Raises:
            ProbeError: if the probe never calls the model.

        Examples:
            >>> class Doubled:
            ...     def start(self):
            ...         pass
            ...
            ...     def source(self, x):
            ...         return 2.0 * x
            ...
            ...     def enter(self, name, module, args, kwargs):
            ...         pass
            ...
            ...     def leave(self, name, module, output):
            ...         print(output)
            ...
            ...     def result(self, outputs):
            ...         return outputs
            >>> model = nn.Identity()
            >>> Walk(model, lambda: model(torch.ones(1)), Doubled()).run_in(lambda evaluate: evaluate())
            tensor([2.])
            tensor([2.])
        """
        with self._hooks(), eager(), untraced(start):
            result = transform(self)
        if not self._done:
            raise ProbeError("the probe did not call the model")
        return result

    def __call__(self) -> Any:
        """Evaluate the loss; a second time, if it turns out to need a graph, from the beginning."""
        self._counts.clear()
        self._stack.clear()
        self._begun = self._done = False
        self._observer.start()
        return self._probe()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in self._model.named_modules():
                if "parametrizations" in path.split("."):
                    continue
                before = module.register_forward_pre_hook(functools.partial(self._before, path), with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(functools.partial(self._after, path))
                stack.callback(after.remove)
            yield

    def _before(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._done:
            return None
        changed = None
        if not self._stack and not self._begun and (inputs := _tensors((args, kwargs))) and floating(inputs[0]):
            args, kwargs = changed = self._begin((args, kwargs), inputs[0])
        self._counts[path] += 1
        count = self._counts[path]
        name = path if count == 1 else f"{path}#{count}"
        self._stack.append(name)
        return self._observer.enter(name, module, args, kwargs) or changed

    def _after(self, _path: str, module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if self._done or not self._stack:
            return None
        name, changed = self._stack.pop(), None
        if not self._begun and (outputs := floating(output)):
            output = changed = self._begin(output, outputs[0])
        self._observer.leave(name, module, output)
        if not self._stack:
            self._done = True
            outputs = floating(output)
            changed = replaced(output, dict(zip(map(id, outputs), self._observer.result(outputs), strict=True)))
        return changed

    def _begin(self, tree: Any, source: Tensor) -> Any:
        self._begun = True
        return replaced(tree, {id(source): self._observer.source(source)})


def replaced(tree: Any, others: dict[int, Tensor]) -> Any:
    """Return arguments or outputs with other tensors in some places.

    Args:
        tree: arguments or outputs.
        others: ``id`` of a tensor in them -> what takes its place.

    Examples:
        >>> x = torch.zeros(1)
        >>> replaced((x, {"key": x}), {id(x): torch.ones(1)})
        (tensor([1.]), {'key': tensor([1.])})
    """
    return tree_map_only(Tensor, lambda t: others.get(id(t), t), tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def floating(tree: Any) -> list[Tensor]:
    """Return the different real floating-point tensors among arguments or outputs, in order.

    Examples:
        >>> x = torch.ones(2)
        >>> len(floating((x, {"key": x, "index": torch.tensor(1)})))
        1
    """
    found = {id(t): t for t in _tensors(tree) if t.is_floating_point()}
    return list(found.values())


def eager() -> AbstractContextManager[Any]:
    """Let compiled modules run as they are written, where anything was compiled at all: a compiled graph knows no new hooks.

    Examples:
        >>> with eager():
        ...     pass
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
