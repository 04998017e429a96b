"""Laws of the Runge-Kutta block: within its limit no method expands, methods without a limit are refused, more steps are exact."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import stableopt.theory as th
from stableopt.errors import UncertifiableError
from stableopt.nn import (
    ContinuousDepth,
    DissipativeField,
    GradientBlock,
    GradientField,
    InfNormField,
    RungeKuttaBlock,
    field_bound,
    lipschitz,
    uniform_bound,
)
from stableopt.nn.residual.runge_kutta import RUNGE_KUTTA, runge_kutta_step, step_bound
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm

SAFE = ["euler", "heun", "ralston", "kutta3", "ssprk33", "ssprk43", "ssprk104", "rk4", "rk4_38"]
REFUSED = ["midpoint", "heun3", "dopri5"]
EPS = torch.finfo(torch.float64).eps


def full(block: RungeKuttaBlock) -> RungeKuttaBlock:
    """The block at its limit, with random biases."""
    with torch.no_grad():
        block.raw_step.fill_(60.0)
        for name, p in block.field.named_parameters():
            p.add_((1.0 if "bias" in name else 0.2) * torch.randn_like(p))
    return block


@pytest.mark.parametrize("method", SAFE)
def test_at_its_limit_no_method_expands(method: str) -> None:
    block = full(RungeKuttaBlock(GradientField(3, 6), method=method))
    bound = lipschitz(block)
    assert bound.proved
    assert bound.upper <= 1.0
    for scale in (0.3, 3.0):
        assert operator_norm(jacobian(block, scale * torch.randn(1, 3)), "l2") <= 1.0 + 100 * EPS
    assert worst_ratio(block, (3,), starts=8, steps=5) <= 1.0
    limit = th.runge_kutta_max_step(RUNGE_KUTTA[method], field_bound(block.field, "l2").lipschitz.upper)
    assert 0.9 * limit <= float(block.step_size().detach()) <= limit


@pytest.mark.parametrize("method", REFUSED)
def test_methods_without_a_radius_are_refused(method: str) -> None:
    """The sentence names one that works; that they expand is a law of the theory."""
    with pytest.raises(ValueError, match=r"circle contractivity radius 0: .* Use method='euler' with substeps=\d"):
        RungeKuttaBlock(GradientField(3), method=method)


def test_implicit_and_unknown_methods_and_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="backward Euler is implicit"):
        RungeKuttaBlock(GradientField(2), method=th.BACKWARD_EULER)
    with pytest.raises(ValueError, match="method must be one of euler"):
        RungeKuttaBlock(GradientField(2), method="leapfrog")
    with pytest.raises(TypeError, match="name or a ButcherTableau"):
        RungeKuttaBlock(GradientField(2), method=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a Field, which knows its step limit, got Linear"):
        RungeKuttaBlock(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="substeps must be"):
        RungeKuttaBlock(GradientField(2), substeps=0)
    with pytest.raises(ValueError, match=r"RK4 has radius of absolute monotonicity 0: .* in linf .* substeps=4"):
        RungeKuttaBlock(InfNormField(2), method="rk4")


def test_one_euler_step_is_the_gradient_block() -> None:
    plain, block = GradientBlock(4, 5), RungeKuttaBlock(GradientField(4, 5), substeps=1)
    with torch.no_grad():
        block.field.weight.copy_(plain.weight)
    x = torch.randn(3, 4)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)  # but for the slack of the step


@pytest.mark.parametrize("method", [*SAFE, *REFUSED])
def test_a_step_is_that_of_the_tableau(method: str) -> None:
    """On a linear field a step is a polynomial: sum of b^T A^(k-1) e z^k."""
    tableau, tau = RUNGE_KUTTA[method], 0.3
    J = torch.randn(3, 3)
    A = torch.tensor([[float(a) for a in row] for row in tableau.A])
    b, e = torch.tensor([float(x) for x in tableau.b]), torch.ones(tableau.stages)
    expected, power = torch.eye(3), torch.eye(3)
    for k in range(1, tableau.stages + 1):
        power = power @ (tau * J)
        expected = expected + float(b @ torch.linalg.matrix_power(A, k - 1) @ e) * power
    found = runge_kutta_step(lambda x: x @ J.mT, torch.eye(3), torch.tensor(tau), tableau)  # type: ignore[arg-type]
    torch.testing.assert_close(found.mT, expected)


def test_sub_steps_of_euler_lengthen_the_limit_and_keep_the_rate() -> None:
    field = GradientField(3, strong=0.2)
    limits = []
    for k in (1, 2, 8):
        block = RungeKuttaBlock(field, substeps=k, step=0.5)
        tau = float(block.step_size().detach())
        limits.append(k * tau)
        assert lipschitz(block).upper == pytest.approx((1 - 0.2 * tau) ** k, rel=1e-9)
    assert limits == pytest.approx([limits[0], 2 * limits[0], 8 * limits[0]])
    assert "limit 2r/L = 8/L" in repr(RungeKuttaBlock(field))
    assert RungeKuttaBlock(field).substeps == 4
    assert RungeKuttaBlock(field, method="rk4").substeps == 1


@pytest.mark.parametrize("method", ["heun", "ssprk33", "ralston"])
def test_convex_combinations_of_euler_steps_contract(method: str) -> None:
    block = RungeKuttaBlock(DissipativeField(3, rate=0.5), method=method, step=0.4)
    bound = lipschitz(block).upper
    tau = float(block.step_size().detach())
    assert math.exp(-0.7 * tau) * 0.9 <= bound < 1.0
    assert operator_norm(jacobian(block, torch.randn(1, 3)), "l2") <= bound
    infinite = RungeKuttaBlock(InfNormField(3, rate=0.5), method=method, step=0.4)
    assert lipschitz(infinite, "linf").upper < 1.0
    assert operator_norm(jacobian(infinite, torch.randn(1, 3)), "linf") <= lipschitz(infinite, "linf").upper
    whole = uniform_bound(infinite, "linf")
    assert whole is not None
    assert whole.upper == 1.0
    assert uniform_bound(infinite, "l2") is None


@pytest.mark.parametrize("method", ["euler", "kutta3", "rk4", "dopri5"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_beyond_every_limit_the_bound_is_the_recursion_of_the_constant(method: str, norm: str) -> None:
    field = full(RungeKuttaBlock(GradientField(3, 4))).field
    bound, tableau = field_bound(field, norm), RUNGE_KUTTA[method]
    for tau in (0.7, 5.0):
        upper = step_bound(tableau, bound, tau).upper
        J = jacobian(lambda x, t=tau: runge_kutta_step(field, x, torch.tensor(t), tableau), torch.randn(1, 3))  # type: ignore[arg-type]
        assert operator_norm(J, norm) <= upper
    if method == "rk4":
        z = 5.0 * bound.lipschitz.upper
        assert upper == pytest.approx(1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24, rel=1e-9)
    assert step_bound(tableau, bound, 0.0).upper == 1.0


def test_nothing_is_promised_for_a_field_that_was_put_in_later() -> None:
    block = RungeKuttaBlock(GradientField(3), method="rk4")
    assert uniform_bound(block) is not None
    block.field = InfNormField(3)
    assert uniform_bound(block, "linf") is None
    flow = ContinuousDepth(GradientField(3), steps=4)
    assert uniform_bound(flow) is not None
    flow.fields[0] = InfNormField(3)
    assert uniform_bound(flow) is None


def test_copies_casts_and_gradients() -> None:
    block = RungeKuttaBlock(GradientField(3, 4, activation="tanh", strong=0.1), method="rk4", step=0.3)
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(x), block(x))
    torch.testing.assert_close(torch.func.vmap(block)(x), block(x))
    half = copy.deepcopy(block).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert lipschitz(half).upper <= 1.0
    parameters = dict(block.named_parameters())

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))
    assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == (2, 3)


@pytest.mark.slow
def test_compilation_and_export_keep_the_map() -> None:
    block, x = RungeKuttaBlock(GradientField(3), method="ssprk33"), torch.randn(2, 3)
    exported = torch.export.export(block, (x,)).module()
    for other in (torch.compile(block, backend="eager", fullgraph=True), exported):
        torch.testing.assert_close(other(x), block(x))


def test_nan_and_changed_fields_have_no_bound() -> None:
    class Twice(GradientField):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2 * super().forward(input)

    block = RungeKuttaBlock(Twice(3))
    for question in (lipschitz, uniform_bound):
        with pytest.raises(UncertifiableError, match="overrides forward of GradientField"):
            question(block)
    block = RungeKuttaBlock(GradientField(3))
    nn.init.constant_(block.raw_step, math.nan)
    with pytest.raises(ValueError, match="NaN"):
        lipschitz(block)
    assert lipschitz(RungeKuttaBlock(GradientField(3)), "token_max").upper == 1.0
