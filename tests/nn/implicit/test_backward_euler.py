"""Laws of backward Euler along any field: every iterate is nonexpansive in the norm of the field's limit."""

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
    BackwardEulerBlock,
    DissipativeField,
    ForwardBackward,
    GradientField,
    InfNormField,
    ProximalBlock,
    lipschitz,
    uniform_bound,
)
from stableopt.nn.residual import field_bound
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm

EPS = torch.finfo(torch.float64).eps
FIELDS = {
    "gradient": lambda n: GradientField(n, 3, strong=0.3, activation="tanh"),
    "dissipative": lambda n: DissipativeField(n, 3, rate=0.2),
    "infinity": lambda n: InfNormField(n),
}


@settings(max_examples=15)
@given(
    kind=st.sampled_from(sorted(FIELDS)), dim=st.integers(1, 4), log_scale=st.integers(-4, 4), raw=st.floats(-50, 1e7),
    iterations=st.integers(1, 6), relaxation=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_iterate_is_nonexpansive_whatever_the_parameters(
    kind: str, dim: int, log_scale: int, raw: float, iterations: int, relaxation: float, seed: int
) -> None:
    torch.manual_seed(seed)
    field = FIELDS[kind](dim)
    block = BackwardEulerBlock(field, iterations=iterations, relaxation=relaxation)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(10.0**log_scale * torch.randn_like(parameter))
        block.raw_step.fill_(raw)
    bound, uniform = lipschitz(block, field.norm), uniform_bound(block, field.norm)
    assert uniform is not None
    assert bound.proved
    assert bound.upper <= uniform.upper == 1.0
    J = jacobian(block, torch.randn(1, dim))
    assert operator_norm(J, field.norm) <= bound.upper + 1e3 * EPS
    for norm in ("l2", "linf", "l1"):
        assert operator_norm(J, norm) <= lipschitz(block, norm).upper * (1 + 1e3 * EPS)


def test_the_constant_falls_to_that_of_the_solution() -> None:
    field = GradientField(3, strong=0.5)
    nn.init.constant_(field.bias, -1e3)  # all units off: f = -0.5 x
    uppers = [lipschitz(BackwardEulerBlock(field, step=2.0, iterations=k)).upper for k in (1, 5, 200)]
    assert uppers[0] > uppers[1] > uppers[2] == pytest.approx(0.5, rel=1e-9)
    for k, upper in zip((1, 5, 200), uppers, strict=True):
        J = jacobian(BackwardEulerBlock(field, step=2.0, iterations=k), torch.zeros(1, 3))
        assert operator_norm(J, "l2") == pytest.approx(upper, rel=1e-9)  # attained by every iterate


def test_it_solves_the_equation_and_agrees_with_the_proximal_map() -> None:
    field = GradientField(4, 6, strong=0.2, activation="softplus")
    block = BackwardEulerBlock(field, step=3.0, iterations=300)
    proximal = ProximalBlock(4, 6, strong=0.2, activation="softplus", step=3.0, solver=ForwardBackward(300))
    with torch.no_grad():
        proximal.weight.copy_(field.weight)
        proximal.bias.copy_(field.bias)
    x = torch.randn(5, 4)
    y = block(x)
    torch.testing.assert_close(y, x + 3.0 * field(y))
    torch.testing.assert_close(y, proximal(x))
    assert block.solution_error(x).upper <= 1e-12
    short = BackwardEulerBlock(field, step=3.0, iterations=3)
    error = float((short(x) - y).detach().norm(dim=-1).max())
    assert error <= short.solution_error(x).upper <= 10 * error
    assert not short.solution_error(x).proved
    assert block.solution_error(torch.zeros(0, 4)).upper == 0.0


def test_a_rotation_contracts_where_the_explicit_step_expands() -> None:
    field = DissipativeField(2, 1, rate=0.1, free=0.0)
    with torch.no_grad():
        field.weight.zero_()
        field.skew.copy_(torch.tensor([[0.0, 5.0], [0.0, 0.0]]))
    explicit = torch.eye(2) + 1.0 * jacobian(field, torch.zeros(1, 2))
    assert operator_norm(explicit, "l2") > 5.0
    for iterations in (1, 10, 100):
        block = BackwardEulerBlock(field, step=1.0, iterations=iterations)
        assert operator_norm(jacobian(block, torch.zeros(1, 2)), "l2") <= lipschitz(block).upper <= 1.0


@pytest.mark.parametrize(("over", "expands"), [(1.0, False), (1.01, True)])
def test_a_splitting_step_past_the_limit_of_the_field_expands(over: float, expands: bool) -> None:
    field = GradientField(4, 6)
    nn.init.constant_(field.bias, 1e3)
    block = BackwardEulerBlock(field, step=1e6, iterations=1)
    tau = torch.tensor(over * field_bound(field, "l2").max_step)
    block.splitting = lambda: (tau, 1e6 / (1e6 + tau), tau / (1e6 + tau))
    assert (operator_norm(jacobian(block, torch.zeros(1, 4)), "l2") > 1 + 1e-3) is expands


@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_copies_and_state_round_trips_keep_the_map(kind: str) -> None:
    block, fresh = BackwardEulerBlock(FIELDS[kind](4), iterations=2), BackwardEulerBlock(FIELDS[kind](4), iterations=2)
    x = torch.randn(3, 4)
    fresh.load_state_dict(block.state_dict())
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh, torch.func.vmap(block)]
    for other in copies:
        torch.testing.assert_close(other(x), block(x))
    assert worst_ratio(block, (4,), block.field.norm, steps=3) <= lipschitz(block, block.field.norm).upper
    if kind != "infinity":
        assert lipschitz(block, "token_max").upper == lipschitz(block).upper
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(block).to(dtype)
        assert cast(x.to(dtype)).dtype == dtype
        assert lipschitz(cast, block.field.norm).upper <= 1.0
    assert block.to("meta")(x.to("meta")).shape == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_compilation_and_export_keep_the_map(kind: str) -> None:
    block, x = BackwardEulerBlock(FIELDS[kind](4), iterations=2), torch.randn(3, 4)
    for other in (torch.compile(block, backend="eager", fullgraph=True), torch.export.export(block, (x,)).module()):
        torch.testing.assert_close(other(x), block(x))


def test_a_changed_field_and_nan_are_refused() -> None:
    class Other(GradientField):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    block = BackwardEulerBlock(Other(3))
    for question in (lipschitz, uniform_bound):
        with pytest.raises(UncertifiableError, match="overrides forward"):
            question(block)
    for name, _ in BackwardEulerBlock(GradientField(3)).named_parameters():
        block = BackwardEulerBlock(GradientField(3))
        with torch.no_grad():
            block.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            lipschitz(block)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"field": nn.Linear(2, 2)}, TypeError, "must be a Field, which knows its step limit, got Linear"),
        ({"iterations": 0}, ValueError, "iterations must be an integer"),
        ({"depth": 0}, ValueError, "depth must be an integer"),
        ({"relaxation": 0.0}, ValueError, r"relaxation is a share of the limit and must lie in \(0, 1\], got 0.0"),
        ({"relaxation": 1.5}, ValueError, "relaxation is a share"),
        ({"step": -1.0}, ValueError, "step must lie in"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BackwardEulerBlock(**{"field": GradientField(2), **arguments})  # type: ignore[arg-type]


def test_the_initial_step_fits_the_depth() -> None:
    for depth, step in ((1, 1.0), (16, 0.125)):
        assert BackwardEulerBlock(GradientField(3), depth=depth).step_size().item() == pytest.approx(step)
