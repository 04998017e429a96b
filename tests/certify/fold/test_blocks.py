"""Certified blocks: what is folded is what is computed, the bounds hold and are attained, and false blocks are rejected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stableopt import UncertifiableError
from stableopt.certify.fold.parts import euler, linear_operator
from stableopt.certify.program import Builder, Program
from stableopt.certify.publish import publish
from stableopt.nn import (
    SLL,
    AveragedResidual,
    CompensatedPair,
    ContinuousDepth,
    ConvGradientBlock,
    DissipativeBlock,
    DissipativeField,
    Field,
    GradientBlock,
    GradientField,
    HamiltonianBlock,
    InfNormBlock,
    InfNormField,
    ResidualStack,
    RungeKuttaBlock,
    Sandwich,
    SkewBlock,
    SkewEulerBlock,
    cfl,
    lipschitz,
)
from stableopt.nn.residual.sll import FoldedSLL
from tests.certify.fold.block_laws import as_map, certified, constant, outputs, rejected, stirred
from tests.nn.adversary import worst_ratio

Node = dict[str, Any]
DENSE, IMAGE = (4,), (4, 5, 6)


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "gradient": (lambda: GradientBlock(4, 6, strong=0.3, activation="tanh"), DENSE),
    "gradient frobenius": (lambda: GradientBlock(4, 6, bound="frobenius", activation="leaky_relu"), DENSE),
    "gradient schur": (lambda: GradientBlock(4, 6, bound="schur", activation="hardtanh"), DENSE),
    "gradient rows": (lambda: GradientBlock(4, 6, bound="rows", strong=0.3, activation="softplus"), DENSE),
    "conv": (lambda: ConvGradientBlock(4, 6, groups=2, dilation=2, strong=0.1), IMAGE),
    "conv rows": (lambda: ConvGradientBlock(4, 6, groups=2, bound="rows"), IMAGE),
    "conv circular": (lambda: ConvGradientBlock(4, 3, padding_mode="circular"), IMAGE),
    "conv circular rows": (lambda: ConvGradientBlock(4, 2, padding_mode="circular", bound="rows", strong=0.2), IMAGE),
    "conv signal": (lambda: ConvGradientBlock(4, 2, (2,), dims=1, padding=0), (4, 9)),
    "sll": (lambda: SLL(4, 6), DENSE),
    "dissipative": (lambda: DissipativeBlock(4, 6, rate=0.4), DENSE),
    "dissipative alone": (lambda: DissipativeBlock(4, 6, rate=0.4, free=0.0, learn_rate=True), DENSE),
    "skew euler": (lambda: SkewEulerBlock(4, 0.5), DENSE),
    "skew": (lambda: SkewBlock(4, 0.5, method="expm"), DENSE),
    "hamiltonian": (lambda: HamiltonianBlock(4, 6), DENSE),
    "hamiltonian damped": (lambda: HamiltonianBlock(4, damping=0.4), DENSE),
    "infinity": (lambda: InfNormBlock(4, rate=0.3), DENSE),
    "infinity conv": (lambda: InfNormBlock(4, 3, rate=0.3), IMAGE),
    "runge euler": (lambda: RungeKuttaBlock(GradientField(4, 5, strong=0.2)), DENSE),
    "runge heun": (lambda: RungeKuttaBlock(DissipativeField(4, 5), method="heun", substeps=2), DENSE),
    "runge ssprk104": (lambda: RungeKuttaBlock(InfNormField(4), method="ssprk104"), DENSE),
    "runge rk4": (lambda: RungeKuttaBlock(GradientField(4), method="rk4", substeps=2), DENSE),
    "runge rk4_38": (lambda: RungeKuttaBlock(DissipativeField(4), method="rk4_38"), DENSE),
    "continuous": (lambda: ContinuousDepth([GradientField(4), DissipativeField(4, 3)], time=0.1, steps=6), DENSE),
    "sandwich": (lambda: Sandwich(4, 5), DENSE),
    "averaged": (lambda: AveragedResidual(branch(), 0.3), DENSE),
    "compensated": (lambda: CompensatedPair(GradientBlock(4, strong=1.0, step=0.9), branch()), DENSE),
    "cfl averaged": (lambda: cfl(branch(), "averaged"), DENSE),
    "cfl lipschitz": (lambda: cfl(branch(), "lipschitz", growth=1.5), DENSE),
    "stack": (lambda: ResidualStack([branch() for _ in range(3)], budget=2.0), DENSE),
}  # fmt: skip


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_folded_block_computes_what_the_module_computes_and_its_bound_is_that_of_the_module(
    name: str, norm: str
) -> None:
    make, shape = BLOCKS[name]
    module = stirred(make(), 0.1)
    program = certified(module, shape, norm)
    x = 3.0 * torch.randn(6, *shape)
    torch.testing.assert_close(outputs(program, x), module(x), rtol=1e-8, atol=1e-8)
    bound = constant(program)
    assert bound <= lipschitz(module, norm).upper * (1.0 + 1e-6) or (norm, name) == ("linf", "sandwich")
    assert bound >= worst_ratio(as_map(program), shape, norm, starts=4, steps=4) * (1.0 - 1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "name", ["gradient rows", "conv rows", "dissipative", "hamiltonian", "infinity conv", "runge rk4", "sandwich"]
)
def test_blocks_are_proved_in_integers_and_fractions_too(name: str, norm: str) -> None:
    make, shape = BLOCKS[name]
    program = certified(stirred(make(), 0.1), shape, norm)
    assert constant(program, exact=True) == constant(program)


@pytest.mark.parametrize(
    "name",
    ["gradient", "gradient rows", "sll", "dissipative", "hamiltonian", "infinity", "runge rk4", "sandwich", "skew"],
)
def test_blocks_of_tokens_have_the_bound_of_one_token(name: str) -> None:
    module = stirred(BLOCKS[name][0](), 0.1)
    tokens, one = certified(module, (3, 4), "token_max"), certified(module, (4,))
    assert constant(tokens) == pytest.approx(constant(one), rel=1e-8)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(outputs(tokens, x), module(x), rtol=1e-8, atol=1e-8)


def test_a_convolution_is_refused_where_tokens_are_measured() -> None:
    with pytest.raises(UncertifiableError, match="token_max"):
        certified(ConvGradientBlock(4, 3), IMAGE, "token_max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make", [lambda: SLL(4, 6), lambda: GradientBlock(4, 6, step=0.999999), lambda: GradientBlock(4, bound="rows")]
)
def test_steps_are_lowered_until_the_block_is_proved_not_to_expand(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    program = certified(make().to(dtype), DENSE)
    step = program.nodes[0]["step"]
    assert program.nodes[0]["bound"] == constant(program) == 1.0
    assert dtype == torch.float64 or step == float(np.float32(step))  # what multiplies tensors as it is stored


# ------------------------------------------------------------------------------------------------------- attained bounds


LINEAR = {"op": "activation", "name": "leaky_relu", "slope": 1.0}
"""All slopes 1, which is allowed: every unit is active everywhere."""


def alone(op: str, dim: int, settings: Node, norm: str = "l2") -> Program:
    """One operation, published, with all its units active."""
    graph = Builder((dim,), norm)
    graph.add(op, graph.input, **settings | {"activation": LINEAR})
    return publish(graph.program())


def euler_of(
    weight: Tensor, step: float, decay: float = 1.0, skew: Tensor | None = None, *, norm: str = "l2", **others: Any
) -> Program:
    operator = linear_operator(weight, None)
    return alone("euler", weight.shape[1], euler(operator, "relu", step=step, decay=decay, skew=skew, **others), norm)


def one_row_with_a_rotation() -> Program:
    K = torch.tensor([[0.0, 0.7], [-0.7, 0.0]])
    return euler_of(torch.tensor([[1.0, 2.0]]), 0.4, 0.9, K)


def long_steps() -> Program:
    return euler_of(torch.randn(5, 3), 0.9, 0.5, steps=torch.rand(5) + 1.0)


def three_times() -> Program:
    return euler_of(torch.randn(2, 3), 3.0, 1.0, times=3)


def sandwich() -> Program:
    """Two multiples of one projection, which the scale 1/2 makes equal: 2.25 is the norm of the whole."""
    folded = Sandwich(3, 3).folded()
    with torch.no_grad():
        folded[0].weight.copy_(torch.diag(torch.tensor([3.0, 0.0, 0.0])))
        folded[2].weight.copy_(torch.diag(torch.tensor([0.75, 0.0, 0.0])))
    folded.scales = (0.5, 1.0, 1.0)
    program = certified(folded, (3,))
    program.nodes[0]["activation"] = LINEAR
    return program


def rows() -> Program:
    operator = linear_operator(torch.tensor([[0.5, -0.3], [0.2, -1.0]]), None)
    return alone(
        "infinity", 2, {"operator": operator, "steps": torch.tensor([0.5, 0.7]), "decay": 1.0, "times": 1}, "linf"
    )


def shears() -> Program:
    """Shears along two lines at the worst angle."""
    u1, u2 = 1.0, 0.9
    a, falls = u1 * u2, u1 * u2 * (4.0 - u1 * u2)
    cosine = math.sqrt((a**4 * (u1 + u2) ** 2 - falls**2 * (u1 - u2) ** 2) / (4.0 * a**3 * falls))
    assert 0.0 < cosine < 1.0
    first = linear_operator(torch.tensor([[cosine, math.sqrt(1.0 - cosine**2)]]), None)
    second = linear_operator(torch.tensor([[1.0, 0.0]]), None)
    return alone("shear", 4, {"half": 2, "first": first, "second": second, "steps": [u1, u2], "decay": 0.5})


@pytest.mark.parametrize("make", [one_row_with_a_rotation, long_steps, three_times, sandwich, rows, shears])
def test_a_bound_that_is_attained_is_accepted_and_one_a_millionth_below_it_is_rejected(
    make: Callable[[], Program],
) -> None:
    program = make()
    bound, x = constant(program), torch.zeros(1, *program.shape)
    J = torch.autograd.functional.jacobian(lambda z: as_map(program)(z[None])[0], x[0])
    order = math.inf if program.norm == "linf" else 2
    reached = float(torch.linalg.matrix_norm(J, order))  # pyright: ignore[reportArgumentType]
    assert bound * (1.0 - 2e-8) <= reached <= bound
    assert "not proved" in rejected(program, lambda node: node.update(bound=bound * (1.0 - 1e-6)))


def test_the_rows_of_a_gradient_step_are_attained_by_one_unit() -> None:
    program = euler_of(torch.tensor([[1.0, 1.0]]), 1.9, 1.0, norm="linf")  # |1 - 1.9| + 1.9
    assert constant(program) == pytest.approx(2.8, rel=1e-12)
    assert "not proved" in rejected(program, lambda node: node.update(bound=2.8 - 1e-9))
    small = euler_of(torch.tensor([[1.0, 0.1]]), 0.5, 1.0, norm="linf")  # the second row: 1 - 0.005 + 0.05
    assert constant(small) == pytest.approx(1.045, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- false blocks


def test_a_block_is_rejected_with_a_matrix_that_is_not_antisymmetric() -> None:
    program = one_row_with_a_rotation()
    name = program.nodes[0]["skew"]

    def tilt(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 1] = math.nextafter(0.7, 0.0)

    assert "antisymmetric" in rejected(program, tensors=tilt)
    assert not rejected(program)


@pytest.mark.parametrize(
    "activation",
    [
        {"name": "gelu"},
        {"name": "abs"},
        {"name": "leaky_relu", "slope": 1.0 + 2**-52},
        {"name": "leaky_relu", "slope": -(2.0**-60)},
    ],
)
def test_a_block_is_rejected_with_slopes_outside_of_the_unit_interval(activation: Node) -> None:
    for program in (one_row_with_a_rotation(), rows(), shears(), sandwich()):
        assert "slopes in [0, 1]" in rejected(
            program, lambda node: node.update(activation={"op": "activation", **activation})
        )
        assert not rejected(program)


def test_negative_steps_are_rejected() -> None:
    for program in (long_steps(), rows()):
        name = program.nodes[0]["steps"]
        assert ">= 0" in rejected(program, tensors=lambda tensors: tensors[name].__setitem__(0, -1e-300))  # noqa: B023
    assert ">= 0" in rejected(long_steps(), lambda node: node.update(step=-1.0))
    assert ">= 0" in rejected(shears(), lambda node: node.update(steps=[0.1, -0.1]))
    assert "> 0" in rejected(sandwich(), tensors=lambda tensors: tensors["0.scales"].__setitem__(0, 0.0))


def test_a_convolution_with_another_adjoint_is_rejected() -> None:
    program = certified(stirred(ConvGradientBlock(4, 3, padding_mode="circular"), 0.1), IMAGE)
    assert not rejected(program)
    for change in ({"stride": [2, 1]}, {"transposed": True}, {"padding": [0, 0]}, {"padding": [1, 0]}):
        assert rejected(program, lambda node: node["operator"].update(change))  # noqa: B023
    zeros = certified(stirred(ConvGradientBlock(4, 3), 0.1), IMAGE)
    assert "stride 1" in rejected(zeros, lambda node: node["operator"].update(stride=[2, 2]))


@pytest.mark.parametrize("times", [0, -1, 1.0, True, 10_001, 2])
def test_a_block_that_is_taken_more_often_needs_a_larger_bound(times: Any) -> None:
    assert rejected(long_steps(), lambda node: node.update(times=times))


def test_a_method_of_runge_and_kutta_is_rejected_past_its_radius() -> None:
    program = certified(RungeKuttaBlock(GradientField(4), method="rk4"), DENSE)
    node = program.nodes[0]
    assert node["op"] == "runge_kutta"

    def longer(changed: Node) -> None:  # the radius of RK4 is 1
        changed["weights"] = [b * 1.000001 for b in node["weights"]]
        changed["stages"] = [[a * 1.000001 for a in row] for row in node["stages"]]

    assert "too long" in rejected(program, longer)
    assert "expands" in rejected(program, lambda changed: changed.update(bound=1.0 - 2**-53))
    assert ">= 0" in rejected(program, lambda changed: changed["weights"].__setitem__(0, -changed["weights"][0]))
    assert "tableau" in rejected(program, lambda changed: changed["stages"][0].append(0.0))
    assert "expands" in rejected(program, lambda changed: changed["euler"].update(decay=1.0005, bound=1.001))


def test_the_bound_of_a_step_longer_than_the_limit_is_above_one() -> None:
    layer = FoldedSLL(torch.eye(3), torch.zeros(3), torch.full((3,), 3.0), "relu")
    assert constant(certified(layer, (3,))) == pytest.approx(2.0, rel=1e-8)  # |1 - 3|, and nothing is lowered


def test_in_the_maximum_norm_a_block_has_the_smaller_of_two_bounds_and_says_which() -> None:
    many = torch.linalg.qr(torch.randn(24, 4)).Q
    wide, narrow = euler_of(many, 2.0, norm="linf"), euler_of(torch.eye(3), 0.5, norm="linf")
    assert [program.nodes[0]["op"] for program in (wide, narrow)] == ["euclidean", "euler"]
    assert constant(wide) == pytest.approx(2.0, rel=1e-12)
    assert constant(narrow) == pytest.approx(1.0, rel=1e-12)
    assert "not proved" in rejected(wide, lambda node: node.update(bound=2.0 - 1e-9))
    assert rejected(wide, lambda node: node.update(norm="linf"))


def test_shears_in_the_maximum_norm_have_the_bound_of_one_after_the_other() -> None:
    parts = {"first": linear_operator(torch.eye(1), None), "second": linear_operator(torch.eye(1), None)}
    program = alone("shear", 2, {"half": 1, **parts, "steps": [0.1, 1.0], "decay": 1.0}, "linf")
    assert constant(program) == pytest.approx(2.1, rel=1e-12)  # |p| <= 1.1, |q| <= 1 + 1.1
    assert "not proved" in rejected(program, lambda node: node.update(bound=2.1 - 1e-9))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_field_of_your_own_and_a_subclass_are_refused() -> None:
    class Own(GradientField):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return input

    class Decay(Field):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return -input

        def step_limit(self) -> Tensor:
            return torch.ones(())

        def bound(self, norm: str) -> Any:
            return GradientField(4).bound(norm)

    for field, why in ((Own(4), "Own"), (Decay(), "Decay has no rule for certificates")):
        with pytest.raises(UncertifiableError, match=why):
            certified(RungeKuttaBlock(field), DENSE)


def test_too_many_steps_of_a_method_are_refused_with_a_way_out() -> None:
    with pytest.raises(UncertifiableError, match=r"at most 256.*method='euler'"):
        certified(RungeKuttaBlock(GradientField(4), method="heun", substeps=100), DENSE)


def test_a_branch_that_changes_the_shape_is_refused() -> None:
    block = AveragedResidual(nn.Tanh(), 0.5)
    block.branch = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="shape"):
        certified(block, DENSE)
