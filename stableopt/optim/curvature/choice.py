"""Which of the ways to make a product a loss allows: they are tried in turn, and each refusal is remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeAlias, TypeVar, get_args

from torch import Tensor

from stableopt.optim.curvature.base import Curvature, acceptable_asymmetry, asymmetry, no_second_derivative
from stableopt.optim.curvature.difference import Difference
from stableopt.optim.curvature.forward import Forward
from stableopt.optim.curvature.reverse import Exact, Graph

__all__ = ["METHODS", "Choice", "Method"]

Method: TypeAlias = Literal["auto", "exact", "forward", "difference"]
METHODS: tuple[str, ...] = get_args(Method)

T = TypeVar("T")

_CAUSES = (
    "something in the loss has a second derivative that is silently wrong (weight_norm backward, torch.linalg.solve forward)",
    "kinks or rounding are larger than the curvature, or the backward of the loss is not its gradient",
)


class _AsymmetryError(RuntimeError):
    """Products that cannot be those of a Hessian."""


class Choice:
    """Make products the first way that works: a graph that is there, autograd twice, forward over reverse, differences.

    What works is also looked at once for symmetry, by two more products: some second derivatives in torch are silently wrong, and
    differences may be drowned by kinks (ReLU with few samples in float32) or rounding (autocast).

    Args:
        loss: returns the loss with its graph, forward only.
        method: the one way to take, or ``auto`` for the first that works.

    Attributes:
        refused: why a way has been given up for good, by its name.
        reason: one sentence if the last run did not go the first way, else empty.

    Raises:
        TypeError: if the loss cannot be called.
        ValueError: if there is no such method.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> choice = Choice(lambda: (w**2).sum())
        >>> choice.run([w], lambda product: (product.name, product([torch.ones(1)])))
        ('exact', [tensor([2.])])
    """

    def __init__(self, loss: Callable[[], Tensor], method: Method = "auto") -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function that returns the loss with its graph, got {type(loss).__name__}.")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
        self.loss = loss
        self.method: Method = method
        self.refused: dict[str, str] = {}
        self.reason = ""
        self._symmetric: set[str] = set()

    def run(self, parameters: Sequence[Tensor], task: Callable[[Curvature], T], graph: Tensor | None = None) -> T:
        """Do something with products, the first way that works.

        Args:
            parameters: leaves that require gradients.
            task: is given an open :class:`Curvature`; called anew with the next one where a way turns out not to work.
            graph: the loss at the present parameters with a graph that is still there, to begin with that; only with ``auto``.

        Returns:
            What the task returns.

        Raises:
            RuntimeError: if the one way asked for does not work, or gives products that are not symmetric.
            ValueError: if the loss is not one real number with a graph, a parameter is sharded, or half precision is left with
                differences; if a graph is given to a method that has no use for it.

        Examples:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.tensor([3.0]))
            >>> choice = Choice(lambda: (w**2).sum())
            >>> choice.run([w], lambda product: product.name, graph=choice.loss())
            'graph'
        """
        if graph is not None and self.method != "auto":
            raise ValueError(f"a graph is used by method='auto' only, not by {self.method!r}: leave it out.")
        failures: dict[str, str] = {}
        for name, opened in self._ways(parameters, graph):
            if name in self.refused:
                failures[name] = self.refused[name]
                continue
            curvature = opened()
            try:
                with curvature:
                    self._check(curvature)
                    result = task(curvature)
            except RuntimeError as error:
                doubtful = isinstance(error, _AsymmetryError)
                if self.method != "auto" or name == "difference" or not (doubtful or curvature.refuses(error)):
                    raise
                failures[name] = str(error).strip().splitlines()[0].split(". ")[0]
                if name != "graph" or no_second_derivative(error):  # else that one graph is spent, the next may be good
                    self.refused[name] = failures[name]
            else:
                self.reason = self._sentence(name, failures)
                return result
        raise AssertionError("the last way returns or raises.")

    def _ways(
        self, parameters: Sequence[Tensor], graph: Tensor | None
    ) -> Iterator[tuple[str, Callable[[], Curvature]]]:
        if graph is not None:
            yield "graph", partial(Graph, graph, parameters)
        for kind in (Exact, Forward, Difference):
            if self.method in {"auto", kind.name}:
                yield kind.name, partial(kind, self.loss, parameters)

    def _check(self, curvature: Curvature) -> None:
        """Look once whether products are those of a symmetric matrix; a difference that is asked for is what it is."""
        name = curvature.name
        if name in self._symmetric or (name == "difference" and self.method != "auto"):
            return
        found = asymmetry(curvature)
        curvature.count = 0
        if found > acceptable_asymmetry(curvature):
            raise _AsymmetryError(f"the products by {name} are not symmetric: {_CAUSES[name == 'difference']}")
        if not math.isnan(found):
            self._symmetric.add(name)

    @staticmethod
    def _sentence(name: str, failures: dict[str, str]) -> str:
        why = "; ".join(f"{other} said: {said}" for other, said in failures.items())
        what = "difference, which also sees kinks" if name == "difference" else name
        return f"by {what}, since {why}" if why else ""
