"""Certificates of attention and of what stands around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import nn

from stableopt.certify.verifier.sequences import weight_sum
from stableopt.errors import UncertifiableError
from stableopt.linalg import upper
from stableopt.nn import BoundedNorm, ClippedAttention, JoinTokens, Positions, TransformerBlock, lipschitz
from stableopt.theory import attention_weight_sum
from tests.certify.fold.sequence_laws import (
    SLACK,
    changed,
    constant,
    output,
    output_of,
    pairs,
    program_of,
    rejected,
    with_tensor,
)
from tests.nn.adversary import worst_ratio

N, D = 5, 4
MODULES: dict[str, Callable[[], nn.Module]] = {
    "one_head": lambda: ClippedAttention(D),
    "heads": lambda: ClippedAttention(D, 2, radius=(2.0, 0.5, 3.0), max_length=8),
    "causal": lambda: ClippedAttention(D, 2, causal=True, max_length=N, lipschitz=None),
    "wide": lambda: ClippedAttention(D, 3, head_dim=5, bias=False, lipschitz=4.0),
    "norm": lambda: BoundedNorm(D, 2.5),
    "norm_plain": lambda: BoundedNorm(D, 0.5, affine=False),
    "positions": lambda: Positions(N + 2, D),
    "places": lambda: Positions(N + 2, D, learned=False),
    "join": lambda: JoinTokens(N),
}
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: TransformerBlock(D, 2, norm=BoundedNorm(D)),
    "model": lambda: nn.Sequential(Positions(N, D), TransformerBlock(D, depth=2), JoinTokens(N), nn.Linear(N * D, 3)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    module = (MODULES | BLOCKS)[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", [*MODULES, *BLOCKS])
def test_a_program_computes_what_the_module_computes(name: str) -> None:
    module = made(name)
    program = program_of(module, (N, D), "token_max")
    for scale in (0.1, 3.0, 100.0):
        x = scale * torch.randn(4, N, D)
        torch.testing.assert_close(output(program, x), output_of(module, x), rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize(("name", "norm"), pairs([*MODULES, *BLOCKS], ("l2", "token_max")))
def test_the_proved_constant_lies_between_an_adversary_and_the_rule(name: str, norm: str) -> None:
    module = made(name)
    program = program_of(module, (N, D), norm)
    proved = constant(program)
    assert worst_ratio(lambda x: output(program, x), (N, D), norm, starts=8, steps=12) <= proved
    try:
        rule = lipschitz(module, norm).upper
    except UncertifiableError:
        return
    assert proved <= rule * SLACK


def test_limits_of_the_modules_are_proved() -> None:
    assert constant(program_of(made("one_head"), (N, D), "token_max")) <= 1.0 + 1e-8
    assert constant(program_of(made("block"), (N, D), "token_max")) <= 1.0 + 1e-8
    assert constant(program_of(JoinTokens(N), (N, D), "token_max")) <= 1.0 + 1e-15


def test_tokens_that_all_move_alike_attain_the_constant_of_the_values() -> None:
    layer = ClippedAttention(D, lipschitz=None, radius=(1.0, 1.0, 1e3))
    with torch.no_grad():
        layer.log_scale.fill_(-10.0)
    proved = constant(program_of(layer, (N, D), "token_max"))
    x = 0.1 * torch.ones(1, N, D)
    moved = (output_of(layer, 2 * x) - output_of(layer, x)).norm(dim=-1).max() / x.norm(dim=-1).max()
    assert 0.9 * proved <= float(moved) <= proved


def test_the_slope_of_a_bounded_norm_is_attained_at_zero() -> None:
    layer = BoundedNorm(D)
    proved = constant(program_of(layer, (D,), "l2"))
    x = 1e-6 * torch.ones(1, D)
    assert proved * (1 - 1e-9) <= float(output_of(layer, x).norm() / x.norm()) <= proved
    assert constant(program_of(layer, (D,), "linf")) == pytest.approx(1 + math.sqrt((D - 1) / 27), rel=1e-12)
    assert worst_ratio(layer, (D,), "linf", starts=8, steps=20) <= 1 + math.sqrt((D - 1) / 27)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.25, 1.0, 5.0, 31.0, 40.0])
def test_the_sum_of_weights_is_above_the_true_one_and_not_above_the_theorem(limit: float, causal: bool) -> None:
    for n in (1, 2, 9, 200):
        e = math.exp(-2 * limit)
        true = sum(1 / (1 + i * e) for i in range(n)) if causal else n / (1 + (n - 1) * e)
        found = float(weight_sum(Fraction(limit), n, causal=causal))
        assert true * (1 - 1e-12) <= found <= max(true * (1 + 1e-12), float(n) * (limit > 32))
        if limit <= 32:
            assert found <= upper(attention_weight_sum(limit, n, causal=causal)) * (1 + 1e-9)


@pytest.mark.parametrize(("name", "norm"), pairs(["one_head", "heads", "causal", "wide"], ("l2", "token_max")))
def test_smaller_numbers_and_other_tensors_are_rejected(name: str, norm: str) -> None:
    program = program_of(made(name), (N, D), norm)
    node = program.nodes[0]
    constant(program)
    for field in ("bound", "query_bound", "output_bound"):
        assert rejected(changed(program, 0, **{field: node[field] * (1 - 1e-6)})), field
    for field in ("key_bounds", "value_bounds"):
        assert rejected(changed(program, 0, **{field: [node[field][0] * (1 - 1e-6), *node[field][1:]]})), field
        assert rejected(changed(program, 0, **{field: node[field][1:]})), field
    for radius in range(3):
        grown = [r * (2.0 if i == radius else 1.0) for i, r in enumerate(node["radii"])]
        assert rejected(changed(program, 0, radii=grown))
    assert rejected(with_tensor(program, node["scales"], 1.01 * program.tensors[node["scales"]]))
    assert rejected(with_tensor(program, node["scales"], -program.tensors[node["scales"]]))
    for side in ("query", "key", "value", "output"):
        stored = node[f"{side}_weight"]
        assert rejected(with_tensor(program, stored, 1.01 * program.tensors[stored])), side
        assert rejected(with_tensor(program, stored, program.tensors[stored][:, 1:])), side
    assert rejected(changed(program, 0, causal=1))


def test_a_causal_mask_is_no_free_setting_in_l2() -> None:
    program = program_of(ClippedAttention(D, radius=3.0, logit_scale=0.2), (9, D), "l2")
    constant(program)
    assert rejected(changed(program, 0, causal=True))


@pytest.mark.parametrize("norm", ["l2", "linf", "token_max"])
def test_a_smaller_bound_of_a_bounded_norm_is_rejected(norm: str) -> None:
    program = program_of(BoundedNorm(D, affine=False), (N, D), norm)
    constant(program)
    assert rejected(changed(program, 0, bound=program.nodes[0]["bound"] * (1 - 1e-9)))


@pytest.mark.parametrize("module", [ClippedAttention(D), TransformerBlock(D)])
def test_linf_is_refused_with_the_norm_to_ask_for(module: nn.Module) -> None:
    with pytest.raises(UncertifiableError, match="token_max"):
        program_of(module, (N, D), "linf")


@pytest.mark.parametrize(
    "module", [ClippedAttention(D, max_length=N - 1), Positions(N - 1, D), JoinTokens(N + 1), ClippedAttention(D + 1)]
)
def test_shapes_that_a_module_refuses_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"shape|tokens"):
        program_of(module, (N, D), "token_max")
