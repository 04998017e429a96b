"""Clipped attention: its constant holds for every parameter, length and mask, is attained on each path, and has no shortcut."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stableopt.theory as th
from stableopt.errors import UncertifiableError
from stableopt.nn import ClippedAttention, lipschitz, lipschitz_rule, uniform_bound
from stableopt.nn.attention.masks import allowed
from tests.nn.adversary import worst_ratio
from tests.nn.attention.oracles import literal, lone_head, scrambled, token_norm
from tests.nn.catalogue import jacobian

EPS = torch.finfo(torch.float64).eps
E = torch.eye(3, dtype=torch.float64)


def bound(layer: nn.Module, norm: str = "token_max") -> float:
    answer = lipschitz(layer, norm)
    assert answer.proved
    return answer.upper


@settings(max_examples=25)
@given(
    heads=st.integers(1, 3), width=st.integers(1, 3), dim=st.integers(1, 5), tokens=st.integers(1, 6),
    radius=st.sampled_from([0.2, 1.0, (3.0, 0.5, 2.0), 30.0]), limit=st.sampled_from([None, 0.3, 1.0]), causal=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 3.0]), size=st.sampled_from([0.1, 1.0, 10.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_jacobian_exceeds_the_bound(
    heads: int, width: int, dim: int, tokens: int, radius: float | tuple[float, float, float], limit: float | None,
    causal: bool, scale: float, size: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layer = ClippedAttention(dim, heads, head_dim=width, radius=radius, lipschitz=limit, causal=causal, max_length=6)
    scrambled(layer, scale)
    x = size * torch.randn(1, tokens, dim)
    L = bound(layer)
    assert not limit or limit >= L
    assert token_norm(layer, x) <= L * (1 + 1e-9)
    J = jacobian(layer, x)
    assert float(torch.linalg.matrix_norm(J, 2)) <= bound(layer, "l2") * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_limit_holds_exactly_for_the_stored_numbers_of_extreme_parameters(dtype: torch.dtype) -> None:
    big, small = (1e3, 1e-3) if dtype == torch.float16 else (1e30, 1e-30)
    for limit in (1.0, 0.3):
        for draw in range(6):
            layer = ClippedAttention(6, 2, radius=(1.0, 2.0, 0.5), lipschitz=limit).to(dtype)
            scrambled(layer)
            with torch.no_grad():
                for i, W in enumerate((layer.query_weight, layer.key_weight, layer.value_weight, layer.output_weight)):
                    if draw >> i % 3 & 1:
                        W.copy_(
                            torch.outer(torch.randn(W.shape[0]), torch.randn(W.shape[1])).to(dtype)
                        )  # Gram is exact
                    W.mul_((1.0, big, small, 0.0)[(draw + i) % 4])
                layer.log_scale.copy_(torch.tensor([(0.0, 1e4, -1e4, 3.0)[draw % 4], 0.5]))
            assert bound(layer) <= limit
            assert layer(torch.randn(1, 3, 6, dtype=dtype)).isfinite().all()


def test_rank_one_matrices_use_the_limit_up_to_the_slack() -> None:
    layer = ClippedAttention(5)
    with torch.no_grad():
        for W in (layer.query_weight, layer.key_weight, layer.value_weight, layer.output_weight):
            W.copy_(torch.outer(torch.randn(5), torch.randn(5)))
    assert 1 - 1e-11 < bound(layer) <= 1.0


def test_a_small_layer_is_not_scaled_up_and_its_bound_is_that_of_the_theory() -> None:
    layer = ClippedAttention(4, 2, radius=(1.0, 2.0, 3.0), logit_scale=0.25)
    scrambled(layer, 1e-3)
    W = {name: getattr(layer, f"{name}_weight").detach() for name in ("query", "key", "value", "output")}
    s = layer.logit_scale().detach()
    norm = lambda A: float(torch.linalg.matrix_norm(A, 2))  # noqa: E731
    heads = [
        th.attention_head_constant(
            0.0, norm(W["key"][p]), norm(W["value"][p]), query_radius=1.0, key_radius=2.0, value_radius=3.0, logit_scale=float(s[h])
        )
        for h, p in enumerate((slice(0, 2), slice(2, 4)))
    ]  # fmt: skip
    queries = norm(s.repeat_interleave(2)[:, None] * W["query"]) * 2.0 * 3.0
    expected = th.attention_constant(norm(W["output"]), heads, queries=queries)
    assert float(torch.as_tensor(layer.output_factor()).detach()) == pytest.approx(1.0, abs=1e-11)
    assert bound(layer) == pytest.approx(expected, rel=1e-10)
    limited = ClippedAttention(4, 2, radius=(1.0, 2.0, 3.0), logit_scale=0.25, lipschitz=0.1 * expected)
    limited.load_state_dict(layer.state_dict())
    assert float(torch.as_tensor(limited.output_factor()).detach()) == pytest.approx(0.1, rel=0.02)  # Gram iteration


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_each_path_is_attained(part: str) -> None:
    """The matrix of the path reads the first axis, along which tokens move; the second places two tokens oppositely."""
    s, (Rq, Rk, Rv) = 0.5, (3.0, 2.0, 1.5)
    reads, places = torch.outer(E[0], E[0]), torch.outer(E[0], E[1])
    weights = {"query": 0.0 * E, "key": Rk * places, "value": Rv * places}
    weights[part] = reads
    query_bias = (part == "key") * Rq * E[0]
    layer = lone_head(**weights, query_bias=query_bias, radius=(Rq, Rk, Rv), scale=s)
    x = 0.999999 * torch.stack([E[1], -E[1]])[None]  # just inside all balls
    moves = torch.stack([E[0], -E[0] if part == "key" else E[0]])
    J = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0]
    slope = float(torch.tensordot(J, moves, dims=2).norm(dim=-1).max())
    expected = {"query": s * Rv * Rk, "key": s * Rv * Rq, "value": 1.0}[part]
    assert slope == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():  # what only places the tokens costs nothing in the law of the path
        for name in {"query", "key", "value"} - {part}:
            getattr(layer, f"{name}_weight").zero_()
    assert bound(layer) == pytest.approx(expected, rel=1e-9)


def test_clipping_breaks_the_law_that_keys_and_values_share_one_perturbation() -> None:
    r"""Equal perturbations of two clipped keys change their logits oppositely: sqrt(|V|^2 + kappa^2) is no bound, ours is."""
    layer = lone_head(
        query=0.0 * E[:, :1].expand(3, 4), key=torch.eye(3, 4), value=torch.tensor([[0.0, 0.0, 1.0, 1.0]] + 2 * [[0.0] * 4]),
        query_bias=E[0], radius=(1.0, 1.0, 1.0), scale=1.0,
    )  # fmt: skip
    with torch.no_grad():  # values read the third axis, which carries them, and the second, which moves
        layer.value_weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 1.0]] + 2 * [[0.0] * 4]))
    out, half = 1.0 + 1e-9, math.sqrt(0.5)
    place = torch.zeros(1, 2, 4)
    place[0, 0, :2] = out * torch.tensor([half, -half])  # keys on the sphere, at 45 degrees to the query
    place[0, 1, :2] = out * torch.tensor([half, half])
    v = 1 - 1e-6
    place[0, :, 3] = torch.tensor([v, -v]) - place[0, :, 1]
    J = torch.autograd.functional.jacobian(layer, place)[0, 0, 0, 0]  # of the first entry of the output
    slope = abs(float(J[:, 1].sum()))  # both tokens move along the second axis, by 1
    assert slope > 1.49  # |V e_2| + kappa / 2
    assert slope <= bound(layer) + 1e-9


def test_dot_product_attention_grows_with_the_square_of_its_input_and_clipped_attention_does_not() -> None:
    """A token between two far ones that it attends to alike; a random search finds 1.0, 1.8, 14, 90, 752 at 1, 3, 10, 30, 100."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).softmax(-1) @ x

    clipped = ClippedAttention(2, logit_scale=4.0)
    with torch.no_grad():
        for name in ("query", "key", "value", "output"):
            getattr(clipped, f"{name}_weight").copy_(torch.eye(2))
    between = torch.tensor([[[0.25, 0.0], [0.5, math.sqrt(0.75)], [0.5, -math.sqrt(0.75)]]])
    found = {r: token_norm(plain, r * between) for r in (1.0, 3.0, 10.0, 30.0, 100.0)}
    assert found[1.0] < 2.0
    assert found[10.0] > 10.0
    assert found[100.0] == pytest.approx(found[10.0] * 100, rel=0.1)
    assert all(0.0 < token_norm(clipped, r * between) <= bound(clipped) <= 1.0 for r in found)


def test_in_l2_the_sum_of_the_weights_counts() -> None:
    """All tokens attend to the first: moving it by 1 moves every one of them, sqrt(N) in l2 and 1 in the norm of tokens."""
    N = 16
    layer = lone_head(
        query=0.0 * E, key=torch.outer(E[0], E[1]), value=torch.outer(E[0], E[0]), query_bias=20.0 * E[0],
        radius=(20.0, 1.0, 9.0), scale=1.0,
    )  # fmt: skip
    x = -2.0 * E[1].expand(1, N, 3).clone()
    x[0, 0] = 2.0 * E[1]
    J = jacobian(layer, x)
    assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(math.sqrt(N), rel=1e-9)
    assert token_norm(layer, x) == pytest.approx(1.0, rel=1e-9)
    short = ClippedAttention(3, max_length=N)
    short.load_state_dict(ClippedAttention(3).state_dict())
    assert bound(short, "l2") < bound(ClippedAttention(3), "l2") <= math.exp(1.0) * 1.3


def test_the_l2_bound_holds_for_every_length_without_a_mask_and_needs_the_length_with_a_causal_one() -> None:
    layer = scrambled(ClippedAttention(3, 2, head_dim=2, logit_scale=0.7))
    L = bound(layer, "l2")
    for tokens in (1, 5, 40):
        assert float(torch.linalg.matrix_norm(jacobian(layer, torch.randn(1, tokens, 3)), 2)) <= L
    causal = ClippedAttention(4, 2, causal=True)
    with pytest.raises(
        UncertifiableError, match=r"grows with its length. Give max_length, or ask for norm='token_max'"
    ):
        lipschitz(causal, "l2")
    assert bound(causal) <= 1.0
    assert bound(ClippedAttention(4, 2, causal=True, max_length=4), "l2") <= 2.1  # at most sqrt(4) times
    with pytest.raises(ValueError, match="got an input with 5 tokens, more than its max_length=4"):
        ClippedAttention(3, max_length=4)(torch.randn(1, 5, 3))


@pytest.mark.parametrize(("causal", "max_length"), [(False, None), (False, 5), (True, 5)])
def test_the_l2_bound_is_that_of_the_theory(causal: bool, max_length: int | None) -> None:
    layer = ClippedAttention(
        3, radius=(2.0, 3.0, 0.5), logit_scale=0.25, lipschitz=None, causal=causal, max_length=max_length
    )
    scrambled(layer)
    s, norms = float(layer.logit_scale()[0].detach()), {}
    for name in ("query", "key", "value", "output"):
        norms[name] = float(torch.linalg.matrix_norm(getattr(layer, f"{name}_weight").detach(), 2))
    head = th.attention_head_constant(
        0.0, norms["key"], norms["value"], query_radius=2.0, key_radius=3.0, value_radius=0.5, logit_scale=s
    )
    sums = [th.attention_weight_sum(s * 6.0, max_length, causal=causal)]
    expected = th.attention_constant(norms["output"], [head], queries=s * 1.5 * norms["query"], weight_sums=sums)
    assert bound(layer, "l2") == pytest.approx(expected, rel=1e-9)


def test_a_factor_with_few_digits_is_rounded_to_zero() -> None:
    """Below 1e-38 a float32 is a multiple of 1e-45, and the next one may be above the limit by a half."""
    for k in range(12):
        layer = ClippedAttention(2).float()
        with torch.no_grad():
            layer.output_weight.copy_(1e30 * torch.eye(2))
            layer.value_weight.copy_(10.0 ** (14 + k / 20) * torch.eye(2))
        assert bound(layer) <= 1.0
        assert not layer(torch.randn(1, 2, 2, dtype=torch.float32)).any()


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_other_norms_are_refused_with_what_to_do(norm: str) -> None:
    with pytest.raises(UncertifiableError, match=f"no {norm} Lipschitz rule .* Ask for norm='token_max', or l2"):
        lipschitz(ClippedAttention(4), norm)


def test_the_uniform_bound_is_the_limit() -> None:
    layer = ClippedAttention(4, lipschitz=0.7)
    answer = uniform_bound(layer, "token_max")
    assert answer is not None
    assert (answer.lower, answer.upper, answer.proved) == (0.0, 0.7, True)
    assert uniform_bound(layer, "l2") is None
    assert uniform_bound(ClippedAttention(4, lipschitz=None), "token_max") is None


@pytest.mark.parametrize("heads", [1, 3])
def test_it_computes_its_formula(heads: int) -> None:
    layer = scrambled(ClippedAttention(6, heads, radius=(1.0, 2.0, 1.5)))
    x, z = 2 * torch.randn(2, 5, 6), 2 * torch.randn(2, 4, 6)
    torch.testing.assert_close(layer(x), literal(layer, x))
    torch.testing.assert_close(layer(x, z), literal(layer, x, context=z))
    torch.testing.assert_close(layer(x[:, None]), layer(x)[:, None])
    permuted = torch.randperm(5)
    torch.testing.assert_close(layer(x[:, permuted]), layer(x)[:, permuted])


def test_masks_choose_who_is_attended_to() -> None:
    layer = scrambled(ClippedAttention(4, 2))
    x = torch.randn(3, 5, 4)
    lower = torch.ones(5, 5).tril().bool()
    some = torch.rand(5, 5) < 0.6
    some[2] = False  # this token may attend to nothing
    padding = torch.tensor([[False] * 5, [False, False, False, True, True], [True] * 5])
    causal = ClippedAttention(4, 2, causal=True)
    causal.load_state_dict(layer.state_dict())
    torch.testing.assert_close(causal(x), literal(layer, x, lower))
    torch.testing.assert_close(layer(x, mask=some), literal(layer, x, some))
    torch.testing.assert_close(layer(x, mask=some.expand(3, 2, 5, 5)), literal(layer, x, some))
    added = torch.zeros(5, 5).masked_fill(~some, -math.inf)
    torch.testing.assert_close(layer(x, mask=added), literal(layer, x, some))
    torch.testing.assert_close(causal(x, mask=some), literal(layer, x, some & lower))
    for map_, base in ((layer, torch.ones(5, 5).bool()), (causal, lower)):
        for kwargs, more in (({}, base), ({"mask": some}, base & some), ({"mask": added}, base & some)):
            y = map_(x, padding=padding, **kwargs)
            for b in range(3):
                torch.testing.assert_close(y[b : b + 1], literal(layer, x[b : b + 1], more & ~padding[b]))
    hidden = x.clone()
    hidden[1, 3:] = 1e6
    torch.testing.assert_close(layer(hidden, padding=padding)[1, :3], layer(x, padding=padding)[1, :3])


def test_numbers_that_are_added_to_the_logits_are_added() -> None:
    layer = scrambled(ClippedAttention(4))
    x = torch.randn(1, 3, 4)
    bias = torch.full((3, 3), -40.0).fill_diagonal_(0.0)
    torch.testing.assert_close(layer(x, mask=bias), literal(layer, x, torch.eye(3).bool()))


@pytest.mark.parametrize("kind", ["none", "bool", "float", "padding", "causal"])
def test_rows_without_a_token_give_the_bias_and_finite_gradients(kind: str) -> None:
    layer = scrambled(ClippedAttention(4, 2, causal=kind == "causal"))
    x = torch.randn(2, 3, 4, requires_grad=True)
    empty = torch.zeros(3, 3).bool()
    kwargs = {
        "none": {}, "bool": {"mask": empty}, "float": {"mask": torch.full((3, 3), -math.inf)},
        "padding": {"padding": torch.ones(2, 3).bool()}, "causal": {"padding": torch.tensor([[True, False, False]] * 2)},
    }[kind]  # fmt: skip
    y = layer(x, **kwargs)
    if kind not in {"none", "causal"}:
        torch.testing.assert_close(y, layer.output_bias.expand_as(y))  # type: ignore[union-attr]
    y.square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *layer.parameters()))


def test_no_kernel_sees_a_row_without_a_token() -> None:
    """Some kernels return 0 there, others NaN."""
    q, some = torch.zeros(2, 1, 3, 4), torch.eye(3).bool()
    some[1] = False
    rows = allowed(q, q, some, None, causal=False)
    assert rows.mask is not None
    assert rows.mask.any(-1).all()
    assert rows.empty is not None
    assert rows.empty.squeeze().tolist() == [False, True, False]
    added = allowed(q, q, torch.zeros(3, 3).masked_fill(~some, -math.inf), None, causal=False)
    assert added.mask is not None
    assert added.mask[..., 1, :].isfinite().all()
    padded = allowed(q, q, None, torch.tensor([[True, False, False]] * 2), causal=True)
    assert padded.mask is not None
    assert padded.mask[0, 0].tolist() == [[True, True, True], [False, True, False], [False, True, True]]


@settings(max_examples=12)
@given(tokens=st.integers(1, 5), kept=st.floats(0.0, 1.0), seed=st.integers(0, 40))
def test_any_mask_keeps_the_bound(tokens: int, kept: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = scrambled(ClippedAttention(3, 2, head_dim=2, lipschitz=None))
    mask, x = torch.rand(tokens, tokens) < kept, 3 * torch.randn(1, tokens, 3)
    assert token_norm(lambda v: layer(v, mask=mask), x) <= bound(layer)


def test_input_and_context_together_keep_the_bound() -> None:
    layer = scrambled(ClippedAttention(3, 2, head_dim=2, lipschitz=None))
    for scale in (0.1, 1.0, 5.0):
        both = scale * torch.randn(1, 7, 3)
        assert token_norm(lambda v: layer(v[:, :3], v[:, 3:]), both) <= bound(layer)


def test_the_weights_of_torch_are_taken_over() -> None:
    for bias in (True, False):
        plain = nn.MultiheadAttention(6, 3, bias=bias, batch_first=True)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, 5, 6)
        layer = ClippedAttention.from_torch(plain, radius=1e3)
        torch.testing.assert_close(layer(x), plain(x, x, x)[0])
        later = torch.ones(5, 5).triu(1).bool()
        causal = ClippedAttention.from_torch(plain, radius=1e3, causal=True)
        torch.testing.assert_close(causal(x), plain(x, x, x, attn_mask=later)[0])
        assert bound(layer) > 1e3
        limited = ClippedAttention.from_torch(plain, radius=(1.0, 1.0, 2.0), lipschitz=1.0)
        assert bound(limited) <= 1.0
        assert limited.radii == (1.0, 1.0, 2.0)
    with pytest.raises(UncertifiableError, match=r"ClippedAttention.from_torch takes the weights over"):
        lipschitz(plain)
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.MultiheadAttention, got Linear"):
        ClippedAttention.from_torch(nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]
    for options in ({"kdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="from_torch needs a MultiheadAttention with one size"):
            ClippedAttention.from_torch(nn.MultiheadAttention(4, 2, **options), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be an integer"),
        ({"dim": 4, "heads": 0}, "heads must be"),
        ({"dim": 4, "heads": 3}, "dim must be a multiple of heads, got 4 and 3"),
        ({"dim": 4, "head_dim": 0}, "head_dim must be"),
        ({"dim": 4, "radius": 0.0}, "query_radius must be finite and > 0"),
        ({"dim": 4, "radius": (1.0, 1.0, math.inf)}, "value_radius must be finite"),
        ({"dim": 4, "radius": (1.0, 1.0)}, "radius must be one number or those of queries"),
        ({"dim": 4, "logit_scale": -1.0}, "logit_scale must be finite and > 0"),
        ({"dim": 4, "lipschitz": 0.0}, "lipschitz must be finite and > 0"),
        ({"dim": 4, "dropout": 1.0}, "dropout must lie in"),
        ({"dim": 4, "max_length": 0}, "max_length must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedAttention(**arguments)  # type: ignore[arg-type]


def test_wrong_inputs_and_masks_are_refused() -> None:
    layer, x = ClippedAttention(4, 2), torch.randn(2, 3, 4)
    for wrong in (x[0], x[..., :3]):
        with pytest.raises(
            ValueError, match=r"needs an input of shape \(batch, ..., tokens, 4\), got .* unsqueeze\(0\)"
        ):
            layer(wrong)
    with pytest.raises(ValueError, match=r"needs a context of shape"):
        layer(x, x[0])
    with pytest.raises(ValueError, match="must be Boolean or hold numbers"):
        layer(x, mask=torch.ones(3, 3, dtype=torch.int64))
    for shape in ((3, 4), (2, 3, 3), (3,), (5, 2, 3, 3)):
        with pytest.raises(ValueError, match=r"a mask must have the shape \(N, M\) = \(3, 3\) or one that broadcasts"):
            layer(x, mask=torch.ones(shape).bool())
    for padding in (torch.zeros(2, 3), torch.zeros(3).bool(), torch.zeros(2, 4).bool()):
        with pytest.raises(ValueError, match="padding must be Boolean of shape"):
            layer(x, padding=padding)
    with pytest.raises(ValueError, match="causal attention needs as many keys as queries, got 2 and 3"):
        ClippedAttention(4, causal=True)(x, x[:, :2])


@pytest.mark.parametrize(
    "name", ["query_weight", "key_weight", "value_weight", "output_weight", "key_bias", "log_scale"]
)
def test_nan_parameters_have_no_bound(name: str) -> None:
    for limit in (1.0, None):
        layer = ClippedAttention(3, lipschitz=limit)
        with torch.no_grad():
            getattr(layer, name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            lipschitz(layer, "token_max")


def test_dropout_is_for_training_only() -> None:
    layer = ClippedAttention(4, 2, dropout=0.5)
    x = torch.randn(2, 6, 4)
    assert not torch.equal(layer.train()(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)
    plain = ClippedAttention(4, 2)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain.train()(x))


def test_gradients_are_right_and_reach_every_parameter() -> None:
    layer = scrambled(ClippedAttention(3, 2, head_dim=2))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.randn(1, 3, 3, requires_grad=True)

    def f(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), fast_mode=True)
    f(x, *parameters.values()).square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in parameters.values())
    assert float(torch.as_tensor(layer.output_factor()).detach()) < 1.0


@pytest.mark.slow
def test_copies_graphs_and_state_round_trips_keep_the_map() -> None:
    layer = scrambled(ClippedAttention(4, 2, causal=True))
    x = torch.randn(2, 5, 4)
    fresh = ClippedAttention(4, 2, causal=True)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    copies = [
        copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh,
        torch.compile(layer, backend="eager", fullgraph=True),
    ]  # fmt: skip
    for other in copies:
        torch.testing.assert_close(other(x), layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its kernel has no batching rule
        torch.testing.assert_close(torch.func.vmap(lambda v: layer(v[None])[0])(x), layer(x))
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == x.shape
    assert all(p.ndim >= 1 and p.is_contiguous() for p in layer.parameters())
    assert not dict(layer.named_buffers())
    assert str(layer).startswith("ClippedAttention(4, heads=2, head_dim=2")


@pytest.mark.slow
def test_an_exported_program_takes_any_length() -> None:
    layer = scrambled(ClippedAttention(4, 2)).eval()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 5, 4),), dynamic_shapes={"input": {1: length}}).module()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for tokens in (2, 9):
        x, padding = torch.randn(2, tokens, 4), torch.rand(2, tokens) < 0.5
        torch.testing.assert_close(program(x), layer(x))
        torch.testing.assert_close(compiled(x, padding=padding), layer(x, padding=padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    layer = scrambled(ClippedAttention(8, 2)).float()
    x = torch.randn(2, 5, 8, dtype=torch.float32)
    half = copy.deepcopy(layer).to(dtype)
    y = half(x.to(dtype), mask=torch.zeros(5, 5).fill_diagonal_(-math.inf))
    assert y.dtype == dtype
    assert half(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half(x.to(dtype)).float(), layer(x), rtol=0.05, atol=0.03)
    assert half.output_factor().dtype == torch.float32  # type: ignore[union-attr]
    assert bound(half) <= 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, mixed = layer.output_factor(), layer(x)
    torch.testing.assert_close(inside, layer.output_factor(), rtol=0, atol=0)
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.05, atol=0.03)


def test_a_subclass_with_another_forward_has_no_bound() -> None:
    class Louder(ClippedAttention):
        def output_factor(self) -> float:
            return 2.0

    with pytest.raises(UncertifiableError, match="overrides output_factor"):
        lipschitz(Louder(2), "token_max")
    assert lipschitz_rule(ClippedAttention(2), "l2").proved


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "reached"), [(1, 0.65), (2, 0.45), (4, 0.35)])
def test_an_adversary_reaches_a_good_part_of_the_bound(heads: int, reached: float) -> None:
    layer = ClippedAttention(8, heads)
    found = worst_ratio(layer, (6, 8), "token_max", steps=150)
    assert reached * bound(layer) < found <= bound(layer)
    assert worst_ratio(layer, (6, 8), "l2", steps=60) <= bound(layer, "l2")


def test_a_finite_mask_forbids_nothing_in_half_precision() -> None:
    layer = ClippedAttention(4)
    nn.init.normal_(layer.output_weight)
    x = torch.randn(1, 3, 4)
    mask = torch.tensor([[-1e8, -1e9, -1e9]]).expand(3, 3)
    assert bool(layer.half()(x.half(), mask=mask).abs().sum() > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_matrix_that_half_precision_uses_keeps_the_limit(dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        layer = ClippedAttention(8, 2)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("weight"):
                    parameter.normal_()
        bound = lipschitz(layer.to(dtype), "token_max").upper
        assert 0.8 < bound <= 1.0
