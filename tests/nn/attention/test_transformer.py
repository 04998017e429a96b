"""Transformer blocks never expand a token, for every parameter, length and mask; positions and joined tokens cost nothing."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    BoundedNorm,
    ClippedAttention,
    JoinTokens,
    MarginCrossEntropy,
    Positions,
    TransformerBlock,
    lipschitz,
    stabilize,
    table,
    uniform_bound,
)
from tests.nn.adversary import worst_ratio
from tests.nn.attention.oracles import scrambled, token_norm
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import digits


@settings(max_examples=15)
@given(
    heads=st.integers(1, 2), tokens=st.integers(1, 4), hidden=st.integers(1, 5), normed=st.booleans(), causal=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_never_expands_whatever_the_parameters(
    heads: int, tokens: int, hidden: int, normed: bool, causal: bool, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    norm = BoundedNorm(4) if normed else None
    block = scrambled(TransformerBlock(4, heads, hidden=hidden, norm=norm, causal=causal), scale)
    bound = lipschitz(block, "token_max")
    assert bound.proved
    assert bound.upper <= 1.0
    assert uniform_bound(block, "token_max").upper == 1.0  # type: ignore[union-attr]
    assert token_norm(block, 2 * torch.randn(1, tokens, 4)) <= bound.upper + 1e-9


def test_a_stack_of_any_depth_keeps_it_and_keeps_the_signal() -> None:
    blocks = nn.Sequential(*[TransformerBlock(6, depth=12) for _ in range(12)])
    bound = lipschitz(blocks, "token_max").upper
    found = token_norm(blocks, 0.3 * torch.randn(1, 3, 6), restarts=1, rounds=3)
    assert math.exp(-2.1) < found <= bound <= 1.0
    naive = nn.Sequential(*[TransformerBlock(6) for _ in range(12)])
    assert token_norm(naive, 0.3 * torch.randn(1, 3, 6), restarts=1, rounds=3) < 0.15


def test_attention_beyond_its_limit_would_expand_the_block() -> None:
    """The same block around an attention of constant C > 1 expands: the limit is what keeps it."""
    block = TransformerBlock(3)
    loud = ClippedAttention(3, lipschitz=None)
    with torch.no_grad():
        for parameter in loud.parameters():
            parameter.zero_()
        loud.value_weight.copy_(torch.eye(3))
        loud.output_weight.copy_(3.0 * torch.eye(3))
        block.gradient.weight.zero_()
    block.attention.branch = loud
    x = 0.01 * torch.randn(1, 2, 3)
    assert token_norm(block, x) == pytest.approx(2.0)  # (1 + 3) / 2
    assert lipschitz(block, "token_max").upper == pytest.approx(2.0)
    assert uniform_bound(block, "token_max") is None


def test_it_is_the_formula_of_its_parts_and_masks_reach_the_attention() -> None:
    block = scrambled(TransformerBlock(4, 2, norm=BoundedNorm(4)))
    x, mask, padding = torch.randn(2, 5, 4), torch.rand(5, 5) < 0.5, torch.rand(2, 5) < 0.3
    y = block.norm(x)
    a = block.attention.raw_weight.sigmoid()
    y = (1 - a) * y + a * block.attention.branch(y, mask=mask, padding=padding)
    gradient = torch.relu(y @ block.gradient.weight.T + block.gradient.bias) @ block.gradient.weight
    torch.testing.assert_close(block(x, mask=mask, padding=padding), y - block.gradient.step_size() * gradient)


@pytest.mark.parametrize("depth", [1, 2, 16])
def test_the_steps_start_at_a_fraction_that_fits_the_depth(depth: int) -> None:
    block = TransformerBlock(4, depth=depth)
    assert float(torch.as_tensor(block.attention.step_size()).detach()) == pytest.approx(1 / max(2, depth))
    assert float(block.gradient.raw_step.sigmoid()[0].detach()) == pytest.approx(1 / max(2, depth))


def test_l2_counts_the_sum_of_the_weights_and_refuses_what_has_none() -> None:
    block = TransformerBlock(4)
    bound = lipschitz(block, "l2").upper
    assert bound > 1.0
    assert operator_norm(jacobian(block, torch.randn(1, 6, 4)), "l2") <= bound
    assert uniform_bound(block, "l2") is None
    with pytest.raises(UncertifiableError, match=r"attention.*grows with its length"):
        lipschitz(TransformerBlock(4, causal=True), "l2")
    with pytest.raises(UncertifiableError, match=r"attention.*no linf Lipschitz rule"):
        lipschitz(block, "linf")


def test_positions_are_a_translation() -> None:
    for learned in (True, False):
        layer = Positions(6, 4, learned=learned, size=2.0)
        x = torch.randn(2, 5, 4)
        torch.testing.assert_close(layer(x) - x, layer.vectors[:5].expand(2, 5, 4))
        for norm in ("l2", "linf", "l1", "token_max"):
            assert lipschitz(layer, norm).upper == 1.0
            assert uniform_bound(layer, norm).upper == 1.0  # type: ignore[union-attr]
        assert len(list(layer.parameters())) == int(learned)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer.vectors.norm(dim=1), torch.full((6,), 2.0))
    assert layer.vectors[3, 2] == pytest.approx(math.sqrt(2.0) * math.sin(3 / 100.0))
    drawn = Positions(500, 64, size=2.0).vectors.detach().norm(dim=1).mean()
    assert float(drawn) == pytest.approx(2.0, rel=0.02)
    for wrong in (torch.randn(2, 7, 4), torch.randn(2, 5, 3), torch.randn(5, 4)):
        with pytest.raises(ValueError, match=r"Positions\(6, 4\) needs an input of shape"):
            layer(wrong)
    layer.vectors[0, 0] = math.nan
    with pytest.raises(ValueError, match="Positions with NaN"):
        lipschitz(layer)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 40])
def test_joined_tokens_have_the_constant_one(tokens: int) -> None:
    layer = JoinTokens(tokens)
    x = torch.randn(1, tokens, 2)
    assert layer(x).shape == (1, 2 * tokens)
    J = jacobian(layer, x)
    assert token_norm(layer, x[..., None, :].transpose(1, 2)[0]) <= 1.0 + 1e-12
    for norm in ("l2", "linf", "l1"):
        assert operator_norm(J, norm) == pytest.approx(lipschitz(layer, norm).upper, rel=1e-12)
        assert uniform_bound(layer, norm).upper == lipschitz(layer, norm).upper  # type: ignore[union-attr]
    assert lipschitz(layer, "token_max").upper == uniform_bound(layer, "token_max").upper == 1.0  # type: ignore[union-attr]
    alike = torch.ones(1, tokens, 2) / math.sqrt(2.0)
    assert float(layer(alike).norm()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs an input of shape"):
        layer(torch.randn(1, tokens + 1, 2))


def test_splitting_an_input_into_tokens_costs_nothing() -> None:
    assert lipschitz(nn.Unflatten(1, (2, 3)), "token_max").upper == 1.0
    x = torch.randn(5, 6)
    assert bool((x.unflatten(1, (2, 3)).norm(dim=-1).amax(1) <= x.norm(dim=1)).all())


def test_copies_and_graphs_keep_the_map() -> None:
    block = scrambled(TransformerBlock(4, 2, norm=BoundedNorm(4)))
    x = torch.randn(2, 3, 4)
    fresh = TransformerBlock(4, 2, norm=BoundedNorm(4))
    fresh.load_state_dict(block.state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
        torch.testing.assert_close(other(x), block(x), rtol=0, atol=0)
    half = copy.deepcopy(block).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert lipschitz(half, "token_max").upper <= 1.0
    assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == x.shape


def test_stabilize_limits_the_plain_layers_of_a_transformer_in_the_norm_of_tokens() -> None:
    plain = nn.Sequential(
        nn.Linear(3, 4), Positions(6, 4), TransformerBlock(4, 2), nn.ReLU(), JoinTokens(6), nn.Linear(24, 2)
    )
    with pytest.raises(UncertifiableError, match=r"TransformerBlock.*has trainable parameters"):
        stabilize(copy.deepcopy(plain), 1.0)
    for by in ("parametrization", "projection"):
        model = stabilize(copy.deepcopy(plain), 0.5, norm="token_max", by=by)  # type: ignore[arg-type]
        bound = lipschitz(model, "token_max")
        assert 0.3 < bound.upper <= 0.5
        assert table(model).proved is not None
        assert token_norm(model, torch.randn(1, 6, 3)) <= bound.upper
    with pytest.raises(UncertifiableError, match="no token_max Lipschitz rule is known for Conv1d"):
        stabilize(nn.Sequential(nn.Conv1d(3, 3, 3)), 1.0, norm="token_max")


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    model = nn.Sequential(Positions(8, 4), *[TransformerBlock(4, 2, depth=2) for _ in range(2)], JoinTokens(3))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def certified(dim: int = 16, depth: int = 2) -> nn.Module:
    """Digits as eight tokens of a row each, to ten logits."""
    blocks = [TransformerBlock(dim, depth=depth) for _ in range(depth)]
    plain = nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Linear(8, dim), Positions(8, dim), *blocks, JoinTokens(8), nn.Linear(8 * dim, 10)
    )
    return stabilize(plain, 1.0, norm="token_max")


@pytest.mark.slow
def test_a_transformer_learns_digits_with_a_proved_bound_of_one_at_every_step() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = certified()
    x, y, x_test, y_test = digits()
    loss, epochs = MarginCrossEntropy(180.0, 0.02), 12
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    blocks = [part for part in model.children() if isinstance(part, TransformerBlock)]
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            opt.step()
            assert all(lipschitz(block, "token_max").upper <= 1.0 for block in blocks)
        schedule.step()
    accuracy = float((model.eval()(x_test).argmax(1) == y_test).double().mean())
    proved = lipschitz(model, "token_max").upper  # the input is one token: of l2 at input and output
    assert accuracy >= 0.94
    assert proved <= 1.0
    assert 0.08 < worst_ratio(model.double(), (64,), "l2", starts=8, steps=60, scale=0.3) <= proved
