"""Laws of cfl: the step respects the limit of what is declared, nothing declared counts as proved, contradictions are named."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, gram_norm
from stableopt.nn import (
    CFLBlock,
    GradientField,
    RungeKuttaBlock,
    Scale,
    cfl,
    lipschitz,
    stabilize,
    table,
    uniform_bound,
)
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm


class Gradient(nn.Module):
    """A user's branch -A^T tanh(Ax), whose class no rule knows."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.tanh(x @ self.weight.mT) @ self.weight


class Spiral(nn.Module):
    """-m x + omega K x with a rotation K: dissipative with m, Lipschitz with sqrt(m^2 + omega^2), no gradient."""

    def __init__(self, m: float, omega: float) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.tensor([[-m, -omega], [omega, -m]]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT


def mlp(n: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, n))


def smoothness(branch: nn.Module) -> Tensor:
    return gram_norm(branch.weight) ** 2 * (1.0 + 1e-12)  # type: ignore[arg-type]


def full(block: nn.Module) -> nn.Module:
    """The whole of the limit."""
    nn.init.constant_(block.raw_step, 60.0)  # type: ignore[arg-type]
    return block


def at(block: CFLBlock | RungeKuttaBlock, factor: float) -> CFLBlock | RungeKuttaBlock:
    """A block with its step times a factor."""
    step = factor * block.step_size().detach()
    block.step_size = lambda: step  # type: ignore[method-assign]
    return block


# What holds if the declaration is true.


@settings(max_examples=20)
@given(log_scale=st.integers(-4, 4), raw=st.floats(-50, 50), seed=st.integers(0, 99))
def test_a_declared_gradient_never_expands_and_is_not_proved(log_scale: int, raw: float, seed: int) -> None:
    torch.manual_seed(seed)
    branch = Gradient()
    with torch.no_grad():
        branch.weight.mul_(10.0**log_scale)
    block = cfl(branch, "gradient", smoothness=smoothness)
    nn.init.constant_(block.raw_step, raw)
    bound = lipschitz(block)
    assert bound.upper <= 1.0
    assert not bound.proved
    for x in (torch.zeros(1, 3), torch.randn(1, 3)):
        assert operator_norm(jacobian(block, x), "l2") <= 1.0 + 1e-12
    assert block.refuted_by(torch.randn(32, 3), torch.randn(32, 3)) is None


def test_the_limit_of_a_gradient_is_attained_and_sharp() -> None:
    """At 0 the slopes of tanh are 1: the Jacobian is I - tau A^T A."""
    branch = Gradient()
    exact = float(torch.linalg.matrix_norm(branch.weight.detach(), 2)) ** 2
    block = full(cfl(branch, "gradient", smoothness=exact))
    assert float(block.step_size().detach()) == pytest.approx(2 / exact, rel=1e-12)  # type: ignore[operator]
    x = torch.zeros(1, 3)
    assert float(torch.linalg.eigvalsh(jacobian(block, x))[0]) == pytest.approx(-1.0, abs=1e-9)
    assert operator_norm(jacobian(at(block, 1.001), x), "l2") > 1.0 + 1e-3  # type: ignore[arg-type]


@settings(max_examples=20)
@given(m=st.floats(0.01, 10), omega=st.floats(0, 20), raw=st.floats(-40, 60))
def test_the_limit_of_a_dissipative_branch_is_attained_and_sharp(m: float, omega: float, raw: float) -> None:
    branch, x = Spiral(m, omega), torch.randn(1, 2)
    L = math.hypot(m, omega)
    block = cfl(branch, "dissipative", dissipation=m, lipschitz=L * (1.0 + 1e-15))
    nn.init.constant_(block.raw_step, raw)
    bound = lipschitz(block)
    assert bound.upper <= 1.0
    assert not bound.proved
    found = operator_norm(jacobian(block, x), "l2")
    assert found == pytest.approx(bound.upper, abs=1e-7)  # a scaled rotation: the law is an equality
    if m > 0.1:
        assert operator_norm(jacobian(at(full(block), 1.001), x), "l2") > 1.0  # type: ignore[arg-type]
    assert cfl(branch, "dissipative", dissipation=m, lipschitz=2 * L).refuted_by(torch.randn(8, 2), x) is None


def test_half_of_the_limit_is_the_best_step_of_a_dissipative_branch() -> None:
    block = cfl(Spiral(1.0, 2.0), "dissipative", dissipation=1.0, lipschitz=math.sqrt(5.0), step=0.5)
    assert lipschitz(block).upper == pytest.approx(math.sqrt(1 - 1 / 5), rel=1e-6)


def test_a_strongly_convex_branch_contracts() -> None:
    block = full(cfl(Scale(-2.0), "gradient", smoothness=3.0, strong=1.0))
    assert float(block.step_size().detach()) == pytest.approx(2 / 4)  # type: ignore[operator]
    bound = lipschitz(block)
    assert bound.upper == pytest.approx(0.5, rel=1e-9)
    assert not bound.proved
    interval = full(cfl(Scale(-2.0), "gradient", smoothness=Bound(2.0, 3.0), strong=Bound(1.0, 2.0)))
    assert float(interval.step_size().detach()) == pytest.approx(2 / 5)  # type: ignore[operator]
    assert lipschitz(interval).upper == pytest.approx(1 - 2 / 5, rel=1e-9)


# What is proved without a declaration.


@settings(max_examples=20)
@given(
    norm=st.sampled_from(["l2", "linf", "l1"]), kind=st.sampled_from(["averaged", "lipschitz"]), log_scale=st.integers(-6, 6),
    raw=st.floats(-50, 60), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_measured_branch_keeps_a_proved_promise_whatever_the_parameters(
    norm: str, kind: str, log_scale: int, raw: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    promise = 1.0 if kind == "averaged" else 1.25
    block = cfl(mlp(3), kind, norm=norm, growth=None if kind == "averaged" else promise)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.branch.parameters():  # type: ignore[union-attr]
            parameter.mul_(10.0**log_scale)
        block.raw_step.fill_(raw)
    block.to(dtype)
    bound = lipschitz(block, norm)
    assert bound.proved
    assert bound.upper <= promise
    uniform = uniform_bound(block, norm)
    assert uniform is not None
    assert uniform.upper == promise
    assert uniform.proved
    if dtype is torch.float64:
        assert operator_norm(jacobian(block, torch.randn(1, 3)), norm) <= bound.upper * (1 + 1e-9)


def test_the_growth_is_attained_and_just_past_the_limit_it_is_exceeded() -> None:
    block = full(cfl(Scale(3.0), "lipschitz", growth=1.5))
    x = torch.randn(1, 2)
    assert operator_norm(jacobian(block, x), "l2") == pytest.approx(1.5, abs=1e-9)
    assert 1.5 - 1e-9 < lipschitz(block).upper <= 1.5
    assert operator_norm(jacobian(at(block, 1.001), x), "l2") > 1.5 + 4e-4  # type: ignore[arg-type]


def test_an_averaged_block_scales_a_steep_branch_down_and_leaves_a_flat_one() -> None:
    x = torch.randn(5, 2)
    steep = cfl(Scale(4.0), "averaged", step=0.25)
    torch.testing.assert_close(steep(x), x)  # (1 - a) x + a 4x/4
    flat = cfl(Scale(0.5), "averaged", step=0.25)
    torch.testing.assert_close(flat(x), 0.75 * x + 0.25 * 0.5 * x)
    assert lipschitz(flat).upper == pytest.approx(0.875)
    assert float(cfl(nn.Tanh(), "averaged", depth=8).step_size().detach()) == pytest.approx(1 / 8)


def test_the_adversary_stays_below_the_proved_bounds() -> None:
    for kind, numbers in (("averaged", {}), ("lipschitz", {"growth": 2.0})):
        torch.manual_seed(0)
        block = full(cfl(mlp(), kind, **numbers))  # type: ignore[arg-type]
        assert 0.05 < worst_ratio(block, (4,), starts=8, steps=20) <= lipschitz(block).upper


def test_a_field_brings_its_own_limit() -> None:
    field = GradientField(3, strong=0.5)
    block = cfl(field, depth=4)
    assert isinstance(block, RungeKuttaBlock)
    assert block.substeps == 1
    assert lipschitz(block).proved
    assert lipschitz(block).upper <= 1.0
    x = torch.randn(2, 3)
    torch.testing.assert_close(block(x), x + block.step_size() * field(x))
    for extra in ({"kind": "gradient"}, {"smoothness": 2.0}, {"norm": "linf"}):
        with pytest.raises(ValueError, match="a GradientField proves its own limit, in 'l2'"):
            cfl(field, **extra)  # type: ignore[arg-type]


# What is never called proved, and what is refused.


def test_a_declared_constant_counts_only_where_no_rule_knows_better() -> None:
    unknown = cfl(Gradient(), "lipschitz", lipschitz=50.0, growth=1.5)
    assert not lipschitz(unknown).proved
    assert lipschitz(unknown).upper <= 1.5
    with pytest.raises(UncertifiableError, match="Gradient"):
        lipschitz(unknown, "linf")
    loose = cfl(Scale(3.0), "lipschitz", lipschitz=4.0, growth=1.5, step=0.5)  # a rule knows 3
    assert lipschitz(loose).proved
    assert lipschitz(loose).upper == pytest.approx(1 + 0.5 * 0.5 / 4 * 3, rel=1e-6)
    with pytest.raises(ValueError, match=r"lipschitz=2 is declared of the branch, but .* proved to be at least 3"):
        lipschitz(cfl(Scale(3.0), "lipschitz", lipschitz=2.0, growth=1.5))
    gradient = cfl(Scale(-3.0), "gradient")  # L is measured and proved, that it is a gradient is declared
    assert not lipschitz(gradient).proved
    assert lipschitz(gradient, "linf").proved  # 1 + tau L needs no declaration
    assert lipschitz(gradient, "linf").upper > 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cfl(Gradient(4), "gradient", smoothness=9.0), "no l2 Lipschitz rule is known for Gradient"),
        (lambda: cfl(mlp(), "gradient", smoothness=9.0), "rests on what is declared"),
        (lambda: cfl(mlp(), "averaged", lipschitz=1.0), "rests on what is declared"),
        (lambda: cfl(mlp(), "averaged"), "promises nothing in 'linf'"),
        (lambda: cfl(Scale(0.5), "gradient", smoothness=2.0).requires_grad_(False), "rests on what is declared"),
    ],
)
def test_stabilize_does_not_build_on_a_declaration(make, words: str) -> None:
    norm = "linf" if "linf" in words else "l2"
    with pytest.raises(UncertifiableError, match=words):
        stabilize(nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 2)), 1.0, norm=norm)  # type: ignore[arg-type]


def test_no_layer_with_a_declared_constant_is_counted() -> None:
    class Declared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    from stableopt.nn import lipschitz_rule

    @lipschitz_rule.register(Declared)
    def _(module: Declared, norm: str) -> Bound:
        return Bound.estimate(1.0)

    with pytest.raises(UncertifiableError, match=r"'1' \(Declared\) is declared, not proved"):
        stabilize(nn.Sequential(nn.Linear(4, 4), Declared()), 1.0)


def test_stabilize_counts_a_measured_block() -> None:
    model = stabilize(nn.Sequential(nn.Linear(4, 4), cfl(mlp(), "lipschitz", growth=2.0), nn.Linear(4, 2)), 1.0)
    rows = {row.name: row.limit for row in table(model).rows}
    assert rows["0.weight"] * rows["2.weight"] == pytest.approx(0.5)
    assert rows["1.branch.0.weight"] * rows["1.branch.2.weight"] == pytest.approx(1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().mul_(30.0)
    assert lipschitz(model).upper <= 1.0


def test_pairs_refute_a_false_declaration_and_only_that() -> None:
    x, y = torch.randn(64, 2), torch.randn(64, 2)
    spiral = Spiral(1.0, 3.0)
    found = cfl(spiral, "gradient", smoothness=4.0).refuted_by(x, y)
    assert found is not None  # a rotation is no gradient, although its Lipschitz constant is below 4
    assert "not a gradient with smoothness 4" in found
    assert cfl(spiral, "dissipative", dissipation=1.0, lipschitz=3.2).refuted_by(x, y) is None
    assert "not dissipative with m = 1.1" in str(
        cfl(spiral, "dissipative", dissipation=1.1, lipschitz=3.2).refuted_by(x, y)
    )
    assert "not Lipschitz with the constant 3" in str(
        cfl(spiral, "dissipative", dissipation=1.0, lipschitz=3.0).refuted_by(x, y)
    )
    assert "not dissipative with m = 0.6" in str(
        cfl(Scale(-0.5), "gradient", smoothness=1.0, strong=0.6).refuted_by(x, y)
    )
    assert cfl(Scale(-0.5), "gradient", smoothness=0.5, strong=0.5).refuted_by(x, y) is None
    assert cfl(Scale(-0.5), "gradient", smoothness=0.5, strong=0.5).refuted_by(x.float(), y.float()) is None
    assert cfl(nn.Tanh(), "lipschitz", growth=2.0).refuted_by(x, x) is None
    with pytest.raises(UncertifiableError, match="this block is one in 'linf'"):
        cfl(nn.Tanh(), "averaged", norm="linf").refuted_by(x, y)


def test_a_number_of_the_moment_follows_the_branch() -> None:
    branch = Gradient()
    block = cfl(branch, "gradient", smoothness=smoothness)
    before = float(block.step_size().detach())
    with torch.no_grad():
        branch.weight.mul_(2.0)
    assert float(block.step_size().detach()) == pytest.approx(before / 4)
    block(torch.randn(2, 3)).square().sum().backward()
    assert block.raw_step.grad is not None
    assert branch.weight.grad is not None
    gone = cfl(nn.Tanh(), "dissipative", dissipation=lambda branch: torch.tensor(-1.0), lipschitz=2.0)
    assert float(gone.step_size().detach()) == 0.0  # not dissipative at the moment: no step
    assert lipschitz(gone).upper == 1.0
    impossible = cfl(nn.Tanh(), "dissipative", dissipation=lambda branch: 3.0, lipschitz=2.0)
    with pytest.raises(ValueError, match="cannot exceed lipschitz"):
        lipschitz(impossible)


def test_copies_half_precision_and_meta() -> None:
    x = torch.randn(3, 4)
    for make in (
        lambda: cfl(mlp(), "averaged"),
        lambda: cfl(mlp(), "lipschitz", growth=2.0),
        lambda: cfl(mlp(), "gradient", smoothness=smoothness_of_one),
        lambda: cfl(mlp(), "dissipative", dissipation=1.0, lipschitz=2.0),
    ):
        block, fresh = make(), make()
        fresh.load_state_dict(block.state_dict())
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
            torch.testing.assert_close(other(x), block(x), rtol=0, atol=0)
        torch.testing.assert_close(torch.func.vmap(block)(x), block(x))
        half = copy.deepcopy(block).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert half.step_size().dtype == torch.float32
        assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == x.shape
        assert str(block).startswith("CFLBlock(")


def smoothness_of_one(branch: nn.Module) -> float:
    return 1.0


@pytest.mark.slow
def test_it_is_compiled_in_one_graph_and_exported() -> None:
    x = torch.randn(3, 4)
    block = cfl(mlp(), "averaged").eval()
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="growth is the limit that the block keeps, a number above 1, got a function"):
        cfl(nn.Linear(2, 2), "lipschitz", growth=lambda branch: 1.5)  # type: ignore[arg-type]
    tanh = nn.Tanh()
    for numbers, words in (
        (
            {"kind": None},
            "kind must be one of gradient, dissipative, averaged, lipschitz for a branch that is no Field",
        ),
        ({"kind": "skew"}, "kind must be one of gradient, dissipative, averaged, lipschitz, got 'skew'"),
        ({"kind": "dissipative", "lipschitz": 2.0}, r"kind='dissipative' needs dissipation=\.\.\."),
        ({"kind": "lipschitz"}, r"kind='lipschitz' needs growth=\.\.\."),
        (
            {"kind": "gradient", "dissipation": 1.0},
            "kind='gradient' has no dissipation; its numbers are smoothness, strong",
        ),
        ({"kind": "averaged", "growth": 2.0}, "kind='averaged' has no growth; its numbers are lipschitz"),
        ({"kind": "gradient", "smoothness": 0.0}, "smoothness must be finite and > 0, got 0.0"),
        ({"kind": "gradient", "smoothness": math.inf}, "smoothness must be finite and > 0, got inf"),
        ({"kind": "gradient", "smoothness": 1.0, "strong": -1.0}, "strong must be finite and >= 0"),
        (
            {"kind": "gradient", "smoothness": 1.0, "strong": 1.5},
            "strong=1.5 is above smoothness=1.0, which no branch can have",
        ),
        ({"kind": "dissipative", "dissipation": 3.0, "lipschitz": 2.0}, "dissipation=3.0 is above lipschitz=2.0"),
        ({"kind": "dissipative", "dissipation": 0.0, "lipschitz": 2.0}, "dissipation must be finite and > 0"),
        ({"kind": "lipschitz", "growth": 1.0}, "growth must be finite and above 1, got 1.0"),
        (
            {"kind": "gradient", "smoothness": 1.0, "norm": "linf"},
            "limit of a gradient branch is one in 'l2', got norm='linf'",
        ),
        ({"kind": "averaged", "norm": "max"}, "norm must be one of"),
        ({"kind": "averaged", "step": 0.0}, "step is a fraction"),
    ):
        with pytest.raises(ValueError, match=words):
            cfl(tanh, **numbers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"branches of a block of cfl must be torch\.nn\.Modules"):
        cfl(torch.tanh, "averaged")  # type: ignore[arg-type]
    with pytest.raises(UncertifiableError, match=r"in a branch of cfl: no l2 Lipschitz rule is known for Gradient"):
        cfl(Gradient(), "gradient")
    with pytest.raises(ValueError, match="branch of a block of cfl must keep the shape"):
        cfl(nn.Linear(4, 1), "averaged")(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="inplace=True"):
        cfl(nn.ReLU(inplace=True), "averaged")
    block = cfl(tanh, "averaged")
    nn.init.constant_(block.raw_step, math.nan)
    with pytest.raises(ValueError, match="no bound holds for a block of cfl with NaN"):
        lipschitz(block)
    late = cfl(nn.Sequential(nn.Tanh()), "averaged")
    late.branch[0] = nn.GELU()  # type: ignore[index, operator, union-attr]
    assert uniform_bound(late) is None
    assert lipschitz(late).upper > 1.0
