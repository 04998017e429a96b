"""The rules of attention and of the normalization of tokens."""

from __future__ import annotations

from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.attention import BoundedNorm, ClippedAttention, TransformerBlock

__all__: list[str] = []


def _check_tokens(value: Value, dim: int) -> None:
    if len(value.shape) < 2 or value.shape[-1] != dim:
        raise ValueError(f"it needs the shape (..., tokens, {dim}) without the batch, got {value.shape}.")


@fold.register(ClippedAttention)
def _(module: ClippedAttention, graph: Builder, value: Value) -> Value:
    _check_tokens(value, module.dim)
    if graph.norm == "linf":
        raise UncertifiableError("its balls are Euclidean, so no linf bound is known. Ask for norm='token_max', or l2.")
    if module.max_length is not None and value.shape[-2] > module.max_length:
        raise ValueError(f"it is declared for at most max_length={module.max_length} tokens, got {value.shape[-2]}.")
    matrices = {
        "query_weight": module.query_weight, "key_weight": module.key_weight, "value_weight": module.value_weight,
        "output_weight": module.output_matrix(), "query_bias": module.query_bias, "key_bias": module.key_bias,
        "value_bias": module.value_bias, "output_bias": module.output_bias,
    }  # fmt: skip
    scales = module.logit_scale().to(module.query_weight.dtype)
    return graph.add("attention", value, **matrices, scales=scales, radii=list(module.radii), causal=module.causal)


@fold.register(TransformerBlock)
def _(module: TransformerBlock, graph: Builder, value: Value) -> Value:
    for name, part in module.named_children():
        value = graph.fold(part, value, name)
    return value


@fold.register(BoundedNorm)
def _(module: BoundedNorm, graph: Builder, value: Value) -> Value:
    if value.shape[-1:] != (module.dim,):
        raise ValueError(f"it normalizes {module.dim} features, got the shape {value.shape}.")
    normalized, gain = graph.add("bounded_norm", value, radius=module.radius), module.gain()
    return normalized if gain is None else graph.add("affine", normalized, scale=gain, bias=None, axis=-1)
