"""What the tests of attention compare with: norms of Jacobians over tokens, and attention spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from stableopt.nn import ClippedAttention


def token_norm(f: Callable[[Tensor], Tensor], x: Tensor, *, restarts: int = 4, rounds: int = 12) -> float:
    r"""The largest :math:`\max_i \|\sum_j J_{ij} d_j\|` over :math:`\|d_j\| \le 1` that alternating maximisation finds.

    Args:
        f: a map of one input ``(1, tokens, features)``; the output may have one token only, and then no dimension for it.
        x: the point.
        restarts: number of random directions of each output to start from.
        rounds: of the alternation between the direction of the output and those of the tokens.
    """
    with torch.no_grad():
        y = f(x)
    J = torch.as_tensor(torch.autograd.functional.jacobian(f, x)).reshape(-1, y.shape[-1], x.shape[-2], x.shape[-1])
    u = nn.functional.normalize(torch.randn(restarts, *J.shape[:2]), dim=-1)
    best = torch.zeros(())
    for _ in range(rounds):
        d = nn.functional.normalize(torch.einsum("rio,iotf->ritf", u, J), dim=-1)
        output = torch.einsum("iotf,ritf->rio", J, d)
        best = torch.maximum(best, output.norm(dim=-1).max())
        u = nn.functional.normalize(output, dim=-1)
    return float(best)


def ball(x: Tensor, radius: float) -> Tensor:
    return x * (radius / x.norm(dim=-1, keepdim=True).clamp_min(radius))


def literal(layer: ClippedAttention, x: Tensor, allowed: Tensor | None = None, context: Tensor | None = None) -> Tensor:
    """The formula of the docstring, one head and one token at a time; ``allowed[i][j]`` says which tokens count."""
    z = x if context is None else context
    width, rows = layer.head_dim, []
    for h in range(layer.heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (
            ball(s @ W[part].T + b[part], R)
            for s, W, b, R in (
                (x, layer.query_weight, layer.query_bias, layer.radii[0]),
                (z, layer.key_weight, layer.key_bias, layer.radii[1]),
                (z, layer.value_weight, layer.value_bias, layer.radii[2]),
            )
        )
        heads = []
        for i in range(x.shape[-2]):
            columns = [j for j in range(z.shape[-2]) if allowed is None or bool(allowed[i, j])]
            if not columns:
                heads.append(torch.zeros_like(v[..., 0, :]))
                continue
            logits = layer.logit_scale()[h] * (k[..., columns, :] @ q[..., i, :, None]).squeeze(-1)
            weights = torch.exp(logits - logits.amax(-1, keepdim=True))
            weights = weights / weights.sum(-1, keepdim=True)
            heads.append((weights[..., None] * v[..., columns, :]).sum(-2))
        rows.append(torch.stack(heads, -2))
    return layer.output_factor() * torch.cat(rows, -1) @ layer.output_weight.T + layer.output_bias


M = TypeVar("M", bound=nn.Module)


def scrambled(layer: M, scale: float = 1.0) -> M:
    """Draw every parameter anew, with normal entries."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return layer


def lone_head(
    *, query: Tensor, key: Tensor, value: Tensor, query_bias: Tensor, radius: tuple[float, float, float], scale: float
) -> ClippedAttention:
    """One head without a limit whose output is its mean of values."""
    width, dim = value.shape
    layer = ClippedAttention(dim, head_dim=width, radius=radius, logit_scale=scale, lipschitz=None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.query_weight.copy_(query)
        layer.key_weight.copy_(key)
        layer.value_weight.copy_(value)
        layer.query_bias.copy_(query_bias)  # type: ignore[union-attr]
        layer.output_weight.copy_(torch.eye(dim, width))
    return layer
