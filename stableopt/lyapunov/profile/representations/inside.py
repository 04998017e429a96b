"""What evaluations with dual numbers and inside of transforms need: other kernels, copies of buffers, the parts of a number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["LinearByHand", "plain_kernels", "primal", "private_buffers", "tangent_of"]


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Let operations that are fused into one be computed by those that have a derivative in forward mode.

    These are the kernels of attention, of the LSTM of float32 and of weight normalization, and ``normalize`` that writes into a
    given tensor (torch's spectral normalization); the values agree up to rounding.

    Examples:
        >>> from stableopt.lyapunov.layers.forward import dual_numbers
        >>> q = torch.randn(1, 1, 2, 4)
        >>> with plain_kernels(), dual_numbers():
        ...     y = nn.functional.scaled_dot_product_attention(fwd.make_dual(q, torch.ones_like(q)), q, q)
        ...     fwd.unpack_dual(y).tangent.shape
        torch.Size([1, 1, 2, 4])
    """
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()  # noqa: SLF001 the public context warns
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # noqa: SLF001
    try:
        with sdpa_kernel(SDPBackend.MATH), _Plain():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)  # noqa: SLF001


_FUSED_WEIGHT_NORM: Any = vars(torch)["_weight_norm"]
"""What both of torch's weight normalizations call."""


class _Plain(TorchFunctionMode):
    """Formulas in the place of functions that have no derivative in forward mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _FUSED_WEIGHT_NORM:
            return _weight_norm(*args, **kwargs)
        if func is nn.functional.normalize and kwargs.get("out") is not None:
            out = kwargs.pop("out")
            return out.copy_(func(*args, **kwargs))
        return func(*args, **kwargs)


class LinearByHand(TorchFunctionMode):
    r"""Push a tangent through :math:`Wx + b` with one product: where :math:`W` has none, torch multiplies by its zeros.

    Examples:
        >>> from stableopt.lyapunov.layers.forward import dual_numbers
        >>> with dual_numbers(), LinearByHand():
        ...     x = fwd.make_dual(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]))
        ...     fwd.unpack_dual(nn.functional.linear(x, torch.eye(2), torch.ones(2)))
        UnpackedDualTensor(primal=tensor([[2., 2.]]), tangent=tensor([[1., 2.]]))
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the place of ``linear``."""
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs:
            x, *weights = args
            number = fwd.unpack_dual(x)
            plain = [w for w in weights if w is not None]
            if number.tangent is not None and all(fwd.unpack_dual(w).tangent is None for w in plain):
                return fwd.make_dual(func(number.primal, *weights), func(number.tangent, weights[0]))
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``v`` with the norms ``g``: of its slices along a dimension, of all for -1."""
    others = [i for i in range(v.ndim) if dim == -1 or i != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


@contextmanager
def private_buffers(modules: nn.Module) -> Iterator[None]:
    """Give modules copies of their buffers, which may be written to inside of a transform.

    Tensors that a module keeps as plain attributes (a weight that a hook computes) are put back at the end as well.

    Args:
        modules: that and all within.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> with private_buffers(norm):
        ...     _ = norm(torch.rand(4, 2))
        >>> int(norm.num_batches_tracked)
        0
    """
    places = [(m._buffers, name, b) for m in modules.modules() for name, b in m._buffers.items() if b is not None]  # noqa: SLF001
    plain = [(vars(m), {k: v for k, v in vars(m).items() if isinstance(v, Tensor)}) for m in modules.modules()]
    copies = {id(b): b.detach().clone() for _, _, b in places}
    try:
        for buffers, name, b in places:
            buffers[name] = copies[id(b)]
        yield
    finally:
        for buffers, name, b in places:
            buffers[name] = b
        for own, values in plain:
            own.update(values)


def primal(x: Tensor) -> Tensor:
    """Return a tensor without its tangent.

    Args:
        x: a dual number or not.

    Examples:
        >>> primal(torch.ones(1))
        tensor([1.])
    """
    return fwd.unpack_dual(x).primal


def tangent_of(x: Tensor) -> Tensor:
    """Return the tangent of a tensor, zeros if it has none.

    Args:
        x: a dual number or not.

    Examples:
        >>> tangent_of(torch.ones(1))
        tensor([0.])
    """
    number = fwd.unpack_dual(x)
    return torch.zeros_like(number.primal) if number.tangent is None else number.tangent
