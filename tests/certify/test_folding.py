"""A normalization joined with the weight before it: the same function, never a larger norm; and the check against the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stableopt.certify.crosscheck import check_same_function
from stableopt.certify.extract import extract, live
from stableopt.certify.fold.registry import checked_fold, fold
from stableopt.certify.folding import fold_affine
from stableopt.certify.program import Builder, Program, Value
from stableopt.errors import UncertifiableError
from stableopt.nn import BatchCentering, Concat, InputNormalization, UnitRowLinear
from tests.certify.fold.test_layers import computed, randomized

JOINED: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (6,)),
    (lambda: nn.Sequential(nn.Linear(6, 4, bias=False), BatchCentering(4)), (6,)),
    (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), (4, 8, 8)),
    (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (4, 9)),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6, affine=False)), (4, 5, 5)),
    (lambda: nn.Sequential(UnitRowLinear(6, 4), InputNormalization([1.0] * 4, [0.5, 1.0, 2.0, 4.0])), (6,)),
]


@pytest.mark.parametrize("case", JOINED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_joined_normalization_is_the_same_function(
    case: tuple[Callable[[], nn.Module], tuple[int, ...]], dtype: torch.dtype
) -> None:
    model, shape = randomized(case[0](), 1).to(dtype), case[1]
    apart, joined = extract(model, shape, join=False), extract(model, shape)
    assert len(joined.nodes) == 1
    assert all(value.dtype is dtype for value in joined.tensors.values())
    x = torch.randn(5, *shape, dtype=torch.float64)
    expected, got = computed(apart, x), computed(joined, x)
    assert (got - expected).abs().max() <= 20 * torch.finfo(dtype).eps * expected.abs().max()


def matrix(program: Program) -> Tensor:
    """The linear part of a program as a matrix."""
    zero = torch.zeros(1, *program.shape)
    columns = torch.eye(zero.numel()).reshape(-1, *program.shape)
    return (computed(program, columns) - computed(program, zero)).flatten(1).T


@pytest.mark.parametrize("case", JOINED)
def test_the_norm_is_never_above_the_product(case: tuple[Callable[[], nn.Module], tuple[int, ...]]) -> None:
    model, shape = randomized(case[0](), 2), case[1]
    apart, joined = extract(model, shape, join=False), extract(model, shape)
    weight, *scales = apart.nodes
    single = Program((weight,), apart.tensors, shape)
    gains = [1.0 if node["scale"] is None else float(apart.tensors[node["scale"]].abs().max()) for node in scales]
    for order in (2, torch.inf):
        product = torch.linalg.matrix_norm(matrix(single), order) * torch.tensor(gains).prod()
        assert torch.linalg.matrix_norm(matrix(joined), order) <= product * (1 + 1e-12)


def test_a_value_with_two_readers_is_not_joined() -> None:
    model = nn.Sequential(nn.Linear(6, 4), Concat(nn.BatchNorm1d(4), nn.Identity()))
    assert [node["op"] for node in extract(randomized(model, 1), (6,)).nodes] == ["linear", "affine", "concat"]


def test_what_is_said_of_several_operations_keeps_to_them() -> None:
    graph = Builder((2,))
    value = graph.add("linear", graph.input, weight=torch.eye(2), bias=None, transposed=False)
    value = graph.add("affine", value, scale=torch.ones(2), bias=None, axis=-1)
    graph.add("scale", value, factor=3.0)
    value = graph.add("activation", value, name="relu")
    program = fold_affine(live(graph.program(), value.number))
    assert [(node["op"], node["in"]) for node in program.nodes] == [("linear", [0]), ("activation", [1])]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


@pytest.fixture
def wrong_rule() -> object:
    """A registered rule that is off by a factor."""
    factor = [2.0]

    @fold.register(Doubled)
    def _(module: Doubled, graph: Builder, value: Value) -> Value:
        return graph.add("scale", value, factor=factor[0])

    return factor


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.5)], ids=str
)
def test_a_wrong_rule_is_found(wrong_rule: list[float], dtype: torch.dtype, off: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Doubled(), nn.Linear(6, 3)).to(dtype)
    extract(model, (6,))
    wrong_rule[0] = 2.0 + off
    with pytest.raises(UncertifiableError, match="compute something else than the model: on a random input"):
        extract(model, (6,))
    wrong_rule[0] = 2.0


def test_a_difference_far_out_is_found() -> None:
    """A clip at 40 is not seen by small inputs."""
    model = nn.Sequential(nn.Hardtanh(-40.0, 40.0))
    with pytest.raises(UncertifiableError, match="size 100"):
        check_same_function(model, extract(nn.Sequential(nn.Hardtanh(-41.0, 40.0)), (9,)))


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Softplus, nn.Tanhshrink, nn.Mish, nn.LogSigmoid, nn.ELU])
def test_what_cancels_is_not_taken_for_a_difference(activation: Callable[[], nn.Module]) -> None:
    """A single output far out where a formula is a difference of nearly equal numbers."""
    for seed in range(8):
        extract(randomized(nn.Sequential(nn.Linear(2, 1), activation(), nn.Linear(1, 1)), seed), (2,))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_alone_is_not_taken_for_a_difference(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [
        InputNormalization([0.1, 0.2, 0.3], [0.5, 0.25, 0.125]),
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ELU(),
    ]
    layers += [nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.LayerNorm(96), UnitRowLinear(96, 8)]
    layers += [part for _ in range(6) for part in (nn.Linear(8, 8), nn.Softplus())]
    extract(randomized(nn.Sequential(*layers), seed).to(dtype), (3, 8, 8))


def test_a_builder_rule_is_needed_for_children() -> None:
    with pytest.raises(ValueError, match="no rule to fold modules with"):
        checked_fold(nn.Sequential(nn.ReLU()), Builder((2,)), Value(0, (2,)))
