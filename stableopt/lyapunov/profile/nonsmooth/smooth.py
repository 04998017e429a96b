"""Which operations on the way from an input have a derivative that automatic differentiation knows: all others are named.

A list of kinks can be too short, so this is one of what is smooth. What is not on it counts as a kink: comparisons, whose result
is a mask that automatic differentiation takes for a constant, numbers read out of a tensor, operations nobody has looked at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stableopt.lyapunov.layers.kinked import is_kinked

__all__ = ["SMOOTH", "Watch"]

_COPIES = frozenset({
    "view", "_unsafe_view", "_reshape_alias", "reshape", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "select",
    "slice", "narrow", "cat", "stack", "split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk",
    "unsafe_chunk", "unbind", "as_strided", "clone", "contiguous", "alias", "detach", "_to_copy", "copy", "lift_fresh", "flip",
    "roll", "rot90", "repeat", "unfold", "im2col", "col2im", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "index", "index_select", "gather", "take",
    "masked_select", "index_put", "slice_scatter", "select_scatter", "scatter", "diagonal", "diag_embed", "tril", "triu",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "where", "masked_fill", "view_as_real",
    "view_as_complex", "_conj", "_conj_physical", "conj_physical", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d",
})  # fmt: skip
"""Linear: of what decides where they copy from, only what does not depend on the input has passed."""

_LINEAR = frozenset({
    "add", "sub", "rsub", "neg", "sum", "mean", "cumsum", "trace", "lerp", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv",
    "dot", "vdot", "addr", "linear", "matmul", "outer", "convolution", "_convolution", "convolution_overrideable",
    "mkldnn_convolution", "index_add", "scatter_add", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_fft_r2c", "_fft_c2c", "_fft_c2r", "native_dropout",
})  # fmt: skip

_ANALYTIC = frozenset({
    "mul", "reciprocal", "square", "rsqrt", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "sinh",
    "cosh", "tanh", "asinh", "atan", "erf", "erfc", "sigmoid",
    "log_sigmoid_forward", "softplus", "celu", "gelu", "silu", "mish", "sinc",
    "logaddexp", "logaddexp2",
    "_softmax", "_safe_softmax", "_log_softmax", "logsumexp", "addcmul", "addcdiv", "prod",
    "cumprod",
    "var", "var_mean", "native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
    "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_fused_rms_norm", "glu", "mse_loss", "linalg_inv_ex",
    "_linalg_solve_ex", "_linalg_det", "linalg_matrix_exp", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell",
})  # fmt: skip
"""Where they are defined; celu has one derivative at zero. Softplus goes over to a line where the two are 2e-9 apart."""

SMOOTH = _COPIES | _LINEAR | _ANALYTIC
"""Names in ATen, without namespace and overload, of what has a derivative with any arguments."""

_ROOTS = frozenset({"sqrt", "std", "linalg_vector_norm", "norm"})
"""With a kink where their result is zero."""
_FACTORIES = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like", "new_zeros",
    "new_ones", "new_full", "rand_like", "randn_like",
})  # fmt: skip
"""They take nothing from a tensor but its shape and type."""


class Watch(TorchDispatchMode):
    """Follow a tensor through an evaluation, and name what is done with it that is not known to be smooth.

    Args:
        source: the tensor.
        reach: within which a root or a norm is taken for zero, relative to the root mean square of all its results.

    Attributes:
        left: names of ATen operations, or what ``called`` says at the time.
        called: the function of torch that is running, if it is known.
        paused: whether nothing is looked at.

    Examples:
        >>> z = torch.ones(2)
        >>> with Watch(z, 0.0) as watch:
        ...     _ = z.exp() * (z > 0), torch.ones(2) > 0
        >>> watch.left
        ['gt']
    """

    def __init__(self, source: Tensor, reach: float) -> None:
        super().__init__()
        self.left: list[str] = []
        self.called, self.paused = "", False
        self._reach = reach
        self._followed: dict[int, Any] = {}  # storages, kept alive so that no other one gets their address
        self._detached: dict[int, Tensor] = {}  # autograd makes some for itself, which nothing is done with
        self.follow(source)

    def follow(self, tensor: Tensor) -> None:
        """Take a tensor, and all that shares its memory, for one that depends on the source.

        Args:
            tensor: the tensor.
        """
        storage = _storage(tensor)
        if storage is not None:
            self._followed[storage._cdata] = storage  # noqa: SLF001 its address

    def follows(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the source; also where that cannot be known.

        Args:
            tensor: the tensor.
        """
        storage = _storage(tensor)
        return storage is None or storage._cdata in self._followed  # noqa: SLF001 its address

    def leave(self, name: str) -> None:
        """Name something as not smooth.

        Args:
            name: of it, where ``called`` is empty.
        """
        self.left.append(self.called or name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operation."""
        kwargs = kwargs or {}
        space, _, name = func._schema.name.rpartition("::")  # noqa: SLF001 torch has no public access
        name = name.removesuffix("_") if not name.endswith("__") else name
        used = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and self.follows(t)]
        if not self.paused and any(id(t) in self._detached for t in used):
            self.leave("detach")
        results = func(*args, **kwargs)
        if not used or name in _FACTORIES:
            return results
        if name == "detach":
            self._detached[id(results)] = results
        found = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        if not self.paused and not (space == "aten" and self._smooth(func, name, args, kwargs, found)):
            self.leave(name)
        for tensor in found:
            self.follow(tensor)
        return results

    def _smooth(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], found: list[Tensor]) -> bool:
        """Whether an operation is, by its name, with its arguments, and for what it gave."""
        result = found[0] if found else None  # what else comes may be a seed, or room for the way back
        if result is None or not (result.is_floating_point() or result.is_complex()) or not torch.is_grad_enabled():
            return False  # nothing that automatic differentiation sees
        if name in SMOOTH:
            return True
        if name == "div":
            return kwargs.get("rounding_mode") is None
        if name == "pow":
            return self._is_smooth_power(func._overloadname, args)  # noqa: SLF001 torch has no public access
        if name in {"elu", "mkldnn_rnn_layer"}:
            return not is_kinked(name, args) if name == "elu" else args[9] == 2  # the cells of an LSTM
        order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p", 2))
        return name in _ROOTS and (name in {"sqrt", "std"} or order in {None, 2}) and self._away(result)

    def _is_smooth_power(self, overload: str, args: tuple[Any, ...]) -> bool:
        if overload == "Scalar":
            return args[0] > 0
        if overload == "Tensor_Scalar" and float(args[1]).is_integer():
            return True
        return not args[0].is_complex() and self._away(args[0].detach())

    def _away(self, values: Tensor) -> bool:
        """Whether positive numbers are further from zero than the reach."""
        if values.is_complex() or not values.numel():
            return not values.numel()
        wide = values.double()
        size = float(torch.linalg.vector_norm(wide)) / math.sqrt(wide.numel())
        return float(wide.min()) > self._reach * size


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a sparse one has none
        return None
