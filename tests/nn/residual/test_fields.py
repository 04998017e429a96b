"""Laws of fields with a proved step limit: the numbers of T3e, and what a class of one's own owes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stableopt.theory as th
from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn import DissipativeField, Field, GradientField, InfNormField, damped_bound, field_bound, lipschitz
from stableopt.nn.residual.fields import field_norm
from tests.nn.catalogue import jacobian, operator_norm

EPS = torch.finfo(torch.float64).eps
FIELDS = [
    lambda: GradientField(4, 6),
    lambda: GradientField(4, strong=0.3, activation="tanh"),
    lambda: DissipativeField(4, 5, rate=0.2, free=0.7),
    lambda: DissipativeField(4, rate=0.2, free=0.0, activation="softplus"),
    lambda: InfNormField(4, rate=0.3),
    lambda: InfNormField(4, decay=2.0),
]


def moved(field: Field, scale: float) -> Field:
    """The field with other parameters."""
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return field


def log_norm(J: torch.Tensor, norm: str) -> float:
    if norm == "l2":
        return float(torch.linalg.eigvalsh((J + J.mT) / 2)[-1])
    J = J if norm == "linf" else J.mT
    return float((J.abs().sum(1) - J.diagonal().abs() + J.diagonal()).max())


@settings(max_examples=40)
@given(st.sampled_from(range(len(FIELDS))), st.floats(0, 2), st.integers(0, 30), st.sampled_from(["l2", "linf", "l1"]))
def test_rate_constant_and_step_law_hold_for_every_derivative(which: int, scale: float, seed: int, norm: str) -> None:
    torch.manual_seed(seed)
    field = moved(FIELDS[which](), scale)
    bound = field_bound(field, norm)
    assert bound.norm == norm
    J = jacobian(field, 2 * torch.randn(1, 4))
    size = operator_norm(J, norm)
    assert log_norm(J, norm) <= -bound.rate.lower + 1e3 * EPS * (1 + size)
    assert size <= bound.lipschitz.upper * (1 + 1e3 * EPS)
    for at in (0.3, 1.0, 1.7):
        tau = at * (bound.max_step if 0 < bound.max_step < math.inf else 0.3)
        spread = operator_norm(torch.eye(4) + tau * J, norm)
        assert spread <= bound.factor(tau).upper + 1e4 * EPS * (1 + tau * size)
    if 0 < bound.max_step < math.inf:
        assert bound.factor(bound.max_step).upper <= 1.0
    assert lipschitz(field, norm).upper == bound.lipschitz.upper
    assert bound.factor(0.0).upper == 1.0


@pytest.mark.parametrize("make", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_step_limit_of_training_is_below_the_proved_one_and_near_to_it(make: object, dtype: torch.dtype) -> None:
    for _ in range(5):
        field = moved(make(), 0.5).to(dtype)  # type: ignore[operator]
        limit, proved = field.step_limit(), field_bound(field, field.norm).max_step
        assert limit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert 0.85 * proved <= float(limit.detach()) <= proved


@settings(max_examples=50)
@given(st.floats(0.01, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 1.5))
def test_the_damped_bound_is_that_of_the_theory(
    m: float, rest: float, curvature: float, skew: float, at: float
) -> None:
    parts = [Bound.point(x) for x in (m + rest, rest, curvature, skew)]
    bound = damped_bound("l2", parts[0], parts[1], curvature=parts[2], skew=parts[3])
    gamma, rho = m + rest + curvature / 2, rest + curvature / 2
    assert bound.max_step == pytest.approx(th.skew_damped_max_step(gamma, skew, rho), rel=1e-6)
    tau = at * bound.max_step
    if tau > 0:
        assert bound.factor(tau).upper == pytest.approx(th.skew_damped_factor(tau, gamma, skew, rho), rel=1e-9)
    assert bound.rate.lower == pytest.approx(m, abs=1e-12)
    L = math.hypot(gamma, skew) + rho
    assert bound.lipschitz.upper == pytest.approx(L)
    assert bound.factor(tau).upper <= th.dissipative_factor(tau, m, L * (1 + 1e-9)) + 1e-9  # what m and L alone allow
    assert bound.max_step >= th.dissipative_max_step(m, L * (1 + 1e-9)) * (1 - 1e-9)


def test_without_a_rate_a_rotation_has_no_limit_and_a_constant_field_has_no_need_of_one() -> None:
    zero, one = Bound.point(0.0), Bound.point(1.0)
    assert damped_bound("l2", zero, skew=one).max_step == 0.0
    assert damped_bound("l2", one, Bound.point(2.0)).max_step == 0.0
    assert damped_bound("l2", zero).max_step == math.inf
    assert damped_bound("l2", one, one).max_step == 1.0  # h - t(h - g(h)): averaged up to t = 1
    assert damped_bound("l2", Bound.point(math.inf)).max_step == 0.0


def test_a_field_of_ones_own_says_what_it_owes() -> None:
    class Half(Field):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return -0.5 * input

    with pytest.raises(NotImplementedError, match="Half must define step_limit"):
        Half().step_limit()
    with pytest.raises(NotImplementedError, match="Half must define bound"):
        Half().bound("l2")


def test_a_changed_map_and_numbers_that_are_not_finite_have_no_bound() -> None:
    class Twice(GradientField):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2 * super().forward(input)

    with pytest.raises(UncertifiableError, match="overrides forward of GradientField"):
        field_bound(Twice(3), "l2")
    field = GradientField(3)
    handle = field.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UncertifiableError, match="forward hook"):
        field_bound(field, "l2")
    handle.remove()
    for make in FIELDS:
        for name in dict(make().named_parameters()):
            field = make()
            with torch.no_grad():
                field.get_parameter(name).view(-1)[0] = math.nan
            with pytest.raises(ValueError, match=f"NaN or infinite numbers in {name}"):
                field_bound(field, "l2")


def test_only_fields_that_act_on_each_token_alone_have_a_bound_for_tokens() -> None:
    assert field_norm(InfNormField(3), "token_max") == field_norm(DissipativeField(3), "token_max") == "l2"
    for field in (DissipativeField(3), GradientField(3), InfNormField(3)):
        assert lipschitz(field, "token_max").upper == lipschitz(field).upper
    with pytest.raises(UncertifiableError, match="mixes the entries of different tokens"):
        field_norm(InfNormField(3, 3), "token_max")

    class Own(Field):
        pass

    with pytest.raises(UncertifiableError, match="no token_max"):
        field_norm(Own(), "token_max")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientField(0), "dim must be"),
        (lambda: GradientField(2, 0), "hidden must be"),
        (lambda: GradientField(2, strong=-1.0), "strong must be"),
        (lambda: GradientField(2, activation="gelu"), "slopes down to"),
        (lambda: DissipativeField(2, rate=0.0), "rate must be finite and > 0"),
        (lambda: DissipativeField(2, free=-1.0), "free must be"),
        (lambda: DissipativeField(2, hidden=0), "hidden must be"),
        (lambda: DissipativeField(2, activation="silu"), "slopes down to"),
        (lambda: InfNormField(2, decay=0.0), "decay must be"),
        (lambda: InfNormField(2, rate=1.5), r"rate must lie in \[0, decay\]"),
        (lambda: InfNormField(2, rate=-0.5), "rate must be"),
        (lambda: InfNormField(2, kernel_size=2), "kernel_size must be one to three odd numbers"),
        (lambda: InfNormField(2, kernel_size=(3, 3, 3, 3)), "kernel_size must be"),
        (lambda: InfNormField(2, kernel_size=()), "kernel_size must be"),
        (lambda: InfNormField(2, activation="mish"), "slopes down to"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_zero_weights_leave_finite_steps_and_gradients() -> None:
    for make in FIELDS:
        field = make()
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.zero_()
        limit = field.step_limit()
        assert bool(limit.isfinite())
        assert limit > 0
        (field(torch.randn(2, 4)).sum() + limit).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in field.parameters())
