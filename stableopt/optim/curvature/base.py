"""What all ways to make a product with the Hessian of a loss share: a context, an evaluation, a real inner product."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stableopt.constraints.sharding import is_sharded
from stableopt.optim.modules import modules_at_hand
from stableopt.optim.trial import RandomState, graph_eps

__all__ = [
    "Curvature",
    "acceptable_asymmetry",
    "asymmetry",
    "asymmetry_of_rounding",
    "dot",
    "gradients",
    "no_second_derivative",
]


class Curvature(ABC):
    """A context in which products with the Hessian of a loss can be made; at its end everything is as before.

    Parameters, ``.grad``, buffers of the modules that the loss calls and all random states are left as they are, and each
    evaluation of the loss draws the same random numbers. A graph that was built before stays good, unless it needs such a buffer:
    that is written back, which counts as a change.

    Args:
        loss: returns the loss with its graph.
        parameters: leaves that require gradients.

    Attributes:
        count: how many products have been made.
        last: keeps the last products as pairs (v, Hv), if somebody gives it a length; by default none.
        eps: the coarsest machine epsilon in the loss, known from its first evaluation on.

    Raises:
        ValueError: if the loss is not one real number with a graph, or a parameter is sharded over processes.

    Examples:
        >>> from stableopt.optim.curvature import Exact
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with Exact(lambda: (w**3).sum(), [w]) as product:
        ...     product([torch.ones(2)])
        [tensor([ 6., 12.])]
    """

    name: ClassVar[str]
    fused: ClassVar[bool] = False
    """Whether the loss may use kernels whose gradient has no derivative."""

    def __init__(self, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        if any(is_sharded(p) for p in parameters):
            raise ValueError(
                "sharpness cannot be measured on sharded parameters: their gradients are only complete after backward; "
                "measure an unsharded copy of the model."
            )
        self.loss, self.parameters, self.count = loss, list(parameters), 0
        self.eps = 0.0
        self.last: deque[tuple[list[Tensor], list[Tensor]]] = deque(maxlen=0)
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
        Hv = [
            torch.zeros_like(x) if h is None else h.detach().to(x.dtype)
            for h, x in zip(self._product(v), v, strict=True)
        ]
        self.last.append((v, Hv))
        return Hv

    @classmethod
    def refuses(cls, error: Exception) -> bool:
        """Say whether an error means that there is no product this way for this loss, and not that the loss is broken.

        Args:
            error: what was raised in the context.

        Examples:
            >>> from stableopt.optim.curvature import Exact
            >>> Exact.refuses(RuntimeError("derivative for aten::f_backward is not implemented"))
            True
        """
        return isinstance(error, RuntimeError) and no_second_derivative(error)

    @abstractmethod
    def _open(self) -> None:
        """Prepare for products."""

    @abstractmethod
    def _product(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        """Return Hv."""

    def _gradients(self, *, twice: bool) -> tuple[Tensor | None, ...]:
        """Evaluate the loss from the random state of the beginning, and differentiate it."""
        self._start.restore()
        with torch.enable_grad(), nullcontext() if self.fused else _plain_kernels(self.loss):
            value = self.loss()
            grads = gradients(value, self.parameters, twice=twice)
        self.eps = self.eps or max([graph_eps(value), *(torch.finfo(p.dtype).eps for p in self.parameters)])
        return grads


def gradients(value: Tensor, parameters: Sequence[Tensor], *, twice: bool = False) -> tuple[Tensor | None, ...]:
    """Return the gradient of a loss, dense, without touching ``.grad``.

    Args:
        value: the loss with its graph.
        parameters: leaves that require gradients.
        twice: whether the gradient is to have a graph of its own.

    Returns:
        One tensor per parameter, None for one that the loss does not depend on.

    Raises:
        ValueError: if the loss is not one real number with a graph.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> gradients((w**2).sum(), [w])
        (tensor([6.]),)
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be one real number, a tensor with its graph, got {what}.")
    if not value.requires_grad:
        raise ValueError(
            "the loss has no graph: return the tensor itself (not .item()), do not call backward, and do not use no_grad."
        )
    grads = torch.autograd.grad(value.reshape(()), list(parameters), create_graph=twice, allow_unused=True)
    return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in grads)


@contextmanager
def _plain_kernels(loss: Callable[[], Tensor]) -> Iterator[None]:
    """Compute by formulas that can be differentiated twice: attention, recurrent layers on CUDA, and compiled code as written."""
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the switch would load it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if cudnn.enabled and any(isinstance(m, nn.RNNBase) for m in modules_at_hand(loss)):
            stack.callback(setattr, cudnn, "enabled", True)
            cudnn.enabled = False
        yield


def no_second_derivative(error: RuntimeError) -> bool:
    """Say whether autograd complains that something cannot be differentiated twice.

    Examples:
        >>> no_second_derivative(RuntimeError("derivative for aten::f_backward is not implemented"))
        True
        >>> no_second_derivative(RuntimeError("CUDA out of memory"))
        False
    """
    said = str(error).lower()
    parts = ("is not implemented", "not implemented for", "double backward", "twice", "donated buffers")
    return any(part in said for part in parts)


def asymmetry(product: Callable[[list[Tensor]], list[Tensor]], parameters: Sequence[Tensor] | None = None) -> float:
    r"""Return how far products are from those of a symmetric matrix, relative to its size.

    .. math:: |u^\top Hv - v^\top Hu| \,/\, (\|Hu\| + \|Hv\|), \qquad u, v \text{ random},

    which is at the level of rounding for a Hessian, and of the order of one for products that miss a part of it.

    Args:
        product: an open context, or any function that makes products.
        parameters: of what shapes; None for those of the context.

    Returns:
        The figure; 0 if the products vanish, NaN if they are not finite. It takes two products.

    Examples:
        >>> from stableopt.optim.curvature import Exact
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with Exact(lambda: w[0] * w[1] ** 2, [w]) as product:
        ...     asymmetry(product) < 1e-6
        True
    """
    generator = torch.Generator().manual_seed(0)
    like = product.parameters if parameters is None and isinstance(product, Curvature) else list(parameters or ())
    u, v = ([torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in like] for _ in range(2))
    Hu, Hv = product(u), product(v)
    size = math.sqrt(dot(Hu, Hu)) + math.sqrt(dot(Hv, Hv))
    return abs(dot(u, Hv) - dot(v, Hu)) / size if size != 0.0 else 0.0


def acceptable_asymmetry(product: Curvature) -> float:
    """Return what :func:`asymmetry` may be: far above rounding for autograd, a tenth for differences.

    Args:
        product: after its first product.

    Examples:
        >>> from stableopt.optim.curvature import Difference
        >>> acceptable_asymmetry(Difference(lambda: torch.ones(1), []))
        0.1
    """
    return 0.1 if product.fused else asymmetry_of_rounding(product.eps)


def asymmetry_of_rounding(eps: float) -> float:
    """Return what :func:`asymmetry` may be for products by autograd.

    Args:
        eps: machine epsilon of the loss.

    Examples:
        >>> asymmetry_of_rounding(2.0**-52), asymmetry_of_rounding(2.0**-8)
        (1e-06, 0.05)
    """
    return min(0.05, max(1e-6, 1e4 * eps))


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
