r"""Attention whose slope grows with its input: the gain is measured at inputs of three sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stableopt.certify.audit.findings import Finding, Witness
from stableopt.certify.audit.scene import Call, Scene, called, is_foreign
from stableopt.certify.audit.search import Map, generator, steepest

__all__ = ["RADII", "gain_at_radius", "growing_attention"]

Affine: TypeAlias = tuple[Tensor, Tensor | None]
RADII = (1.0, 30.0, 1000.0)
"""Sizes of the tokens at which the gain is measured."""
_TOKENS, _STEP = 4, 1e-5
_GROWTH = 10.0
"""A gain that grows by more from the smallest to the largest radius is taken for one without a limit."""
_ADVICE = (
    "Use stableopt.nn.ClippedAttention or TransformerBlock (a constant for every length in the norm 'token_max'; "
    "ClippedAttention.from_torch takes the weights over), or bound the inputs."
)


def growing_attention(scene: Scene) -> Iterator[Finding]:
    """Find attention that is not Lipschitz: dot products, and distances between queries and keys with different matrices.

    Of nn.MultiheadAttention this is known, of other modules with a softmax it is concluded from gains that grow with the inputs.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> found = next(growing_attention(scene(nn.MultiheadAttention(4, 1, dtype=torch.float64), ())))
        >>> found.attained > 100 * found.numbers["gain at radius 1"]
        True
    """
    for path, module in scene.modules():
        if isinstance(module, nn.MultiheadAttention):
            f, shape, what = (
                _multihead(scene.exact.get_submodule(path)),
                (_TOKENS, module.embed_dim),
                "nn.MultiheadAttention",
            )
            if not (module.kdim == module.vdim == module.embed_dim):
                yield _found(
                    path, f"{what} multiplies its inputs with each other, so its slope grows with them", None, {}
                )
                continue
        else:
            call = scene.calls.get(path)
            if call is None or not _scores(scene, path, module, call):
                continue
            f, shape, what = scene.run(path), tuple(call.args[0].shape[1:]), f"the attention in {called(module)}"
        affine = _affine(scene.exact.get_submodule(path), shape[-1])
        pairs = [gain_at_radius(f, shape, radius, affine) for radius in RADII]
        gains = {f"gain at radius {radius:g}": pair.gain for radius, pair in zip(RADII, pairs, strict=True)}
        if isinstance(module, nn.MultiheadAttention) or pairs[2].gain > _GROWTH * pairs[0].gain:
            yield _found(path, f"{what} is not Lipschitz: its slope grows with the size of its input", pairs[2], gains)


def _found(path: str, what: str, pair: Witness | None, gains: dict[str, float]) -> Finding:
    attained = pair.gain if pair is not None else float("nan")
    return Finding(
        path,
        "growing-attention",
        f"{what}.",
        "serious",
        _ADVICE,
        claimed=1.0,
        attained=attained,
        witness=pair,
        numbers=gains,
    )


def _scores(scene: Scene, path: str, module: nn.Module, call: Call) -> bool:
    """Whether a foreign module weighs tokens by a softmax, and no module inside it does."""
    x = call.single
    inner = any(p.startswith(f"{path}." if path else "") and p != path and _weighs(c) for p, c in scene.calls.items())
    return is_foreign(module) and _weighs(call) and not inner and x is not None and x.ndim == 3 and x.shape[1] > 1


def _weighs(call: Call) -> bool:
    fused = any("scaled_dot_product" in op or "native_multi_head_attention" in op for op in call.ops)
    return fused or (call.scores and any("softmax" in op for op in call.ops))


def _multihead(module: Any) -> Map:
    def run(x: Tensor) -> Tensor:
        x = x if module.batch_first else x.transpose(0, 1)
        out = module(x, x, x, need_weights=False)[0]
        return out if module.batch_first else out.transpose(0, 1)

    return run


def _affine(module: nn.Module, width: int) -> list[Affine]:
    """Return the matrices, with their biases, that may make queries and keys in a module, four at most."""
    found: list[Affine] = []
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        bias = module.in_proj_bias
        query = None if bias is None else bias[: module.embed_dim].detach()
        return [(module.in_proj_weight[: module.embed_dim].detach(), query)]
    for inner in module.modules():
        if isinstance(inner, nn.Linear) and inner.in_features == width:
            found.append((inner.weight.detach(), None if inner.bias is None else inner.bias.detach()))
        elif not isinstance(inner, nn.Linear):
            found += [
                (p.detach(), None) for p in inner.parameters(recurse=False) if p.ndim == 2 and p.shape[1] == width
            ]
    return found[:4]


def gain_at_radius(f: Map, shape: tuple[int, ...], radius: float, affine: Sequence[Affine] = ()) -> Witness:
    r"""Return the pair near tokens of one size that attention moves apart most.

    The search begins where the softmax is not saturated, however large the tokens are. For dot products: one token with the query
    0 between others at :math:`\pm R`. For distances with different matrices :math:`A, B`: one token whose query :math:`Bx` lies in
    the middle between the keys :math:`A(p\pm w)` of two others, :math:`Ap = Bx`.

    Args:
        f: a map of inputs of shape ``(1, tokens, features)``.
        shape: tokens and features.
        radius: the length of a token.
        affine: matrices and biases that may make queries and keys.

    Examples:
        >>> pair = gain_at_radius(lambda x: x, (2, 3), 10.0)
        >>> abs(pair.gain - 1.0) < 1e-6
        True
    """
    starts = list(_starts(shape, radius, affine))
    pairs = [steepest(f, x[None], scale=radius, iterations=5, step=_STEP) for x in starts]
    best = max(pairs, key=lambda pair: pair.gain)
    climbed = steepest(f, (best.x + best.y) / 2, scale=radius, iterations=20, ascent=10, step=_STEP)
    return max(best, climbed, key=lambda pair: pair.gain)


def _starts(shape: tuple[int, ...], radius: float, affine: Sequence[Affine]) -> Iterator[Tensor]:
    """Yield tokens for which the softmax of a dot product is not saturated, then such for distances."""
    signs = torch.ones(shape[0], 1, dtype=torch.float64)
    signs[1::2] = -1.0
    x = torch.zeros(shape, dtype=torch.float64)
    for seed in range(2):
        u = torch.randn(shape[1], generator=generator(seed), dtype=torch.float64)
        x = radius * signs * u / u.norm()
        first = [middle * x[0] for middle in (0.0, 0.5)]
        first += [_within(_solved(A, -a), radius) for A, a in affine if a is not None]
        for token in first:
            yield torch.cat([token[None], x[1:]])
    if shape[0] > 2:
        for key in affine:
            for query in affine:
                if key is not query and key[0].shape == query[0].shape:
                    yield _in_the_middle(x[0], signs, radius, key, query)


def _in_the_middle(x: Tensor, signs: Tensor, radius: float, key: Affine, query: Affine) -> Tensor:
    """Return tokens of which the first has its query in the middle of the keys of the others, nearer than to its own."""
    (A, a), (B, b) = key, query
    shift = (torch.zeros(len(B), dtype=x.dtype) if b is None else b) - (0.0 if a is None else a)
    x = x * min(1.0, radius / max(float(_solved(A, B @ x + shift).norm()), 1e-300))
    middle = _solved(A, B @ x + shift)
    _, S, Vh = torch.linalg.svd(A, full_matrices=False)
    own = float((B @ x + shift - A @ x).norm())
    return torch.cat([x[None], middle + signs[1:] * (0.7 * own / S[0].clamp_min(1e-300) * Vh[0])])


def _solved(A: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.lstsq(A, target[:, None], driver="gelsd").solution[:, 0]


def _within(x: Tensor, radius: float) -> Tensor:
    return x * min(1.0, radius / max(float(x.norm()), 1e-300))
