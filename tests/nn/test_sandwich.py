"""Laws of the sandwich layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import spectral_norm
from stableopt.nn import lipschitz
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.sandwich import FoldedSandwich, Sandwich

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "softplus", "hardtanh")
METHODS = ("cayley", "cholesky", "bjorck")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_method = pytest.mark.parametrize("method", METHODS)


def drawn(n: int = 6, m: int = 5, scale: float = 1.0, **options: object) -> Sandwich:
    """A layer with random parameters."""
    layer = Sandwich(n, m, **options)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        layer.weight.normal_(std=scale)
        layer.raw_psi.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


# The limit.


@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    method=st.sampled_from(METHODS),
    exponent=st.integers(-12, 12),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    radius=st.sampled_from([0.3, 1.0, 7.0]),
)
def test_the_stored_numbers_are_proved_within_the_radius(
    dtype: torch.dtype, n: int, m: int, method: str, exponent: int, spread: float, radius: float
) -> None:
    layer = drawn(n, m, 2.0**exponent, method=method, radius=radius)
    with torch.no_grad():
        layer.raw_psi.normal_(std=spread)
    layer = layer.to(dtype)
    assert lipschitz(layer).upper <= radius
    assert lipschitz(layer.folded()).upper <= radius


@every_activation
@every_method
def test_the_bound_holds_for_jacobians_and_for_pairs(activation: str, method: str) -> None:
    for _ in range(10):
        layer = drawn(4, 6, activation=activation, method=method, radius=2.0)
        bound = lipschitz(layer).upper
        x = 3.0 * torch.randn(4)
        J = torch.autograd.functional.jacobian(layer, x)
        assert float(torch.linalg.matrix_norm(J, 2)) <= bound * (1.0 + 1e-12)
        assert bound <= 2.0
        y = x + torch.randn(4) * 10.0 ** float(torch.empty(()).uniform_(-3.0, 2.0))
        assert float((layer(x) - layer(y)).detach().norm()) <= bound * float((x - y).norm()) * (1.0 + 1e-12)


def test_any_pattern_of_slopes_is_within_the_limit() -> None:
    A, B = (part.detach() for part in drawn(5, 7).frame())
    for _ in range(100):
        J = 2.0 * A.mT @ torch.diag(torch.rand(7).round()) @ B
        assert float(torch.linalg.matrix_norm(J, 2)) <= 1.0


def test_the_limit_is_attained_with_equal_shares_and_all_units_on() -> None:
    """A = B = I / sqrt 2: the layer is the identity, and a frame that is longer expands."""
    layer = Sandwich(3, 3, method="cholesky")
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.eye(3), torch.eye(3)], dim=1))
        layer.bias.fill_(10.0)  # pyright: ignore[reportOptionalMemberAccess]
    J = torch.autograd.functional.jacobian(layer, torch.zeros(3))
    assert 1.0 - 1e-9 < float(torch.linalg.matrix_norm(J, 2)) <= lipschitz(layer).upper <= 1.0
    folded = layer.folded()
    with torch.no_grad():
        folded[0].weight.mul_(1.0 + 1e-6)
    past = float(torch.linalg.matrix_norm((folded[2].weight @ folded[0].weight).detach(), 2))
    assert 1.0 < past <= lipschitz(folded).upper < 1.0 + 1e-5


def test_the_product_of_two_norms_would_not_prove_it() -> None:
    """Why the folded layer has a rule of its own."""
    folded = drawn(9, 4).folded()
    product = spectral_norm(folded[0].weight) * spectral_norm(folded[2].weight)
    assert lipschitz(folded).upper <= 1.0 < 1.1 < product.lower


def test_the_frame_has_orthonormal_rows() -> None:
    A, B = drawn(6, 4, radius=4.0).frame()
    torch.testing.assert_close(A @ A.mT + B @ B.mT, 4.0 * torch.eye(4), rtol=0.0, atol=1e-9)


@every_dtype
def test_the_products_of_the_scales_are_at_most_two(dtype: torch.dtype) -> None:
    layer = Sandwich(2, 200).to(dtype)
    with torch.no_grad():
        layer.raw_psi.copy_(torch.linspace(-100.0, 100.0, 200))
        outer, inner = (part.double() for part in layer.scales())
    assert bool((outer * inner <= 2.0).all())
    assert bool((outer > 0).all())
    assert bool((inner > 0).all())
    assert float((outer * inner).min()) > 2.0 - 32.0 * torch.finfo(dtype).eps
    assert bool(outer.isfinite().all())
    assert float(outer.max()) > 100.0


@every_activation
def test_the_map_is_the_formula(activation: str) -> None:
    layer = drawn(4, 3, activation=activation)
    act = {
        "relu": torch.relu, "leaky_relu": nn.functional.leaky_relu, "tanh": torch.tanh, "softplus": nn.functional.softplus,
        "hardtanh": nn.functional.hardtanh,
    }[activation]  # fmt: skip
    A, B = layer.frame()
    psi = (15.0 * torch.tanh(layer.raw_psi / 15.0)).exp()
    x = torch.randn(7, 4)
    expected = torch.stack([2**0.5 * A.mT @ (psi * act(2**0.5 / psi * (B @ v) + layer.bias)) for v in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_the_bounds_in_other_norms_hold(norm: str) -> None:
    layer = drawn(5, 7)
    order = math.inf if norm == "linf" else 1
    for module in (layer, layer.folded()):
        bound = lipschitz_rule(module, norm).upper
        for _ in range(20):
            J = torch.autograd.functional.jacobian(module, 3.0 * torch.randn(5))
            assert float(torch.linalg.matrix_norm(J, order)) <= bound


# Derivatives.


@every_method
def test_every_parameter_gets_a_gradient(method: str) -> None:
    layer = drawn(method=method, activation="tanh")
    layer(torch.randn(20, 6)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 1e-3


@every_method
def test_the_derivative_is_right(method: str) -> None:
    layer = Sandwich(2, 2, activation="tanh", method=method)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (torch.randn(2, 2), *(p.detach() + 0.1 * torch.randn_like(p) for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, tuple(i.requires_grad_() for i in inputs), atol=1e-6)


@every_dtype
@every_method
def test_an_original_of_zeros_is_finite(dtype: torch.dtype, method: str) -> None:
    layer = Sandwich(4, 3, method=method).to(dtype)
    nn.init.zeros_(layer.weight)
    layer(torch.randn(3, 4).to(dtype)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert lipschitz(layer).upper <= 1.0


# The ecosystem.


@every_dtype
@every_activation
@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_layer_is_plain_and_computes_the_same(dtype: torch.dtype, activation: str, bias: bool) -> None:
    layer = drawn(bias=bias, activation=activation).to(dtype)
    folded = layer.folded()
    x = torch.randn(8, 6).to(dtype)
    assert isinstance(folded, FoldedSandwich)
    assert list(folded.state_dict()) == (["0.weight", "0.bias", "2.weight"] if bias else ["0.weight", "2.weight"])
    assert type(folded[0]) is nn.Linear
    assert type(folded[2]) is nn.Linear
    assert folded[0].weight.dtype == dtype
    scale = float(layer(x).detach().abs().max())
    torch.testing.assert_close(folded(x), layer(x), rtol=0.0, atol=64.0 * torch.finfo(dtype).eps * max(scale, 1.0))
    plain = nn.Sequential(*folded)
    assert plain(x).equal(folded(x))


def test_training_evaluation_copies_and_functional_calls_agree() -> None:
    layer, other = drawn(), Sandwich(6, 5)
    x = torch.randn(5, 6)
    y = layer(x)
    assert sorted(layer.state_dict()) == ["bias", "raw_psi", "weight"]
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


def test_meta_device_then_empty_then_reset_is_within_the_limit() -> None:
    with torch.device("meta"):
        layer = Sandwich(4, 6)
        assert layer(torch.empty(2, 4)).shape == (2, 6)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert 0.99 < lipschitz(layer).upper <= 1.0


def test_a_chain_is_bounded_by_its_layers() -> None:
    model = nn.Sequential(drawn(6, 5), drawn(5, 4).folded(), nn.Sequential(drawn(4, 3, radius=0.5)))
    assert lipschitz(model).upper <= 0.5


def test_it_starts_as_an_isometric_frame_with_a_share_for_both() -> None:
    A, B = Sandwich(64, 64).frame()
    for part in (A, B):
        share = float(part.detach().square().sum()) / 64.0
        assert 0.3 < share < 0.7


# Bad input.


def test_bad_arguments_are_refused() -> None:
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            Sandwich(size, 2)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            Sandwich(2, size)  # pyright: ignore[reportArgumentType]
    for activation in ("gelu", "abs"):
        with pytest.raises(ValueError, match="activation"):
            Sandwich(3, 3, activation=activation)
    for radius in (0.0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="radius must be"):
            Sandwich(3, 3, radius=radius)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="method must be"):
        Sandwich(3, 3, method="expm")


@pytest.mark.parametrize("name", ["weight", "bias", "raw_psi"])
def test_nothing_is_proved_about_nan(name: str) -> None:
    layer = drawn()
    with torch.no_grad():
        layer.get_parameter(name).flatten()[0] = math.nan
    with pytest.raises(ValueError, match=r"NaN"):
        lipschitz(layer)
    with pytest.raises(ValueError, match=r"NaN"):
        layer.folded()


def test_a_folded_layer_with_nan_has_no_bound() -> None:
    for position, name in ((0, "weight"), (0, "bias"), (2, "weight")):
        folded = drawn().folded()
        with torch.no_grad():
            folded[position].get_parameter(name).flatten()[0] = math.nan
        with pytest.raises(ValueError, match=r"NaN"):
            lipschitz(folded)


def test_a_folded_layer_whose_parts_were_changed_has_no_rule() -> None:
    folded = drawn().folded()
    folded[1] = nn.SiLU()
    with pytest.raises(UncertifiableError, match="activation"):
        lipschitz(folded)
    folded = drawn().folded()
    folded.append(nn.Linear(6, 6))
    with pytest.raises(UncertifiableError, match="three"):
        lipschitz(folded)


def test_several_parts_of_a_folded_layer_are_a_plain_sequential() -> None:
    folded, x = drawn().folded(), torch.randn(2, 6)
    head = folded[:2]
    assert type(head) is nn.Sequential
    assert list(head.state_dict()) == ["0.weight", "0.bias"]
    in_features = folded[0].in_features
    x = torch.randn(2, in_features)
    torch.testing.assert_close(folded[2](head(x)), folded(x), rtol=0, atol=0)
    assert folded[-1] is folded[2]
    assert list(folded[1:].state_dict()) == ["2.weight"]
    infinite = drawn(activation="softplus").folded()
    infinite[1].beta = math.inf
    with pytest.raises(UncertifiableError, match="slopes in"):
        lipschitz(infinite)


def test_a_subclass_with_another_forward_has_no_rule() -> None:
    class Doubled(Sandwich):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2.0 * super().forward(input)

    with pytest.raises(UncertifiableError, match="overrides forward"):
        lipschitz(Doubled(2, 2))
