"""Products with the Hessian of a loss, by autograd or by differences of gradients, without leaving a trace."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stableopt.constraints.sharding import is_sharded
from stableopt.optim.modules import buffers_put_back
from stableopt.optim.trial import RandomState

__all__ = ["Curvature", "Difference", "Exact", "dot", "no_second_derivative"]


class Curvature(ABC):
    """A context in which products with the Hessian of a loss can be made; at its end everything is as before.

    Parameters, ``.grad``, buffers of the modules that the loss calls and all random states are left as they are, and each
    evaluation of the loss draws the same random numbers. A graph that was built before stays good, unless it needs such a buffer:
    that is written back, which counts as a change.

    Args:
        loss: returns the loss with its graph.
        parameters: leaves that require gradients.

    Raises:
        ValueError: if the loss is not one real number with a graph, or a parameter is sharded over processes.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with Exact(lambda: (w**3).sum(), [w]) as product:
        ...     product([torch.ones(2)])
        [tensor([ 6., 12.])]
    """

    name: ClassVar[str]

    def __init__(self, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        if any(is_sharded(p) for p in parameters):
            raise ValueError(
                "sharpness cannot be measured on sharded parameters: their gradients are only complete after backward; "
                "measure an unsharded copy of the model."
            )
        self.loss, self.parameters, self.count = loss, list(parameters), 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._start = RandomState.capture()
        self._stack.callback(self._start.restore)
        # An autocast around us keeps the weights it has cast; neither its graph nor ours may meet the other.
        torch.clear_autocast_cache()
        self._stack.callback(torch.clear_autocast_cache)
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        """Return Hv, one tensor for each of v.

        Args:
            v: one tensor per parameter, of its shape.
        """
        self.count += 1
        return [
            torch.zeros_like(x) if h is None else h.detach().to(x.dtype)
            for h, x in zip(self._product(v), v, strict=True)
        ]

    @abstractmethod
    def _open(self) -> None:
        """Prepare for products."""

    @abstractmethod
    def _product(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        """Return Hv."""

    def _gradients(self, *, twice: bool) -> tuple[Tensor | None, ...]:
        """Evaluate the loss from the random state of the beginning, and differentiate it."""
        self._start.restore()
        with torch.enable_grad():
            value = self.loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss must be one real number, a tensor with its graph, got {what}.")
            if not value.requires_grad:
                raise ValueError(
                    "the loss has no graph: return the tensor itself (not .item()), do not call backward, and do not use no_grad."
                )
            grads = torch.autograd.grad(value.reshape(()), self.parameters, create_graph=twice, allow_unused=True)
        return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in grads)


class Exact(Curvature):
    """By autograd twice: one forward pass, its graph kept for all products.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with Exact(lambda: (w**2).sum(), [w]) as product:
        ...     product([torch.ones(1)])
        [tensor([2.])]
    """

    name = "exact"

    def _open(self) -> None:
        self._stack.enter_context(buffers_put_back(self.loss))
        grads = self._gradients(twice=True)
        if any(g is not None and not g.requires_grad for g in grads):
            # Either a parameter on which the loss depends linearly, or a backward that builds no graph, whose curvature would
            # silently be taken for zero: a difference tells the one from the other.
            raise RuntimeError(
                "the gradient of a parameter has no graph: it is constant, or it comes from a backward that cannot be "
                "differentiated twice; use method='difference'"
            )
        pairs = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._kept, self._smooth = [i for i, _ in pairs], [g for _, g in pairs]

    def _product(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        if not self._smooth:  # the loss depends on no parameter
            return [None] * len(v)
        along = [v[i].to(g.dtype) for i, g in zip(self._kept, self._smooth, strict=True)]
        return torch.autograd.grad(self._smooth, self.parameters, along, retain_graph=True, allow_unused=True)


class Difference(Curvature):
    r"""By the central difference of two gradients: :math:`Hv \approx (g(\theta+hv)-g(\theta-hv))/(2h)`.

    The step is :math:`h\|v\| = \epsilon^{1/3}\max(1, \|\theta\|/\sqrt n)`, which balances the error of the difference,
    :math:`O(h^2)`, and the rounding of the gradients, :math:`O(\epsilon/h)`, with :math:`\epsilon` of the dtype of the parameters.
    Parameters move and come back bit for bit.

    Note:
        A kink of ReLU between the two points enters with its jump over 2h: the mean curvature over the interval, which autograd,
        blind for kinks, does not see. In float32 and with few samples the two differ by tens of percent.
        In float32 a metric of very unequal entries (Adam's after its first steps) amplifies the rounding of a difference.

    Raises:
        ValueError: for parameters in half precision, whose rounding is larger than any step that is small.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> with Difference(lambda: (w**3).sum(), [w]) as product:
        ...     round(product([torch.ones(1)])[0].item(), 4)
        6.0
    """

    name = "difference"

    def _open(self) -> None:
        dtypes = {p.dtype for p in self.parameters}
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        if self._eps > 1e-6:
            raise ValueError(
                "parameters in half precision are too coarse for differences of gradients: use method='exact', or keep the "
                "parameters in float32 and use autocast."
            )
        values = [p.detach() for p in self.parameters]
        rms = math.sqrt(dot(values, values) / max(1, sum(p.numel() for p in values)))
        self._length = self._eps ** (1 / 3) * max(1.0, rms)

    def _product(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        length = math.sqrt(dot(v, v))
        if not 0 < length < math.inf:
            return [None if length == 0 else torch.full_like(x, math.nan) for x in v]
        h = self._length / length
        kept = [p.detach().clone() for p in self.parameters]
        try:
            ahead, behind = (self._at(kept, v, step) for step in (h, -h))
        finally:
            for p, old in zip(self.parameters, kept, strict=True):
                p.data.copy_(old)
        return [_quotient(a, b, 2 * h) for a, b in zip(ahead, behind, strict=True)]

    def _at(self, kept: list[Tensor], v: list[Tensor], step: float) -> tuple[Tensor | None, ...]:
        for p, old, x in zip(self.parameters, kept, v, strict=True):
            # .data: the values come back, so graphs that others have built stay valid; a counted change would break them
            p.data.copy_(old + step * x)
        torch.clear_autocast_cache()
        with buffers_put_back(self.loss):
            return self._gradients(twice=False)


def _quotient(ahead: Tensor | None, behind: Tensor | None, step: float) -> Tensor | None:
    if ahead is None and behind is None:
        return None
    zero: Any = 0.0
    return ((zero if ahead is None else ahead) - (zero if behind is None else behind)) / step


def no_second_derivative(error: RuntimeError) -> bool:
    """Say whether autograd complains that something cannot be differentiated twice.

    Examples:
        >>> no_second_derivative(RuntimeError("derivative for aten::f_backward is not implemented"))
        True
        >>> no_second_derivative(RuntimeError("CUDA out of memory"))
        False
    """
    said = str(error)
    return any(part in said for part in ("is not implemented", "not implemented for", "double backward", "twice"))


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """Return the real inner product of two lists of tensors, with one wait for the device.

    Args:
        x: tensors.
        y: tensors of the same shapes.

    Examples:
        >>> dot([torch.ones(2), torch.ones(1)], [torch.ones(2), torch.tensor([3.0])])
        5.0
    """
    if not x:
        return 0.0
    device = x[0].device
    parts = [
        torch.vdot(a.flatten(), b.flatten().to(a.dtype)).real.to(device, torch.float64)
        for a, b in zip(x, y, strict=True)
    ]
    return float(torch.stack(parts).sum())
