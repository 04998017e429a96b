"""T7: clipped attention in the token-max norm, and normalization."""

from __future__ import annotations

import math

import pytest
import torch

import stableopt.theory as th
from stableopt.linalg import Bound


def clip(x: torch.Tensor, radius: float) -> torch.Tensor:
    return x * torch.clamp(radius / x.norm(dim=-1, keepdim=True).clamp_min(1e-30), max=1.0)


def norm(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1).max()


def gain(f, x: torch.Tensor, tries: int = 20) -> float:
    """The largest sampled amplification in the token-max norm, every token moved by as much as allowed."""
    J, best = torch.func.jacrev(f)(x), 0.0
    for _ in range(tries):
        v = torch.randn_like(x)
        best = max(best, float(norm(torch.tensordot(J, v / v.norm(dim=-1, keepdim=True), dims=2))))
    return best


def slope_along(f, x: torch.Tensor, v: torch.Tensor) -> float:
    return float((torch.func.jacrev(f)(x) * v).sum())


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("tokens", [1, 2, 12])
@pytest.mark.parametrize("radius", [0.3, 1.0, 5.0])
def test_multi_head_clipped_attention_stays_below_its_constant(tokens: int, radius: float, mask: str) -> None:
    torch.manual_seed(0)
    dim, heads, width = 6, 2, 3
    scale, radii = (
        1 / math.sqrt(width),
        {"query_radius": radius, "key_radius": 2 * radius, "value_radius": 0.7 * radius},
    )
    Q, K, V = (torch.randn(heads, width, dim) for _ in range(3))
    O = torch.randn(dim, heads * width)
    norm2 = lambda W: float(torch.linalg.matrix_norm(W, 2))  # noqa: E731
    constants = [
        th.attention_head_constant(norm2(q), norm2(k), norm2(v), logit_scale=scale, **radii)
        for q, k, v in zip(Q, K, V, strict=True)
    ]
    bound = th.attention_constant(norm2(O), constants)

    def attention(x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for q, k, v in zip(Q, K, V, strict=True):
            logits = scale * clip(x @ q.T, radius) @ clip(x @ k.T, 2 * radius).T
            if mask == "causal":
                logits = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
            outputs.append(logits.softmax(-1) @ clip(x @ v.T, 0.7 * radius))
        return torch.cat(outputs, dim=-1) @ O.T

    sampled = max(gain(attention, s * torch.randn(tokens, dim)) for s in (0.1, 0.3, 1.0, 3.0) for _ in range(5))
    assert 0.02 * bound < sampled <= bound


def test_unclipped_attention_is_not_lipschitz() -> None:
    torch.manual_seed(0)
    attention = lambda x: (x @ x.T).softmax(-1) @ x  # noqa: E731
    gains = [max(gain(attention, r * torch.randn(3, 2), 5) for _ in range(200)) for r in (1.0, 10.0, 30.0)]
    assert gains[1] > 5 * gains[0]
    assert gains[2] > 3 * gains[1]


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_each_path_of_a_head_is_attained(part: str) -> None:
    """Two tokens with opposite values or keys at their radii, equal weights."""
    s, Rq, Rk, Rv = 0.5, 3.0, 2.0, 1.5
    norms = {f"{p}_norm": float(p == part) for p in ("query", "key", "value")}
    bound = th.attention_head_constant(**norms, query_radius=Rq, key_radius=Rk, value_radius=Rv, logit_scale=s)

    def head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (s * q * k).softmax(-1) @ v

    pair = torch.tensor([1.0, -1.0])
    zero = torch.zeros(())
    if part == "query":  # d/dq at q = 0, keys at +-Rk
        slope = slope_along(lambda q: head(q, Rk * pair, Rv * pair), zero, torch.ones(()))
    elif part == "key":  # keys move apart, the query at Rq
        slope = slope_along(lambda k: head(torch.tensor(Rq), k, Rv * pair), torch.zeros(2), pair)
    else:
        slope = slope_along(lambda v: head(zero, pair, v), torch.zeros(2), torch.ones(2))
    assert slope == pytest.approx(bound)


def test_heads_add_in_squares() -> None:
    assert th.attention_constant(2.0, [3.0, 4.0]) == 10.0
    assert th.attention_constant(2.0, []) == 0.0
    with pytest.raises(ValueError, match=r"heads\[1\]"):
        th.attention_constant(1.0, [1.0, -1.0])


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
def test_normalization_stays_below_its_constant_and_rms_norm_attains_it_at_zero(eps: float) -> None:
    torch.manual_seed(0)
    n, gamma = 5, torch.tensor([0.5, -2.0, 1.0, 0.1, 1.5])
    bound = th.normalization_constant(2.0, eps)
    layer = lambda x: torch.nn.functional.layer_norm(x, (n,), gamma, eps=eps)  # noqa: E731
    rms = lambda x: torch.nn.functional.rms_norm(x, (n,), gamma, eps=eps)  # noqa: E731
    for scale in (0.0, 1e-3, 1e-2, 1.0):
        for f in (layer, rms):
            J = torch.func.jacrev(f)(scale * torch.randn(n))
            assert float(torch.linalg.matrix_norm(J, 2)) <= bound * (1 + 1e-9)
    J = torch.func.jacrev(rms)(torch.zeros(n))
    assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(bound)


def test_layer_norm_has_the_constant_316_at_torchs_eps() -> None:
    assert th.normalization_constant(1.0) == pytest.approx(316.2278, abs=1e-3)
    x = torch.zeros(50)
    J = torch.func.jacrev(lambda z: torch.nn.functional.layer_norm(z, (50,)))(x)
    assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(th.normalization_constant(1.0))
    with pytest.raises(ValueError, match="eps"):
        th.normalization_constant(1.0, 0.0)


@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, 400.0])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_weights_that_one_token_gets_are_bounded_and_the_bound_is_attained_without_a_mask(
    limit: float, tokens: int
) -> None:
    logits = torch.full((tokens, tokens), -limit)
    logits[:, 0] = limit  # the first token is what all others like best
    weights = logits.softmax(-1)
    bound = th.attention_weight_sum(limit, tokens)
    assert float(weights[:, 0].sum()) == pytest.approx(bound)
    assert bound <= th.attention_weight_sum(limit) * (1 + 1e-12)
    causal = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(-1)
    ceiling = th.attention_weight_sum(limit, tokens, causal=True)
    assert float(causal[:, 0].sum()) <= ceiling * (1 + 1e-12)
    assert ceiling <= tokens * (1 + 1e-12)
    enclosure = th.attention_weight_sum(Bound.point(limit), tokens, causal=True)
    assert isinstance(enclosure, Bound)
    assert enclosure.upper <= tokens * (1 + 1e-12)


def test_the_weights_grow_with_the_logarithm_of_the_length_under_a_causal_mask() -> None:
    sums = [th.attention_weight_sum(1.0, n, causal=True) for n in (10, 1000, 100_000)]
    assert sums[0] < sums[1] < sums[2]
    assert sums[2] - sums[1] == pytest.approx(math.exp(2.0) * math.log(100.0), rel=0.01)
    assert th.attention_weight_sum(1.0, 10**6) == pytest.approx(th.attention_weight_sum(1.0), rel=1e-4)
    with pytest.raises(ValueError, match="grow with the length"):
        th.attention_weight_sum(1.0, causal=True)
    for length in (0, 2.0, True):
        with pytest.raises(ValueError, match="length must be an integer >= 1"):
            th.attention_weight_sum(1.0, length)  # type: ignore[arg-type]


def test_queries_of_all_heads_share_one_perturbation() -> None:
    """Orthogonal queries of four heads: bounded together they cost 1, one by one 2."""
    apart = th.attention_constant(1.0, [th.attention_head_constant(
        1.0, 0.0, 0.0, query_radius=1.0, key_radius=1.0, value_radius=1.0, logit_scale=1.0
    )] * 4)  # fmt: skip
    assert apart == 2.0
    assert th.attention_constant(1.0, [0.0] * 4, queries=1.0) == 1.0
    assert th.attention_constant(3.0, [1.0], queries=0.5, weight_sums=[9.0]) == 10.5
    with pytest.raises(ValueError, match="one number per head, got 1 for 2"):
        th.attention_constant(1.0, [1.0, 1.0], weight_sums=[1.0])


def test_the_constant_of_a_head_lies_between_its_parts_and_their_sum() -> None:
    law = lambda q, k, v: th.attention_head_constant(  # noqa: E731
        q, k, v, query_radius=2.0, key_radius=3.0, value_radius=0.5, logit_scale=0.7
    )
    q, k, v = 0.7 * 0.5 * 3.0 * 1.1, 0.7 * 0.5 * 2.0 * 1.3, 0.9
    assert law(1.1, 1.3, 0.9) == pytest.approx((v + k + math.hypot(v, k)) / 2 + q)
    assert max(v, k) + q < law(1.1, 1.3, 0.9) < q + k + v
