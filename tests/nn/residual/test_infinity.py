"""Laws of the block in the maximum norm: exact row sums, one limit per neuron, every size of an image."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stableopt.theory as th
from stableopt.linalg import Bound
from stableopt.nn import InfNormBlock, InfNormField, lipschitz, lipschitz_rule, uniform_bound
from stableopt.nn.residual.infinity import RowLaw
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import digits

EPS = torch.finfo(torch.float64).eps


def filled(block: InfNormBlock, scale: float, *, raw: float) -> InfNormBlock:
    """Draw the weights anew at a scale; steps around a fraction of their limit."""
    with torch.no_grad():
        block.field.weight.copy_(scale * torch.randn_like(block.field.weight))
        block.field.bias.copy_(torch.randn_like(block.field.bias))
        block.raw_step.copy_(raw + torch.randn_like(block.raw_step))
    return block


@settings(max_examples=50)
@given(
    dim=st.integers(1, 6), kernel=st.sampled_from([None, 3, (3,), (1, 5), (3, 1, 3)]), decay=st.sampled_from([0.1, 1.0, 7.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]), log_scale=st.integers(-8, 6), raw=st.sampled_from([-40.0, 0.0, 40.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_never_expands_in_the_maximum_norm_whatever_the_parameters(
    dim: int, kernel: object, decay: float, share: float, log_scale: int, raw: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    rate = share * decay
    block = filled(InfNormBlock(dim, kernel, decay=decay, rate=rate), 10.0**log_scale, raw=raw).to(dtype)  # type: ignore[arg-type]
    bound, steps = lipschitz(block, "linf"), block.step_sizes().detach().double()
    assert bound.proved
    assert bound.upper <= 1.0  # proved, not 1 + eps
    assert bound.upper <= 1.0 - float(steps.min()) * rate + 1e-14
    A = block.field.matrix().detach().double().reshape(dim, dim, -1)
    own = A[..., A.shape[2] // 2].diagonal()
    assert bool((own + A.abs().sum((1, 2)) - own.abs() <= decay - rate).all())
    assert bool((steps * (decay - own.clamp_max(0.0)) <= 1.0).all())


@pytest.mark.parametrize(("kernel", "shape"), [(None, (4,)), (3, (2, 3, 4)), ((3,), (2, 5)), ((1, 3, 1), (2, 2, 2, 2))])
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_no_jacobian_exceeds_the_bound_in_any_norm(kernel: object, shape: tuple[int, ...], norm: str) -> None:
    for activation in ("relu", "tanh"):
        block = filled(InfNormBlock(shape[0], kernel, activation=activation), 0.5, raw=2.0)  # type: ignore[arg-type]
        J = jacobian(block, torch.randn(1, *shape))
        assert operator_norm(J, norm) <= lipschitz(block, norm).upper * (1 + 100 * EPS)
    found = worst_ratio(block, shape, norm, starts=8, steps=10)
    assert found <= lipschitz(block, norm).upper


def test_the_bound_is_attained_and_its_limit_is_sharp() -> None:
    """All units active, then none: one of the two derivatives has the row sum of the bound."""
    block = filled(InfNormBlock(5, rate=0.4), 0.7, raw=0.5)
    rows = []
    for bias in (100.0, -100.0):
        nn.init.constant_(block.field.bias, bias)
        rows.append(operator_norm(jacobian(block, torch.randn(1, 5)), "linf"))
    assert max(rows) == pytest.approx(lipschitz(block, "linf").upper, rel=1e-12)
    A = block.field.matrix().detach()
    own = A.diagonal()
    law = RowLaw(A, 1.0)
    for at, follows in ((0.999, True), (1.001, False)):
        tau = at / (1.0 - float(own.min()))  # beyond it the diagonal of the steepest row is negative
        law_says = 1.0 - tau * (1.0 - float((own + A.abs().sum(1) - own.abs())[own.argmin()]))
        i = int(own.argmin())
        row = float((torch.eye(5) + tau * (A - torch.eye(5)))[i].abs().sum())
        assert (row <= law_says + 1e-12) is follows
        assert law.linf([Bound.point(tau)] * 5).upper >= row - 1e-12


def test_the_sums_of_rows_and_columns_are_those_of_the_worst_slopes() -> None:
    """All corners of the slopes, with steps that differ by a factor of 1000 and may be beyond their limits."""
    for scale in (0.1, 3.0):
        A, steps = scale * torch.randn(3, 3), torch.tensor([1e-3, 0.9, 1.7])
        corners = [torch.tensor([float(k >> i & 1) for i in range(3)]) for k in range(8)]
        J = torch.stack([torch.eye(3) - torch.diag(steps) + (steps * d).unsqueeze(1) * A for d in corners])
        law, taus = RowLaw(A, 1.0), [Bound.point(t) for t in steps.tolist()]
        assert law.linf(taus).upper == pytest.approx(float(J.abs().sum(2).max()), rel=1e-12)
        assert law.l1(taus).upper == pytest.approx(float(J.abs().sum(1).max()), rel=1e-12)
        assert law.l2(taus).upper >= float(torch.linalg.matrix_norm(J, 2).max())


def test_past_the_limit_a_block_expands() -> None:
    block = InfNormBlock(2, rate=0.0)
    with torch.no_grad():
        block.field.weight.copy_(torch.tensor([[-60.0, 3.0], [0.0, -60.0]]))
        block.field.bias.fill_(100.0)
    limit = th.leaky_infinity_max_step(1.0, block.field.matrix().detach().diagonal().numpy())
    assert limit == pytest.approx(1 / 3, rel=1e-9)  # 1 / (c - a_ii) with a_ii = 1 - 3
    for at, expands in ((0.99, False), (1.4, True)):
        block.step_sizes = lambda at=at: torch.full((2,), at * limit)  # type: ignore[method-assign]
        block._steps = lambda matrix, at=at: torch.full((2,), at * limit)  # type: ignore[method-assign]
        exact = operator_norm(jacobian(block, torch.zeros(1, 2)), "linf")
        assert (exact > 1.0 + 1e-9) is expands
        assert lipschitz_rule(block, "linf").upper >= exact - 1e-12


def test_each_neuron_has_its_own_step() -> None:
    block = InfNormBlock(3, step=0.5)
    with torch.no_grad():
        block.field.weight.copy_(torch.tensor([[0.0, 4.0, 4.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    own = block.field.matrix().detach().diagonal()
    expected = 0.5 / (1.0 - own.clamp_max(0.0))
    torch.testing.assert_close(block.step_sizes().detach(), expected, rtol=1e-12, atol=0)
    assert float(expected[1]) > 4 * float(expected[0])
    torch.testing.assert_close(own, 1.0 - torch.tensor([8.0, 0.0, 1.0]) - math.log(2.0), rtol=1e-12, atol=0)


def test_the_field_is_what_its_formula_says() -> None:
    block = filled(InfNormBlock(4, decay=2.0, rate=0.5, activation="tanh"), 0.8, raw=0.0)
    x, A = torch.randn(3, 4), block.field.matrix()
    literal = x + block.step_sizes() * (-2.0 * x + torch.tanh(x @ A.mT + block.field.bias))
    torch.testing.assert_close(block(x), literal)
    torch.testing.assert_close(block.field(x), -2.0 * x + torch.tanh(x @ A.mT + block.field.bias))
    images = filled(InfNormBlock(2, 3), 0.5, raw=0.0)
    y, K = torch.randn(1, 2, 4, 5), images.field.matrix()
    moved = torch.relu(torch.nn.functional.conv2d(y, K, images.field.bias, padding=1))
    torch.testing.assert_close(images(y), y + images.step_sizes().view(2, 1, 1) * (moved - y))


def test_every_matrix_below_the_limit_is_reached() -> None:
    """The parametrization is onto: w_ii is the inverse softplus of what a row has left."""
    A = 0.3 * torch.randn(4, 4)
    row = A.diagonal() + A.abs().sum(1) - A.diagonal().abs()
    A = A - torch.diag((row - 0.9).clamp_min(0.0))
    left = 1.0 - (A.diagonal() + A.abs().sum(1) - A.diagonal().abs())
    field = InfNormField(4)
    with torch.no_grad():
        field.weight.copy_(A - torch.diag(A.diagonal()) + torch.diag(left.expm1().log()))
    torch.testing.assert_close(field.matrix().detach(), A, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_bound_of_a_convolution_holds_for_every_size_and_is_attained_on_a_large_one(size: int) -> None:
    block = filled(InfNormBlock(2, 3), 0.4, raw=1.0)
    worst = 0.0
    for bias in (50.0, -50.0):
        nn.init.constant_(block.field.bias, bias)
        worst = max(worst, operator_norm(jacobian(block, torch.randn(1, 2, size, size)), "linf"))
    bound = lipschitz(block, "linf").upper
    assert worst <= bound * (1 + 100 * EPS)
    if size >= 3:
        assert worst >= bound * (1 - 100 * EPS)


def test_steps_among_the_subnormal_numbers_are_rounded_down() -> None:
    block = InfNormBlock(2)
    with torch.no_grad():
        block.field.weight.copy_(torch.tensor([[-100.0, 46848.0], [46848.0, -100.0]]))
        block.raw_step.fill_(20.0)
    assert lipschitz(block.half(), "linf").upper <= 1.0


def test_what_holds_for_all_parameters_is_the_maximum_norm_only() -> None:
    block = InfNormBlock(3)
    bound = uniform_bound(block, "linf")
    assert bound is not None
    assert bound.upper == 1.0
    assert uniform_bound(block, "l2") is None
    assert lipschitz(block, "token_max").upper == lipschitz(block).upper


def test_gradients_reach_every_parameter_and_are_right() -> None:
    for kernel, shape in ((None, (2, 3)), (3, (2, 3, 2, 2))):
        block = filled(InfNormBlock(3, kernel, activation="tanh"), 0.4, raw=0.3)
        parameters = dict(block.named_parameters())
        x = torch.randn(*shape)

        def f(*values: torch.Tensor, block=block, parameters=parameters, x=x) -> torch.Tensor:
            return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))


def test_copies_and_casts_keep_the_map() -> None:
    for kernel, shape in ((None, (3, 4)), ((3,), (3, 4, 5))):
        block = filled(InfNormBlock(4, kernel), 0.3, raw=0.0)
        x = torch.randn(*shape)
        fresh = InfNormBlock(4, kernel)
        fresh.load_state_dict(block.state_dict())
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
            torch.testing.assert_close(other(x), block(x))
        torch.testing.assert_close(torch.func.vmap(block)(x), block(x))
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(block).to(dtype)
            assert half(x.to(dtype)).dtype == dtype
        assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.slow
def test_compilation_and_export_keep_the_map() -> None:
    block, x = filled(InfNormBlock(2, 3), 0.3, raw=0.0), torch.randn(1, 2, 4, 4)
    exported = torch.export.export(block, (x,)).module()
    for other in (torch.compile(block, backend="eager", fullgraph=True), exported):
        torch.testing.assert_close(other(x), block(x))


def test_numbers_that_are_not_finite_have_no_bound_and_a_wrong_size_is_refused() -> None:
    for name in ("field.weight", "field.bias", "raw_step"):
        block = InfNormBlock(3)
        with torch.no_grad():
            block.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            lipschitz(block, "linf")
    with pytest.raises(RuntimeError):
        InfNormBlock(3)(torch.randn(2, 1))
    with pytest.raises(ValueError, match="step is a fraction"):
        InfNormBlock(3, step=1.0)


@pytest.mark.slow
def test_a_deep_stack_learns_and_never_exceeds_one() -> None:
    torch.set_default_dtype(torch.float32)
    x, y, x_test, y_test = digits()
    stack = nn.Sequential(*[InfNormBlock(64, depth=16) for _ in range(16)])
    model = nn.Sequential(stack, nn.Linear(64, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
            assert lipschitz(stack[0], "linf").upper <= 1.0
    assert lipschitz(stack, "linf").upper <= 1.0
    assert float((model(x_test).argmax(1) == y_test).double().mean()) >= 0.9
