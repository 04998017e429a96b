"""Laws of the SDP-based Lipschitz layer."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stableopt.nn.residual.sll as slope
from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz
from stableopt.nn.positive import bounded_exp
from stableopt.nn.residual.sll import SLL, FoldedSLL

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "softplus", "hardtanh")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def drawn(dim: int = 6, hidden: int = 9, activation: str = "relu", scale: float = 1.0) -> SLL:
    """A layer with random parameters."""
    layer = SLL(dim, hidden, activation=activation)
    with torch.no_grad():
        layer.weight.normal_(std=scale)
        layer.bias.normal_()
        layer.raw_q.normal_()
    return layer


def all_on(layer: nn.Module) -> Tensor:
    """The Jacobian with the slope 1 in every unit: of a relu layer with a large bias."""
    assert isinstance(layer, SLL)
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        layer.bias.fill_(1e3)
    return torch.autograd.functional.jacobian(layer, torch.zeros(layer.weight.shape[1]))


# The limit.


@given(
    dtype=st.sampled_from(DTYPES),
    dim=st.integers(1, 12),
    hidden=st.integers(1, 12),
    exponent=st.integers(-12, 12),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    family=st.sampled_from(["random", "zero", "one row", "equal rows", "orthonormal"]),
)
def test_the_stored_numbers_are_proved_not_to_expand(
    dtype: torch.dtype, dim: int, hidden: int, exponent: int, spread: float, family: str
) -> None:
    layer = SLL(dim, hidden)
    with torch.no_grad():
        if family != "orthonormal":
            layer.weight.normal_()
        layer.raw_q.normal_(std=spread)
        if family == "zero":
            layer.weight.zero_()
        elif family == "one row":
            layer.weight[1:] = 0.0
        elif family == "equal rows":
            layer.weight.copy_(layer.weight[:1].expand(hidden, dim))
        layer.weight.mul_(2.0**exponent)
    layer = layer.to(dtype)
    assert lipschitz(layer).upper == 1.0
    assert lipschitz(layer.folded()).upper == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1499.0, 700.0, 60000.0, 90.0])
def test_the_step_is_rounded_down_where_it_is_subnormal_too(dtype: torch.dtype, size: float) -> None:
    layer = SLL(25, 1)
    nn.init.constant_(layer.weight, size)
    layer = layer.to(dtype)
    assert lipschitz(layer).upper == 1.0
    exact = 2.0 / float((layer.weight.detach().double() ** 2).sum())
    step = float(layer.step_sizes().detach())
    assert (
        exact * (1 - 64 * torch.finfo(dtype).eps) - 3 * torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        <= step
        <= exact
    )


@pytest.mark.parametrize("exponent", [-40, -30, -20, 10, 20, 30])
def test_float32_weights_of_every_scale_give_finite_outputs_and_gradients(exponent: int) -> None:
    layer = drawn(6, 9).float()
    with torch.no_grad():
        layer.weight[2] = 0.0
        layer.weight.mul_(10.0**exponent)
    x = torch.randn(3, 6, dtype=torch.float32)
    y = layer(x)
    assert y.isfinite().all()
    assert lipschitz(layer).upper == 1.0
    if exponent < 15:  # the derivative by the step overflows
        y.sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


@every_activation
def test_the_bound_holds_for_jacobians_and_for_pairs(activation: str) -> None:
    for _ in range(20):
        layer = drawn(5, 8, activation, scale=10.0 ** float(torch.empty(()).uniform_(-2.0, 1.0)))
        bound = lipschitz(layer).upper
        x = 3.0 * torch.randn(5)
        J = torch.autograd.functional.jacobian(layer, x)
        assert float(torch.linalg.matrix_norm(J, 2)) <= bound * (1.0 + 1e-12)
        y = x + torch.randn(5) * 10.0 ** float(torch.empty(()).uniform_(-3.0, 2.0))
        assert float((layer(x) - layer(y)).detach().norm()) <= bound * float((x - y).norm()) * (1.0 + 1e-12)


@every_activation
def test_the_jacobian_of_the_worst_slopes_is_within_the_limit(activation: str) -> None:
    """Symmetric, with a spectrum in [-1, 1]: the bound is about every pattern of slopes."""
    layer = drawn(5, 8, activation)
    with torch.no_grad():
        W, s = layer.weight, layer.step_sizes()
        for _ in range(50):
            D = (torch.rand(8) < 0.5).double()
            J = torch.eye(5) - W.mT @ torch.diag(s * D) @ W
            values = torch.linalg.eigvalsh(J)
            assert float(values.min()) >= -1.0
            assert float(values.max()) <= 1.0 + 1e-14


def test_the_limit_is_attained_and_a_longer_step_expands() -> None:
    """Orthogonal rows: W' T^-1 W is a projector, so all units on give the eigenvalue -1."""
    layer = SLL(4, 3)
    J = all_on(layer)
    assert float(torch.linalg.eigvalsh(J).min()) == pytest.approx(-1.0, abs=1e-10)
    folded = layer.folded()
    folded.step.mul_(1.0 + 1e-6)
    assert 1.0 < lipschitz(folded).upper < 1.0 + 1e-5
    W = folded.weight
    past = torch.eye(4) - W.mT @ torch.diag(folded.step) @ W
    assert 1.0 < float(torch.linalg.matrix_norm(past, 2)) <= lipschitz(folded).upper


def test_the_rule_is_tight_for_a_step_beyond_the_limit() -> None:
    folded = FoldedSLL(torch.randn(5, 4), torch.zeros(5), torch.rand(5), "relu")
    W, s = folded.weight, folded.step
    exact = float(torch.linalg.matrix_norm(W.mT @ torch.diag(s) @ W, 2)) - 1.0
    assert exact > 1.0
    assert exact <= lipschitz(folded).upper * (1.0 + 1e-14)
    assert lipschitz(folded).upper == pytest.approx(exact, rel=1e-10)


def test_the_step_is_the_inverse_of_the_scaled_row_sums() -> None:
    layer = drawn()
    W, q = layer.weight.detach().numpy(), bounded_exp(layer.raw_q.detach()).numpy()
    T = [sum(abs(W[i] @ W[j]) * q[j] / q[i] for j in range(9)) for i in range(9)]
    np.testing.assert_allclose(layer.step_sizes().detach().numpy(), 2.0 / np.array(T), rtol=1e-9)
    assert bool((layer.step_sizes().detach().numpy() <= 2.0 / np.array(T)).all())


def test_the_scales_q_matter() -> None:
    """A known defect elsewhere: q that cancels, with gradients that are zero."""
    layer = drawn()
    before = layer.step_sizes().detach()
    layer.step_sizes().sum().backward()
    assert layer.raw_q.grad is not None
    assert float(layer.raw_q.grad.abs().min()) > 1e-4
    with torch.no_grad():
        layer.raw_q[0] += 1.0
    assert float(((layer.step_sizes().detach() - before) / before).abs().min()) > 1e-4


def test_q_is_bounded_and_positive() -> None:
    values = bounded_exp(torch.tensor([-1e30, 0.0, 0.1, 1e30]))
    torch.testing.assert_close(
        values, torch.tensor([math.exp(-15.0), 1.0, math.exp(0.1), math.exp(15.0)]), rtol=1e-5, atol=0.0
    )


@every_activation
def test_the_map_is_the_formula(activation: str) -> None:
    layer = drawn(4, 3, activation)
    x = torch.randn(7, 4)
    act = {
        "relu": torch.relu, "leaky_relu": nn.functional.leaky_relu, "tanh": torch.tanh, "softplus": nn.functional.softplus,
        "hardtanh": nn.functional.hardtanh,
    }[activation]  # fmt: skip
    W, b, s = layer.weight, layer.bias, layer.step_sizes()
    expected = torch.stack([v - W.mT @ (s * act(W @ v + b)) for v in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-6 if activation == "softplus" else 1e-12, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_the_bounds_in_other_norms_hold(norm: str) -> None:
    layer = drawn(5, 7, scale=0.4)
    folded = layer.folded()
    order = math.inf if norm == "linf" else 1
    bound = slope._bound(folded.weight, folded.bias, folded.step, norm).upper
    for _ in range(30):
        J = torch.autograd.functional.jacobian(layer, 3.0 * torch.randn(5))
        assert float(torch.linalg.matrix_norm(J, order)) <= bound


# Derivatives.


def test_every_parameter_gets_a_gradient() -> None:
    layer = drawn()
    layer(torch.randn(20, 6)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().min()) > 0.0


def test_the_derivative_is_right() -> None:
    layer = drawn(3, 4, "tanh")
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (torch.randn(2, 3), *(p.detach().clone() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, tuple(i.requires_grad_() for i in inputs))


@every_dtype
def test_a_weight_of_zeros_has_finite_steps_and_gradients(dtype: torch.dtype) -> None:
    layer = SLL(4, 5).to(dtype)
    nn.init.zeros_(layer.weight)
    x = torch.randn(3, 4).to(dtype)
    y = layer(x)
    assert y.equal(x)
    y.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


# The ecosystem.


@every_dtype
def test_the_folded_layer_computes_the_same_bits(dtype: torch.dtype) -> None:
    layer = drawn().to(dtype)
    x = torch.randn(8, 6).to(dtype)
    folded = layer.folded()
    assert folded(x).equal(layer(x))
    assert sorted(folded.state_dict()) == ["bias", "step", "weight"]
    with torch.no_grad():
        layer.weight.zero_()
    assert bool(folded.weight.any())  # a copy


def test_training_evaluation_copies_and_functional_calls_agree() -> None:
    layer, other = drawn(), SLL(6, 9)
    x = torch.randn(5, 6)
    y = layer(x)
    other.load_state_dict(layer.state_dict())
    for twin in (
        copy.deepcopy(layer),
        other.eval(),
        layer.eval(),
        torch.compile(layer, fullgraph=True, backend="eager"),
    ):
        torch.testing.assert_close(twin(x), y, rtol=0.0, atol=0.0)
    state = {k: v * 2.0 for k, v in layer.state_dict().items()}
    other.load_state_dict(state)
    assert torch.func.functional_call(layer, state, (x,)).equal(other(x))


def test_meta_device_then_empty_then_any_numbers_is_within_the_limit() -> None:
    with torch.device("meta"):
        layer = SLL(4, 6)
        assert layer(torch.empty(2, 4)).shape == (2, 4)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert lipschitz(layer).upper == 1.0


def test_autocast_does_not_lower_the_precision_of_the_step() -> None:
    layer = drawn().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = layer.step_sizes()
        assert layer(torch.randn(2, 6, dtype=torch.float32)).isfinite().all()
    assert steps.equal(layer.step_sizes())


def test_a_chain_is_bounded_by_its_layers() -> None:
    model = nn.Sequential(drawn(), drawn().folded(), nn.Linear(6, 1))
    assert lipschitz(model).upper == pytest.approx(
        float(torch.linalg.matrix_norm(model[2].weight.detach(), 2)), rel=1e-9
    )


# Bad input.


def test_bad_arguments_are_refused() -> None:
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            SLL(size)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="hidden must be an integer >= 1"):
            SLL(3, size)  # pyright: ignore[reportArgumentType]
    for activation in ("gelu", "abs"):
        with pytest.raises(ValueError, match="activation"):
            SLL(3, activation=activation)
    with pytest.raises(ValueError, match="activation"):
        FoldedSLL(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1), "silu")


@pytest.mark.parametrize("name", ["weight", "bias", "raw_q"])
def test_nothing_is_proved_about_nan(name: str) -> None:
    layer = drawn()
    with torch.no_grad():
        layer.get_parameter(name)[0] = math.nan
    for module in (layer, layer.folded()):
        with pytest.raises(ValueError, match=r"NaN"):
            lipschitz(module)


def test_a_negative_step_has_no_bound() -> None:
    folded = drawn().folded()
    folded.step[0] = -1.0
    with pytest.raises(ValueError, match="negative step"):
        lipschitz(folded)


def test_a_subclass_with_another_forward_has_no_rule() -> None:
    class Doubled(SLL):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2.0 * super().forward(input)

    with pytest.raises(UncertifiableError, match="overrides forward"):
        lipschitz(Doubled(2))
