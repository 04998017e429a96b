"""Laws of stacks under a budget: the growth is at most G whatever the parameters, and no smaller promise would do."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    GroupSort,
    Householder,
    MarginCrossEntropy,
    ResidualStack,
    Scale,
    lipschitz,
    stabilize,
    table,
    uniform_bound,
)
from stableopt.theory import depth_growth_budget
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import digits


def mlp(n: int = 4, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, n))


def full(stack: ResidualStack) -> ResidualStack:
    """All of the budget in use."""
    nn.init.constant_(stack.raw_step, 60.0)
    return stack


@settings(max_examples=20)
@given(
    depth=st.integers(1, 5), budget=st.sampled_from([1.0 + 1e-9, 1.5, 10.0, 1e6]), norm=st.sampled_from(["l2", "linf", "l1"]),
    log_scale=st.integers(-8, 8), raw=st.floats(-60, 60), allocate=st.sampled_from(["softmax", "uniform"]),
    kind=st.sampled_from(["random", "rank one", "zero"]), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_growth_is_within_the_budget_whatever_the_parameters(
    depth: int,
    budget: float,
    norm: str,
    log_scale: int,
    raw: float,
    allocate: str,
    kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    stack = ResidualStack([mlp(3, 4) for _ in range(depth)], budget, norm=norm, allocate=allocate)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in stack.branches.parameters():
            parameter.copy_(10.0**log_scale * torch.randn_like(parameter) * (kind != "zero"))
            if kind == "rank one" and parameter.ndim == 2:
                parameter.copy_(10.0**log_scale * torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1]))
        stack.raw_step.fill_(raw)
        if stack.raw_shares is not None:
            stack.raw_shares.copy_(8.0 * torch.randn(depth))
    stack.to(dtype)
    bound = lipschitz(stack, norm)
    assert bound.proved
    assert bound.upper <= budget  # exactly, not up to rounding
    uniform = uniform_bound(stack, norm)
    assert uniform is not None
    assert uniform.upper == budget
    assert 0.0 <= stack.budget_use() <= 1.0
    if dtype is torch.float64:
        J = jacobian(stack, torch.randn(1, 3))
        assert operator_norm(J, norm) <= bound.upper * (1.0 + 1e-9)


def test_it_is_attained_by_branches_that_stretch_everything_alike() -> None:
    """f = L I in every block: the Jacobian is the proved product, and the promise for any depth is G itself."""
    for depth in (1, 3, 50):
        stack = full(ResidualStack([Scale(3.0) for _ in range(depth)], 4.0, allocate="uniform"))
        J = jacobian(stack, torch.randn(1, 2))
        product = (1 + math.log(4.0) / depth) ** depth
        assert operator_norm(J, "l2") == pytest.approx(product, rel=1e-9)
        assert lipschitz(stack).upper == pytest.approx(product, rel=1e-9)
    assert product > 0.98 * 4.0


def test_just_past_the_budget_it_is_exceeded() -> None:
    """The steps times 1.01, at a depth at which the product has reached the exponential."""
    depth = 500
    steps = full(ResidualStack([Scale(3.0)] * depth, 4.0)).step_sizes().detach()
    assert float((1 + 3.0 * steps).prod()) <= 4.0
    assert float((1 + 3.0 * 1.01 * steps).prod()) > 4.0
    assert float(depth_growth_budget((1.01 * steps).tolist(), [3.0] * depth)) > 4.0  # type: ignore[arg-type]


def test_the_product_for_random_shares_is_what_was_measured() -> None:
    """G = 10 with shares softmax(normal), one draw each: 7.04 for 8 blocks, 9.07 for 64, 9.88 for 512; never more than 10."""
    for depth, measured in ((8, 7.04), (64, 9.07), (512, 9.88)):
        products = []
        for _ in range(16 if depth < 512 else 4):
            stack = full(ResidualStack([nn.Identity()] * depth, 10.0))
            nn.init.normal_(stack.raw_shares)
            products.append(float((1.0 + stack.step_sizes().detach()).prod()))
        assert lipschitz(stack).upper == pytest.approx(products[-1], rel=1e-9)
        assert min(products) - 0.05 <= measured <= max(products) + 0.05 <= 10.05
        assert max(products) <= 10.0


def test_the_steps_are_the_shares_of_the_logarithm() -> None:
    stack = ResidualStack([Scale(2.0), Scale(0.5), nn.Identity()], 5.0, step=0.25)
    nn.init.constant_(stack.raw_shares, 0.0)
    with torch.no_grad():
        stack.raw_shares[0] = math.log(2.0)  # type: ignore[index]
    expected = torch.tensor([0.5 / 2.0, 0.25 / 0.5, 0.25]) * 0.25 * math.log(5.0)
    torch.testing.assert_close(stack.step_sizes().detach(), expected, rtol=1e-6, atol=0)
    assert float(stack.exponents().sum().detach()) == pytest.approx(0.25 * math.log(5.0), rel=1e-6)
    uniform = ResidualStack([Scale(2.0), Scale(0.5)], 5.0, allocate="uniform", step=0.5)
    assert uniform.raw_shares is None
    torch.testing.assert_close(
        uniform.step_sizes().detach(), torch.tensor([1 / 8, 1 / 2]) * math.log(5.0), rtol=1e-6, atol=0
    )


def test_the_map_is_the_recursion() -> None:
    stack = ResidualStack([mlp(), nn.Tanh()], 3.0)
    x = torch.randn(5, 4)
    first, second = stack.step_sizes()
    y = x + first * stack.branches[0](x)
    torch.testing.assert_close(stack(x), y + second * torch.tanh(y), rtol=0, atol=0)


def test_the_adversary_stays_below_the_bound() -> None:
    for norm in ("l2", "linf"):
        torch.manual_seed(1)
        stack = full(ResidualStack([mlp() for _ in range(3)], 6.0, norm=norm))
        assert 1.2 < worst_ratio(stack, (4,), norm, starts=8, steps=25) <= lipschitz(stack, norm).upper


def test_a_plain_stack_grows_without_a_limit() -> None:
    """The trap: the same branches with unit steps."""
    bound = 1.0
    for branch in ResidualStack([mlp() for _ in range(24)], 2.0).branches:
        bound *= 1.0 + lipschitz(branch).upper
    assert bound > 1e4
    assert lipschitz(full(ResidualStack([mlp() for _ in range(24)], 2.0))).upper <= 2.0


def test_gradients_reach_the_branches_the_shares_and_the_step_and_are_right() -> None:
    stack = ResidualStack([mlp(3, 3), mlp(3, 3)], 3.0)
    nn.init.normal_(stack.raw_shares)
    x = torch.randn(2, 3)
    names = dict(stack.named_parameters())

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in names.values()))
    stack(x).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in stack.parameters())  # type: ignore[union-attr]


def test_copies_and_transforms_keep_the_map() -> None:
    stack = ResidualStack([mlp(), nn.Sequential(GroupSort(), Householder(4))], 3.0).eval()
    x = torch.randn(3, 4)
    expected = stack(x)
    fresh = ResidualStack([mlp(), nn.Sequential(GroupSort(), Householder(4))], 3.0)
    buffer = io.BytesIO()
    torch.save(stack.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), fresh):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(stack)(x), expected)
    assert copy.deepcopy(stack).to("meta")(x.to("meta")).shape == x.shape
    with torch.device("meta"):
        assert ResidualStack([mlp()], 2.0)(torch.zeros(1, 4)).is_meta


@pytest.mark.slow
def test_it_is_compiled_in_one_graph_and_exported() -> None:
    stack = ResidualStack([mlp(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())], 3.0).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(stack, backend="eager", fullgraph=True)(x), stack(x))
    torch.testing.assert_close(torch.export.export(stack, (x,)).module()(x), stack(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    stack = full(ResidualStack([mlp() for _ in range(3)], 2.0)).to(dtype)
    assert stack(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert stack.step_sizes().dtype == torch.float32
    assert lipschitz(stack).upper <= 2.0
    stack.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stack.step_sizes()
    torch.testing.assert_close(inside, stack.step_sizes(), rtol=0, atol=0)


def test_images_sequences_and_the_norm_of_tokens() -> None:
    convs = [
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, padding=1)) for _ in "ab"
    ]
    stack = full(ResidualStack(convs, 2.0))
    assert stack(torch.zeros(1, 2, 5, 7)).shape == (1, 2, 5, 7)
    assert 1.0 < lipschitz(stack).upper <= 2.0
    J = jacobian(stack, torch.randn(1, 2, 4, 4))
    assert operator_norm(J, "l2") <= lipschitz(stack).upper
    tokens = full(ResidualStack([mlp()], 2.0, norm="token_max"))
    assert 1.0 < lipschitz(tokens, "token_max").upper <= 2.0
    assert worst_ratio(tokens, (3, 4), "token_max", steps=20) <= 2.0
    with pytest.raises(UncertifiableError, match="Conv2d"):
        ResidualStack(convs, 2.0, norm="token_max")


def test_the_promise_belongs_to_one_norm() -> None:
    stack = full(ResidualStack([mlp() for _ in range(3)], 1.1))
    assert uniform_bound(stack, "linf") is None
    assert lipschitz(stack, "linf").upper > 1.1  # the honest number


@torch.no_grad()
def thrown(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.normal_().mul_(50.0)


@pytest.mark.parametrize("budget", ["even", "learned"])
def test_stabilize_limits_the_branches_and_counts_the_stack_with_its_budget(budget: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), ResidualStack([mlp(), mlp()], 2.0), nn.Linear(4, 2))
    stabilize(model, 1.0, budget=budget)  # type: ignore[arg-type]
    rows = {row.name: row.limit for row in table(model).rows}
    assert sorted(rows) == [
        "0.weight", "1.branches.0.0.weight", "1.branches.0.2.weight", "1.branches.1.0.weight", "1.branches.1.2.weight", "2.weight",
    ]  # fmt: skip
    assert rows["0.weight"] * rows["2.weight"] == pytest.approx(0.5)
    for _ in range(3):
        thrown(model)
        assert lipschitz(model).upper <= 1.0
        assert lipschitz(model[1]).upper <= 2.0  # type: ignore[arg-type]
    with pytest.raises(UncertifiableError, match="keeps its budget in the norm that it was built with, 'l2'"):
        stabilize(nn.Sequential(nn.Linear(4, 4), ResidualStack([mlp()], 2.0)), 1.0, norm="linf")


def test_bad_arguments_are_named() -> None:
    for budget, words in (
        (1.0, "above 1, got 1.0. With a budget of 1 every step is zero"),
        (0.5, "finite and above 1, got 0.5"),
        (math.inf, "above 1, got inf"),
        (math.nan, "above 1, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            ResidualStack([nn.Tanh()], budget)
    with pytest.raises(ValueError, match="allocate must be 'softmax' or 'uniform', got 'even'"):
        ResidualStack([nn.Tanh()], 2.0, allocate="even")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one branch"):
        ResidualStack([], 2.0)
    with pytest.raises(TypeError, match=r"branches of ResidualStack must be torch\.nn\.Modules, got builtin"):
        ResidualStack([torch.tanh], 2.0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="inplace=True"):
        ResidualStack([nn.ReLU(inplace=True)], 2.0)
    with pytest.raises(ValueError, match="norm must be one of"):
        ResidualStack([nn.Tanh()], 2.0, norm="max")
    with pytest.raises(ValueError, match="step is a fraction"):
        ResidualStack([nn.Tanh()], 2.0, step=1.0)
    with pytest.raises(UncertifiableError, match=r"PReLU\) in a branch of ResidualStack has no constant that holds"):
        ResidualStack([nn.PReLU()], 2.0)
    with pytest.raises(
        ValueError, match=r"branch 1 of a ResidualStack must keep the shape, got \(1, 1\) from \(1, 4\)"
    ):
        ResidualStack([nn.Tanh(), nn.Linear(4, 1)], 2.0)(torch.zeros(1, 4))  # would broadcast
    for name in ("raw_step", "raw_shares"):
        stack = ResidualStack([nn.Tanh(), nn.Tanh()], 2.0)
        nn.init.constant_(getattr(stack, name), math.nan)
        with pytest.raises(ValueError, match="no bound holds for a ResidualStack with NaN or infinite parameters"):
            lipschitz(stack)
    stack = ResidualStack([nn.Tanh()], 2.0)
    stack.branches[0] = nn.GELU()  # steeper than what it was built with
    assert uniform_bound(stack) is None
    late = ResidualStack([nn.Sequential(nn.ReLU())], 2.0)
    late.branches[0][0].inplace = True  # type: ignore[index, union-attr]
    with pytest.raises(UncertifiableError, match="inplace=True"):
        lipschitz(late)


@pytest.mark.slow
def test_sixteen_branches_learn_within_the_budget_at_every_step() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    stack = ResidualStack([mlp(64, 32) for _ in range(16)], 4.0)
    model = nn.Sequential(stack, stabilize(nn.Linear(64, 10), 1.0))
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    loss = MarginCrossEntropy(16.0, 0.4)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            opt.step()
            assert lipschitz(stack).upper <= 4.0
    with torch.no_grad():
        assert float((model.eval()(x_test).argmax(1) == y_test).double().mean()) >= 0.93


@pytest.mark.parametrize("allocate", ["softmax", "uniform"])
def test_rounding_never_lifts_a_full_budget(allocate: str) -> None:
    """Near G = 1 the product is the exponential, up to less than the rounding of a step in float32."""
    for budget in (1.0 + 1e-7, 1.0 + 1e-6, 1.00001):
        for depth in (1, 3, 7):
            stack = full(ResidualStack([Scale(3.0)] * depth, budget, allocate=allocate)).float()  # type: ignore[arg-type]
            assert 1.0 < lipschitz(stack).upper <= budget
