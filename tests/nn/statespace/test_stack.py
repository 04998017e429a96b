"""Blocks and stacks of state spaces: one gain for the whole, whatever the parameters, the depth and the length."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.nn import lipschitz, stabilize
from stableopt.nn.statespace import CappedLinear, DiagonalStateSpace, StateSpaceBlock, StateSpaceStack
from stableopt.nn.uniform import uniform_bound
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm


def scrambled(model: nn.Module, seed: int, scale: float) -> nn.Module:
    """Give a model parameters that no training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


@settings(max_examples=6)
@given(
    layers=st.integers(1, 3), gain=st.sampled_from([0.3, 1.0, 50.0]), both=st.booleans(), log_scale=st.integers(-6, 6),
    activation=st.sampled_from(["relu", "tanh"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_proved_gain_of_a_stack_never_exceeds_its_limit(
    layers: int, gain: float, both: bool, log_scale: int, activation: str, seed: int
) -> None:
    front = (seed % 11) / 10
    model = StateSpaceStack(2, 3, 2, layers, 2, gain=gain, front=front, bidirectional=both, activation=activation)
    scrambled(model, seed, 10.0**log_scale)
    bound = lipschitz(model)
    assert bound.proved
    assert bound.upper <= gain
    assert lipschitz(copy.deepcopy(model).float()).upper <= gain
    J = jacobian(model, torch.randn(1, 7, 2))
    for norm in ("l2", "linf", "l1"):
        assert operator_norm(J, norm) <= lipschitz(model, norm).upper * (1 + 1e-12)


@pytest.mark.parametrize("norm", ["l2", "token_max"])
def test_no_pair_of_sequences_is_spread_by_more(norm: str) -> None:
    model = scrambled(StateSpaceStack(2, 4, 3, 2, 2, gain=3.0), 0, 0.7)
    assert worst_ratio(model, (10, 2), norm, starts=3, steps=10) <= lipschitz(model, norm).upper


def test_a_block_is_its_formula() -> None:
    block = scrambled(StateSpaceBlock(3, 4, hidden=5, activation="tanh"), 1, 0.7)
    assert isinstance(block, StateSpaceBlock)
    x = torch.randn(2, 9, 3)
    a = block.raw_weight.sigmoid()
    torch.testing.assert_close(block(x), block.features((1 - a) * x + a * block.time(x)))
    weight = float(block.weight().detach())
    by_hand = (1 - weight + weight * lipschitz(block.time, "linf").upper) * lipschitz(block.features, "linf").upper
    assert lipschitz(block, "linf").upper == pytest.approx(by_hand, rel=1e-12)


def test_an_identity_attains_the_gain() -> None:
    """With a weight near 0 and a zero gradient step the blocks are the identity, so only the limits of the ends are left."""
    model = StateSpaceStack(2, 2, 3, 4, 2, gain=5.0)
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("raw_weight").fill_(-40.0)
            block.get_parameter("features.weight").zero_()
        for end in (model.encoder, model.decoder):
            end.weight.copy_(9.0 * torch.eye(2))
    bound = lipschitz(model).upper
    J = jacobian(model, torch.randn(1, 3, 2))
    assert bound <= 5.0
    assert operator_norm(J, "l2") == pytest.approx(5.0, rel=0.03)  # Gram iteration: 2 ** (1 / 128) at each end


def test_the_plain_sum_of_input_and_branch_doubles() -> None:
    """Why the residual is a mix: x + S(x) of a recurrence of gain 1 has the gain 2."""
    layer = DiagonalStateSpace(1, 1, radius=(0.9, 0.9), phase=0.0, skip=False)
    with torch.no_grad():
        layer.input_weight.copy_(torch.tensor([[9.0], [0.0]]))
        layer.output_weight.copy_(torch.tensor([[9.0, 0.0]]))
        x = torch.ones(1, 5000, 1)
        assert float((x + layer(x)).norm() / x.norm()) > 1.99
        assert lipschitz(layer).upper <= 1.0


def test_a_deep_stack_keeps_the_signal_at_the_start() -> None:
    """The weights and steps that fit the depth keep a 16-block stack alive; half everywhere kills it."""
    x = torch.randn(1, 4, 4)
    norms = []
    for step in (None, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(*[StateSpaceBlock(4, 4, depth=16, step=step, phase=0.3) for _ in range(16)])
        norms.append(operator_norm(jacobian(model, x), "l2"))
    assert norms[0] > 0.1
    assert norms[1] < norms[0] / 100


@pytest.mark.parametrize("both", [False, True])
def test_lengths_and_streams_are_the_sequence(both: bool) -> None:
    model = scrambled(StateSpaceStack(2, 3, 4, 2, 2, bidirectional=both), 2, 0.7)
    assert isinstance(model, StateSpaceStack)
    x, lengths = torch.randn(2, 18, 2), torch.tensor([18, 11])
    y, states = model.run(x, lengths=lengths)
    torch.testing.assert_close(y[1, :11], model(x[1:, :11])[0])
    if both:
        return
    state = None
    for t in range(18):
        out, state = model.step(x[:, t], state)
        torch.testing.assert_close(out[0], y[0, t])
    assert state is not None
    torch.testing.assert_close(state[1][0], states[1][0])
    first, states = model.run(x[:, :7])
    torch.testing.assert_close(torch.cat([first, model(x[:, 7:], states)], 1)[0], y[0])


def test_the_bound_holds_for_all_parameters() -> None:
    model = StateSpaceStack(2, 3, 4, 2, 2, gain=6.0)
    bound = uniform_bound(model)
    assert bound is not None
    assert bound.upper == 6.0
    tokens = uniform_bound(model, "token_max")
    assert tokens is not None
    assert lipschitz(model, "token_max").upper <= tokens.upper
    assert uniform_bound(model, "linf") is None
    whole = stabilize(nn.Sequential(nn.Linear(2, 3), StateSpaceBlock(3, 4), nn.Linear(3, 2)), 2.0)
    assert lipschitz(whole).upper <= 2.0


def test_copies_compilation_and_half_precision_keep_it() -> None:
    model = scrambled(StateSpaceStack(2, 4, 3, 1, 2), 3, 0.7)
    x = torch.randn(2, 9, 2)
    fresh = StateSpaceStack(2, 4, 3, 1, 2)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        assert half(x.to(dtype)).dtype == dtype
        assert lipschitz(half).upper <= 1.0
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (2, 9, 2)


@pytest.mark.slow
def test_a_stack_is_compiled_and_exported() -> None:
    model = scrambled(StateSpaceStack(2, 4, 3, 2, 2), 3, 0.7)
    x = torch.randn(2, 9, 2)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "layers must be an integer"),
        ({"d_model": 0}, "d_model must be an integer"),
        ({"gain": -1.0}, "gain must be finite and > 0"),
        ({"activation": "gelu"}, "slopes down to"),
        ({"activation": "glu"}, "activation must be one of"),
        ({"front": 1.5}, "front is a part"),
        ({"front": math.nan}, "front is a part"),
        ({"step": 1.0}, "step is a fraction"),
        ({"radius": (0.5, 1.5)}, "radius must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    settled: dict[str, object] = {"d_in": 1, "d_model": 2, "d_state": 2, "layers": 1, "d_out": 1}
    with pytest.raises(ValueError, match=message):
        StateSpaceStack(**{**settled, **arguments})  # type: ignore[arg-type]


def test_a_wrong_number_of_states_is_refused() -> None:
    with pytest.raises(ValueError, match="one state for each of its 2 blocks, got 1"):
        StateSpaceStack(1, 2, 2, 2, 1)(torch.zeros(1, 3, 1), [torch.zeros(1, 4)])


def test_nan_has_no_bound() -> None:
    for name in ("encoder.bias", "encoder.weight", "blocks.0.raw_weight", "blocks.0.features.bias", "decoder.bias"):
        model = StateSpaceStack(1, 2, 2, 1, 1)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match=r"NaN|nan"):
            lipschitz(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_a_capped_matrix_is_within_its_limit(dtype: torch.dtype, scale: float) -> None:
    for shape in ((1, 1), (3, 5), (8, 2)):
        layer = CappedLinear(*shape, limit=2.5).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(scale * torch.outer(torch.randn(shape[1]), torch.randn(shape[0])))
        assert lipschitz(layer).upper <= 2.5
        if scale == 1e6:
            assert lipschitz(layer).upper > 2.49  # rank one: Gram iteration is exact
        if scale == 1e-6:
            expected = 2.5 * layer.weight.double()
            torch.testing.assert_close(layer.matrix().double(), expected, rtol=1e-4, atol=0)
    exact = operator_norm(layer.double().matrix().detach(), "linf")
    assert exact <= lipschitz(layer, "linf").upper == pytest.approx(exact)


def test_a_gated_linear_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="activation must be one of relu"):
        StateSpaceBlock(4, 4, activation="glu")


@pytest.mark.slow
def test_digits_as_sequences_of_rows_are_learned_within_the_gain_at_every_step() -> None:
    from tests.benchmarks.sequences import digit_sequences

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    data = digit_sequences("rows")
    model = StateSpaceStack(8, 32, 32, layers=2, d_out=10, gain=64.0, step=0.9, radius=(0.3, 0.95))
    opt = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(12):
        for batch in torch.randperm(len(data.x)).split(128):
            opt.zero_grad()
            F.cross_entropy(model(data.x[batch])[:, -1], data.y[batch]).backward()
            opt.step()
            assert lipschitz(model).upper <= 64.0
    with torch.no_grad():
        accuracy = (model(data.x_test)[:, -1].argmax(1) == data.y_test).double().mean()
    assert float(accuracy) >= 0.9
