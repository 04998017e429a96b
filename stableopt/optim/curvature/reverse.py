"""Autograd twice: the gradient is made with its graph, and differentiated along each vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stableopt.optim.curvature.base import Curvature
from stableopt.optim.modules import buffers_put_back

__all__ = ["Exact", "Graph"]


class _Reverse(Curvature):
    r"""The graph of one gradient, kept for all products: :math:`Hv = \nabla_\theta\,(g \cdot v)`."""

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


class Exact(_Reverse):
    """By autograd twice: one forward pass, its graph kept for all products.

    Meanwhile attention, recurrent layers on CUDA and compiled code run by their plain formulas, since none of the fused kernels
    has a second derivative: the same function up to rounding, but dropout inside attention draws another mask.

    Note:
        A few second derivatives in torch are silently wrong (``weight_norm`` in 2.13), which
        :func:`stableopt.optim.curvature.asymmetry` reveals; :class:`stableopt.optim.curvature.Choice` looks once.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with Exact(lambda: (w**2).sum(), [w]) as product:
        ...     product([torch.ones(1)])
        [tensor([2.])]
    """

    name = "exact"


class Graph(_Reverse):
    """By autograd twice, from a loss whose graph somebody has built and not yet used: no forward pass at all.

    The graph can be used afterwards as if nothing had been: ``.grad`` and the hooks of its accumulation (those of
    ``DistributedDataParallel``, ``register_post_accumulate_grad_hook``) are not reached. Hooks that sit inside the graph, on
    tensors and modules, do run.

    Args:
        value: the loss, one real number with its graph, computed at the present values of the parameters.
        parameters: leaves that require gradients.

    Raises:
        RuntimeError: when the context is entered, if the graph has been freed by a ``backward``, or a parameter has moved since.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> loss = (w**3).sum()
        >>> with Graph(loss, [w]) as product:
        ...     product([torch.ones(1)])
        [tensor([6.])]
        >>> loss.backward()
        >>> w.grad
        tensor([3.])
    """

    name = "graph"

    def __init__(self, value: Tensor, parameters: Sequence[Tensor]) -> None:
        loss: Callable[[], Tensor] = lambda: value  # noqa: E731
        super().__init__(loss, parameters)

    @classmethod
    def refuses(cls, error: Exception) -> bool:
        """Say whether an error means that there is no product this way, or that this graph is spent."""
        spent = ("second time", "modified by an inplace operation")
        return super().refuses(error) or (isinstance(error, RuntimeError) and any(part in str(error) for part in spent))
