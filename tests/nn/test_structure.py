"""Laws of modules made of branches and of the normalisations that keep a constant."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import GradientBlock, GroupSort, Scale, lipschitz, lipschitz_rule, stabilize
from stableopt.nn.activations import NActivation
from stableopt.nn.branches import branch_constant
from stableopt.nn.centering import BallProjection, BatchCentering, InputNormalization, LayerCentering
from stableopt.nn.householder import Householder
from stableopt.nn.recurrent import LastStep, Recurrence
from stableopt.nn.residual import AveragedResidual
from stableopt.nn.splines import LinearSpline
from stableopt.nn.structure import Concat, Merge, Parallel
from stableopt.nn.uniform import uniform_bound
from tests.nn import module_laws as laws
from tests.nn.catalogue import jacobian
from tests.nn.module_laws import EPS, NORMS


def linear(n: int = 4, m: int = 4) -> nn.Module:
    return nn.Linear(n, m)


class Unruled(nn.Module):
    """A module whose class has no rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def trained_batch_centering(n: int) -> BatchCentering:
    module = BatchCentering(n)
    module(torch.randn(9, n) + 3.0)
    return module


BRANCHED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("residual", lambda: AveragedResidual(nn.Sequential(linear(), nn.Tanh()), 0.3), (4,)),
    ("residual fixed", lambda: AveragedResidual(linear(), 0.9, learnable=False), (4,)),
    ("residual nested", lambda: AveragedResidual(AveragedResidual(linear(), 0.4)), (4,)),
    ("concat", lambda: Concat(nn.Identity(), linear(), nn.ReLU()), (4,)),
    ("concat last", lambda: Concat(nn.Tanh(), linear(4, 2), dim=-1), (3, 4)),
    ("parallel", lambda: Parallel(linear(2, 3), nn.ReLU(), sizes=(2, 2)), (4,)),
    ("parallel last", lambda: Parallel(GroupSort(), linear(3, 1), sizes=(1, 3), dim=-1), (2, 4)),
    ("merge", lambda: Merge(nn.Identity(), linear(), nn.Tanh()), (4,)),
    ("merge signed", lambda: Merge(nn.Identity(), linear(), weights=(-2.0, 0.5)), (4,)),
    ("merge l2", lambda: Merge(nn.Identity(), linear(), by="l2"), (4,)),
    ("merge l2 weighted", lambda: Merge(linear(), linear(), nn.Tanh(), weights=(2.0, 0.0, 3.0), by="l2"), (4,)),
]
FIXED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("normalization", lambda: InputNormalization([0.1, 0.2, -0.3], [0.5, 0.25, 2.0]), (3, 2, 2)),
    ("normalization of all", lambda: InputNormalization(0.13, 0.31), (1, 3, 2)),
    ("normalization mixed", lambda: InputNormalization(0.5, [0.5, 2.0]), (2,)),
    ("layer centering", lambda: LayerCentering(5), (5,)),
    ("layer centering 2d", lambda: LayerCentering((2, 3), bias=False), (2, 2, 3)),
    ("layer centering 1", lambda: LayerCentering(1), (3, 1)),
    ("batch centering", lambda: trained_batch_centering(3), (3,)),
    ("batch centering image", lambda: BatchCentering(2, bias=False), (2, 3, 1)),
]


def cases(rows: list) -> list[object]:
    return [pytest.param(make, shape, id=name) for name, make, shape in rows]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("make", "shape"), cases(BRANCHED))
def test_nothing_is_stretched_by_more_than_the_branches_allow(make: Callable, shape: tuple, norm: str) -> None:
    laws.check_pairs(make(), shape, norm)
    laws.check_jacobians(make(), shape, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("make", "shape"), cases(FIXED))
def test_an_affine_layer_has_exactly_its_constant(make: Callable, shape: tuple, norm: str) -> None:
    module = make().eval()
    laws.check_pairs(module, shape, norm)
    laws.check_jacobians(module, shape, norm)
    exact = laws.matrix_norm(jacobian(module, torch.randn(1, *shape)), norm)
    assert laws.constant(module, norm) == pytest.approx(exact, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize(("make", "shape"), cases([*BRANCHED, *FIXED, ("ball", lambda: BallProjection(1.5), (2, 2))]))
def test_copies_devices_and_gradients(make: Callable, shape: tuple) -> None:
    laws.check_copies(make(), shape)
    laws.check_devices_and_dtypes(make(), shape)
    if shape != (3, 1):  # centering one entry is constant
        module = make()
        module.requires_grad_(False)  # the parameters of layers beside ours are not the subject
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                parameter.requires_grad_(name in {"raw_weight", "bias"} and not isinstance(part, nn.Linear))
        laws.check_gradients(_OnlyTrainable(module), shape)


class _OnlyTrainable(nn.Module):
    """Hides the frozen parameters from the law of gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def named_parameters(self, *args: object, **kwargs: object):
        return ((n, p) for n, p in super().named_parameters() if p.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


# AveragedResidual.


@given(a=st.floats(0.01, 0.99), L=st.floats(0, 3))
def test_the_constant_of_a_residual_is_the_convex_mix(a: float, L: float) -> None:
    for learnable in (True, False):
        module = AveragedResidual(Scale(L), a, learnable=learnable)
        exact = (1 - a) + a * L
        for norm in ("l2", "linf"):
            assert laws.constant(module, norm) == pytest.approx(exact, rel=1e-13)
        assert laws.attained(module, torch.randn(1, 3), "l2") == pytest.approx(1.0, rel=1e-13)


def test_a_branch_of_constant_one_stays_at_one_for_every_weight() -> None:
    for raw in (-800.0, -40.0, 0.0, 40.0, 800.0):
        module = AveragedResidual(nn.Tanh())
        nn.init.constant_(module.raw_weight, raw)
        assert lipschitz(module).upper == 1.0
    deep = nn.Sequential(*[AveragedResidual(nn.Tanh()) for _ in range(50)])
    assert lipschitz(deep).upper == 1.0
    for raw in (-800.0, 800.0):  # at the ends it is the input and the branch
        module = AveragedResidual(Scale(3.0))
        nn.init.constant_(module.raw_weight, raw)
        assert lipschitz(module).upper == pytest.approx(1.0 if raw < 0 else 3.0)
        torch.testing.assert_close(module(torch.ones(2)), torch.full((2,), 1.0 if raw < 0 else 3.0))


def test_a_plain_sum_would_break_the_limit() -> None:
    x, y = torch.zeros(1, 3), torch.ones(1, 3)
    branch = nn.Identity()
    module = AveragedResidual(branch, 0.5).requires_grad_(False)
    assert float((module(y) - module(x)).norm()) == pytest.approx(float((y - x).norm()))
    assert float((y + branch(y) - x - branch(x)).norm()) == 2 * float((y - x).norm())


def test_the_stated_weight_is_the_weight() -> None:
    for weight in (0.1, 0.5, 0.9):
        for learnable in (True, False):
            module = AveragedResidual(Scale(0.0), weight, learnable=learnable).requires_grad_(False)
            assert float(module(torch.ones(1))) == pytest.approx(1 - weight)
    for weight in (0.0, 1.0):
        assert float(AveragedResidual(Scale(0.0), weight, learnable=False)(torch.ones(1))) == 1 - weight


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_weights_that_are_not_convex_are_refused(weight: float) -> None:
    for learnable in (True, False):
        with pytest.raises(ValueError, match="weight must lie in"):
            AveragedResidual(nn.Identity(), weight, learnable=learnable)
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"\(0, 1\) to be learned"):
            AveragedResidual(nn.Identity(), end)


def test_a_residual_refuses_other_shapes_and_nan() -> None:
    with pytest.raises(ValueError, match=r"keep the shape, got \(1, 2\) from \(1, 4\)"):
        AveragedResidual(nn.Linear(4, 2))(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="keep the shape"):
        AveragedResidual(nn.Linear(4, 1))(torch.zeros(1, 4))  # would broadcast
    module = AveragedResidual(nn.Identity())
    nn.init.constant_(module.raw_weight, math.nan)
    with pytest.raises(ValueError, match="raw weight nan"):
        lipschitz(module)


# Concat, Parallel, Merge.


@given(parts=st.lists(st.floats(0, 3), min_size=1, max_size=4))
def test_the_constants_of_combinations_are_attained_by_scales(parts: list[float]) -> None:
    x = torch.randn(1, 2)
    branches = [Scale(c) for c in parts]
    k = len(parts)
    expected = {"l2": math.hypot(*parts), "linf": max(parts), "l1": sum(parts)}
    for norm in NORMS:
        assert laws.constant(Concat(*branches), norm) == pytest.approx(expected[norm], rel=1e-14)
        assert laws.constant(Parallel(*branches, sizes=(2,) * k), norm) == max(parts)
        assert laws.constant(Merge(*branches), norm) == pytest.approx(sum(parts) / k, rel=1e-14)
        if max(parts) > 1e-3:
            assert laws.attained(Concat(*branches), x, norm) == pytest.approx(1.0, rel=1e-13)
            assert laws.attained(Parallel(*branches, sizes=(2,) * k), torch.randn(1, 2 * k), norm) == pytest.approx(1.0)
            assert laws.attained(Merge(*branches), x, norm) == pytest.approx(1.0, rel=1e-13)
    for norm in ("l2", "linf"):
        if max(parts) > 1e-3:
            assert laws.attained(Merge(*branches, by="l2"), x, norm) == pytest.approx(1.0, rel=1e-13)


def test_the_euclidean_merge_attains_its_l1_constant() -> None:
    """One branch moves the first entry, the other the second, both from the same input."""
    first, second = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [0.0]]))
        second.weight.copy_(torch.tensor([[0.0], [1.0]]))
    module = Merge(first, second, by="l2")
    assert laws.constant(module, "l1") == pytest.approx(math.sqrt(2))
    assert laws.attained(module, torch.ones(1, 1), "l1") == pytest.approx(1.0)
    assert laws.constant(module, "l2") == pytest.approx(1.0)


@pytest.mark.parametrize("k", range(1, 12))
def test_equal_weights_never_add_up_to_more_than_one(k: int) -> None:
    branches = [nn.Tanh()] * k
    for by in ("sum", "l2"):
        bound = lipschitz(Merge(*branches, by=by)).upper
        assert 1 - 1e-15 <= bound <= 1.0
    assert laws.constant(Concat(*branches), "l2") == pytest.approx(math.sqrt(k), rel=1e-15)


def test_combinations_compute_their_formulas() -> None:
    x = torch.randn(5, 4)
    f, g = nn.Tanh(), Scale(3.0)
    torch.testing.assert_close(Concat(f, g)(x), torch.cat([f(x), g(x)], 1))
    torch.testing.assert_close(Parallel(f, g, sizes=(1, 3))(x), torch.cat([f(x[:, :1]), g(x[:, 1:])], 1))
    torch.testing.assert_close(Merge(f, g)(x), (f(x) + g(x)) / 2)
    torch.testing.assert_close(Merge(f, g, weights=(2, -1))(x), 2 * f(x) - g(x))
    torch.testing.assert_close(Merge(f, g, weights=(4, 9), by="l2")(x), (4 * f(x) ** 2 + 9 * g(x) ** 2).sqrt())
    zero = torch.zeros(1, 2, requires_grad=True)
    Merge(f, g, by="l2")(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.tolist() == [[0.0, 0.0]]


def test_a_part_without_a_rule_is_named() -> None:
    for module in (
        Concat(nn.ReLU(), Unruled()),
        Parallel(nn.ReLU(), Unruled(), sizes=(1, 1)),
        Merge(nn.ReLU(), Unruled()),
    ):
        with pytest.raises(UncertifiableError, match=r"in branches\.1: .*Unruled"):
            lipschitz(module)
    with pytest.raises(UncertifiableError, match=r"in branch: .*Unruled"):
        lipschitz(AveragedResidual(Unruled()))
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(UncertifiableError, match="forward hook"):
        lipschitz(Concat(hooked))


def test_branches_that_do_not_fit_are_refused() -> None:
    for kind in (Concat, Merge):
        with pytest.raises(ValueError, match="at least one branch"):
            kind()
        with pytest.raises(TypeError, match=r"must be torch\.nn\.Modules, got function"):
            kind(lambda x: x)
    with pytest.raises(TypeError, match=r"must be torch\.nn\.Modules"):
        AveragedResidual(torch.tanh)  # type: ignore[arg-type]
    for dim in (0, 1.0, True):
        with pytest.raises(ValueError, match="other than 0, the batch"):
            Concat(nn.ReLU(), dim=dim)
        with pytest.raises(ValueError, match="other than 0, the batch"):
            Parallel(nn.ReLU(), sizes=(1,), dim=dim)
    for sizes in ((1, 2), (0,), (1.0,), (True,)):
        with pytest.raises(ValueError, match="one integer size >= 1 per branch"):
            Parallel(nn.ReLU(), sizes=sizes)
    for shape in ((1, 3), (2,)):
        with pytest.raises(ValueError, match="the sizes must add up"):
            Parallel(nn.ReLU(), nn.ReLU(), sizes=(1, 1))(torch.zeros(shape))
    for weights in ((1.0,), (1.0, math.nan), (1.0, math.inf)):
        with pytest.raises(ValueError, match="one finite weight per branch"):
            Merge(nn.ReLU(), nn.ReLU(), weights=weights)
    with pytest.raises(ValueError, match=">= 0"):
        Merge(nn.ReLU(), weights=(-1.0,), by="l2")
    with pytest.raises(ValueError, match="by must be 'sum' or 'l2'"):
        Merge(nn.ReLU(), by="max")
    with pytest.raises(ValueError, match="different shapes"):
        Merge(nn.Linear(2, 2), nn.Linear(2, 1))(torch.zeros(1, 2))


IN_PLACE: list[Callable[..., nn.Module]] = [
    AveragedResidual,
    lambda branch: Concat(nn.Identity(), branch),
    lambda branch: Merge(nn.Identity(), branch, by="l2"),
    lambda branch: Parallel(nn.Identity(), branch, sizes=(2, 2)),
]


@pytest.mark.parametrize("build", IN_PLACE)
def test_a_branch_that_overwrites_its_input_is_refused(build: Callable[..., nn.Module]) -> None:
    """The skip and the other branches would read what it wrote: (1 - a) x + a g(x) becomes g(x)."""
    for branch in (
        nn.LeakyReLU(3.0, inplace=True),
        nn.Sequential(nn.Linear(2, 2), nn.SELU(inplace=True)),
        nn.Dropout(inplace=True),
    ):
        with pytest.raises(
            ValueError,
            match=r"(AveragedResidual|Concat|Merge|Parallel) got .*inplace=True.*other branches.*inplace=False",
        ):
            build(branch)
    late = nn.SELU()
    module = build(nn.Sequential(nn.Identity(), late))
    bound = lipschitz(module)
    late.inplace = True  # after the check of the constructor
    for norm in NORMS:
        with pytest.raises(
            UncertifiableError, match=r"no bound holds for .*SELU\(inplace=True\) in branch ., part '1',"
        ):
            lipschitz(module, norm)
    with pytest.raises(UncertifiableError, match="inplace=True"):
        branch_constant(module, [bound] * 2, "l2")
    late.inplace = False
    assert lipschitz(module) == bound


# Embedding.


@pytest.mark.parametrize("module", [nn.Embedding(3, 2), nn.EmbeddingBag(3, 2)], ids=["embedding", "bag"])
def test_an_embedding_has_no_constant_in_indices(module: nn.Module) -> None:
    for norm in NORMS:
        with pytest.raises(UncertifiableError, match="no distance between indices"):
            lipschitz_rule(module, norm)
    with pytest.raises(UncertifiableError, match=r"'0'.*no distance between indices"):
        lipschitz(nn.Sequential(module, nn.ReLU()))


# Normalisations.


def test_epsilon_is_in_raw_input_units() -> None:
    """Digits of MNIST: a constant of 1 behind the layer is 1/std in front of it, and the smallest std counts."""
    model = nn.Sequential(InputNormalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), nn.ReLU())
    assert lipschitz(model).upper == pytest.approx(1 / 0.224, rel=1e-13)
    x = torch.rand(1, 3, 2, 2)
    y = x.clone()
    y[0, 1] += 0.1  # the channel of the smallest deviation
    ratio = (model[0](y) - model[0](x)).norm() / (y - x).norm()
    assert float(ratio) == pytest.approx(1 / 0.224)
    assert float(ratio) > 1.02 / 0.229  # one over the largest deviation would have been 2 % too small


def test_normalization_is_saved_and_cast_but_not_trained() -> None:
    module = InputNormalization([0.5, 0.1], [0.25, 0.3])
    assert sorted(module.state_dict()) == ["mean", "std"]
    assert not list(module.parameters())
    x = torch.rand(4, 2, 3)
    torch.testing.assert_close(module(x)[:, 1], (x[:, 1] - 0.1) / 0.3)
    torch.testing.assert_close(module(x[0, :, 0]), (x[0, :, 0] - torch.tensor([0.5, 0.1])) / torch.tensor([0.25, 0.3]))
    bf16 = module.bfloat16()
    stored = float(bf16.std.double().min())
    assert lipschitz_rule(bf16, "l2").upper == pytest.approx(1 / stored, rel=1e-15)
    assert lipschitz_rule(InputNormalization(0, 1), "l2").upper == 1.0
    tiny = InputNormalization(0.0, 1e-9).half()  # the deviation underflows
    with pytest.raises(ValueError, match="a cast to a narrower dtype"):
        lipschitz_rule(tiny, "l2")


def test_normalization_of_data_gives_mean_zero_and_deviation_one() -> None:
    data = 3.0 + 2.0 * torch.randn(50, 3, 4)
    out = InputNormalization.from_data(data)(data).movedim(1, 0).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(3), rtol=0, atol=1e-13)
    torch.testing.assert_close(out.std(1, correction=0), torch.ones(3))
    with pytest.raises(ValueError, match="shape"):
        InputNormalization.from_data(torch.zeros(3))
    with pytest.raises(ValueError, match="A constant channel"):
        InputNormalization.from_data(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, 0.0, "std must be positive"),
        (0.0, -1.0, "std must be positive"),
        (0.0, [1.0, math.nan], "std must be positive"),
        (0.0, math.inf, "std must be positive"),
        (math.nan, 1.0, "mean must be finite"),
        ([0.0, math.inf], 1.0, "mean must be finite"),
        ([0.0, 0.0], [1.0, 1.0, 1.0], "one per channel"),
        ([[0.0]], 1.0, "one per channel"),
        ([], [], "std must be positive"),
    ],
)
def test_statistics_that_are_none_are_refused(mean: object, std: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputNormalization(mean, std)  # type: ignore[arg-type]


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="built for 3 channels, got 2"):
        InputNormalization([0.0] * 3, [1.0] * 3)(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="built for 3 channels, got 2"):
        BatchCentering(3)(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"shape \(N, C, ...\)"):
        BatchCentering(3)(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got an input of shape \(1, 2\)"):
        LayerCentering(3)(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="empty batch"):
        BatchCentering(3)(torch.zeros(0, 3))
    for bad in (0, 1.0, True, (2, 0), ()):
        with pytest.raises(ValueError, match="normalized_shape must be integers"):
            LayerCentering(bad)  # type: ignore[arg-type]
    for bad in (0, 1.0, True):
        with pytest.raises(ValueError, match="num_features must be an integer"):
            BatchCentering(bad)  # type: ignore[arg-type]
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="momentum must lie in"):
            BatchCentering(1, momentum=bad)


@given(n=st.integers(2, 12))
def test_centering_is_a_projection_with_its_three_constants(n: int) -> None:
    module = LayerCentering(n, bias=False)
    J = jacobian(module, torch.randn(1, n))
    torch.testing.assert_close(J @ J, J, rtol=0, atol=1e-14)
    assert laws.constant(module, "l2") == 1.0
    for norm in ("linf", "l1"):
        assert laws.constant(module, norm) == pytest.approx(2 - 2 / n, rel=1e-15)
    x = torch.randn(3, n)
    reference = nn.functional.layer_norm(x, (n,)) * x.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(module(x), reference, rtol=1e-4, atol=1e-4)  # torch divides by sqrt(var + 1e-5)


def test_batch_centering_centers_batches_in_training_and_translates_in_evaluation() -> None:
    module = BatchCentering(2, momentum=0.25)
    x = torch.randn(6, 2, 3) + 5.0
    y = module(x)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(2), rtol=0, atol=1e-14)
    torch.testing.assert_close(module.running_mean, 0.25 * x.mean((0, 2)))
    module.eval()
    before = module.running_mean.clone()
    torch.testing.assert_close(module(x), x - before[:, None])
    assert torch.equal(module.running_mean, before)
    assert lipschitz(module) == lipschitz(module.train())
    module.reset_parameters()
    assert not module.running_mean.any()
    module.running_mean.fill_(math.nan)
    with pytest.raises(ValueError, match="BatchCentering with NaN"):
        lipschitz_rule(module, "l2")
    layer = LayerCentering(2)
    nn.init.constant_(layer.bias, math.inf)
    with pytest.raises(ValueError, match="LayerCentering with NaN"):
        lipschitz_rule(layer, "l2")


def test_the_ball_projection_is_nearest_and_never_expands() -> None:
    module = BallProjection(1.5)
    laws.check_pairs(module, (4,), "l2")
    laws.check_jacobians(module, (4,), "l2")
    x = 4 * torch.randn(200, 3)
    y = module(x)
    assert float(y.norm(dim=1).max()) <= 1.5 * (1 + 4 * EPS)
    inside = x.norm(dim=1) <= 1.5
    assert torch.equal(y[inside], x[inside])
    z = torch.randn(200, 3)
    z = 1.5 * z / z.norm(dim=1, keepdim=True).clamp_min(1.0)  # any point of the ball
    assert (((x - y) * (z - y)).sum(1) <= 1e-12).all()  # the variational inequality of a projection
    assert laws.attained(module, torch.full((1, 3), 0.1), "l2") == pytest.approx(1.0)
    for norm in ("linf", "l1"):
        with pytest.raises(UncertifiableError, match="grows with the dimension"):
            lipschitz_rule(module, norm)
    growth = []
    for n in (4, 100):  # the growth that the message states
        point = torch.ones(1, n) / math.sqrt(n)
        point[0, 0] = 1.0
        growth.append(laws.matrix_norm(jacobian(BallProjection(1.0), point * 1.0001), "linf"))
    assert growth[1] > 2 * growth[0] > 2.0
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="radius must be positive"):
            BallProjection(bad)
    with pytest.raises(ValueError, match="shape"):
        module(torch.zeros(3))


@given(exponent=st.integers(-300, 300), radius=st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]))
def test_the_ball_projection_holds_at_every_scale(exponent: int, radius: float) -> None:
    direction = torch.tensor([[3.0, 0.0, 4.0, 12.0]])
    x = direction * 10.0**exponent
    expected = x if 13 * 10.0**exponent <= radius else direction / 13 * radius
    torch.testing.assert_close(BallProjection(radius)(x), expected, rtol=1e-14, atol=0)


def test_the_ball_projection_of_float32_does_not_overflow() -> None:
    y = BallProjection(1.0)(torch.full((1, 4), 1e30, dtype=torch.float32))
    torch.testing.assert_close(y, torch.full((1, 4), 0.5, dtype=torch.float32))
    assert BallProjection()(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalisations_with_wide_numbers_keep_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    for module in (BatchCentering(2), BatchCentering(2).eval(), LayerCentering(2), InputNormalization([0.1, 0.2], 0.5)):
        assert module.float()(torch.ones(3, 2, dtype=dtype)).dtype == dtype
    assert InputNormalization(0.5, 0.25)(torch.tensor([1, 2])).tolist() == [2.0, 6.0]  # integers become real numbers


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_an_empty_batch_does_not_spoil_the_running_mean(shape: tuple[int, ...]) -> None:
    module = BatchCentering(3)
    with pytest.raises(ValueError, match=r"empty batch in training, got shape"):
        module(torch.zeros(shape))
    assert module.running_mean.isfinite().all()
    assert module.eval()(torch.zeros(shape)).shape == shape


# Bounds for all values of the parameters.


TRAINABLE: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("zigzag", lambda: NActivation(4), (4,)),
    ("householder", lambda: Householder(4), (4,)),
    ("householder 4", lambda: Householder(4, 4), (4,)),
    ("spline", lambda: LinearSpline(4, knots=5, limit=1.5), (4,)),
    ("layer centering", lambda: LayerCentering(4), (4,)),
    ("batch centering", lambda: BatchCentering(4), (4,)),
    ("gradient block", lambda: GradientBlock(4), (4,)),
    ("residual", lambda: AveragedResidual(Scale(3.0)), (4,)),
    ("residual of zigzag", lambda: AveragedResidual(NActivation(4)), (4,)),
    ("concat", lambda: Concat(NActivation(4), Householder(4)), (4,)),
    ("parallel", lambda: Parallel(NActivation(2), Scale(2.0), sizes=(2, 2)), (4,)),
    ("merge", lambda: Merge(NActivation(4), LinearSpline(4), weights=(2.0, -1.0)), (4,)),
    ("merge l2", lambda: Merge(NActivation(4), LinearSpline(4), by="l2"), (4,)),
    ("chain", lambda: nn.Sequential(NActivation(4), Scale(0.5), LinearSpline(4, limit=3.0)), (4,)),
]


@pytest.mark.parametrize(("make", "shape"), cases(TRAINABLE))
def test_a_uniform_bound_holds_whatever_training_does(make: Callable, shape: tuple) -> None:
    module = make()
    for norm in NORMS:
        uniform = uniform_bound(module, norm)
        if uniform is None:
            assert isinstance(module, GradientBlock)
            assert norm != "l2"
            continue
        assert uniform.proved
        for scale in (0.0, 0.1, 1.0, 30.0):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(scale * torch.randn_like(parameter))
            assert laws.constant(module, norm) <= uniform.upper
            laws.check_jacobians(module.eval(), shape, norm)


def test_the_uniform_bound_is_reached_by_some_parameters() -> None:
    assert uniform_bound(LinearSpline(1, limit=1.5)).upper == 1.5
    assert uniform_bound(AveragedResidual(Scale(3.0))).upper == 3.0
    assert uniform_bound(AveragedResidual(Scale(0.5))).upper == 1.0
    assert uniform_bound(Householder(4, 4), "linf").upper == 2.0
    half = Householder(4, 4)
    nn.init.ones_(half.direction)  # I - 11^T/2 has the row sum 2
    assert laws.constant(half, "linf") == 2.0
    assert uniform_bound(nn.Sequential(AveragedResidual(Scale(3.0)), Scale(2.0))).upper == 6.0


def test_what_training_can_change_has_no_uniform_bound() -> None:
    linear = nn.Linear(2, 2)
    for module in (
        linear,
        AveragedResidual(linear),
        Concat(nn.ReLU(), linear),
        nn.Sequential(nn.ReLU(), linear),
        nn.Sequential(NActivation(2), Unruled()),
        nn.PReLU(),
    ):
        assert uniform_bound(module) is None
    linear.requires_grad_(False)
    assert uniform_bound(linear).upper == lipschitz(linear).upper
    with pytest.raises(UncertifiableError, match="Unruled"):
        uniform_bound(Unruled())

    class Louder(NActivation):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UncertifiableError, match="overrides forward"):
        uniform_bound(Louder(2))


STATISTICS: list[Callable[[], nn.Module]] = [
    lambda: nn.BatchNorm1d(3, affine=False),
    lambda: nn.BatchNorm1d(3).requires_grad_(False),
    lambda: nn.BatchNorm1d(3, momentum=None, affine=False),
    lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.ReLU()),
    lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.BatchNorm1d(3, affine=False)),
    lambda: AveragedResidual(nn.BatchNorm1d(3, affine=False), learnable=False),
]


@pytest.mark.parametrize("make", STATISTICS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_uniform_bound_holds_whatever_the_running_statistics_become(make: Callable[[], nn.Module], norm: str) -> None:
    module = make()
    uniform = uniform_bound(module, norm)
    assert uniform is not None
    assert uniform.upper <= 1.0001 / math.sqrt(1e-5)
    module.train()
    for scale in (1e-3, 1e-6, 0.0, 100.0):
        for _ in range(200):
            module(scale * torch.randn(5, 3))
        assert lipschitz(module, norm).upper <= uniform.upper
    if not isinstance(module, AveragedResidual):
        for _ in range(400):
            module(torch.zeros(5, 3))
        momentum = next(part.momentum for part in module.modules() if isinstance(part, nn.BatchNorm1d))
        assert momentum is None or lipschitz(module, norm).upper >= 0.99 * uniform.upper  # nearly attained
    assert uniform_bound(module.eval(), norm).upper == pytest.approx(uniform.upper)  # a later train() moves them again


def test_statistics_that_cannot_move_have_the_bound_of_now() -> None:
    fixed = nn.BatchNorm1d(3, affine=False, momentum=0.0)
    assert uniform_bound(fixed).upper == lipschitz(fixed).upper < 1.0
    fixed(1e-3 * torch.randn(5, 3))
    assert uniform_bound(fixed).upper == lipschitz(fixed).upper < 1.0
    off = nn.BatchNorm1d(3, affine=False)
    off.track_running_stats = False
    assert uniform_bound(off).upper < 1.0
    tracked = nn.InstanceNorm1d(3, track_running_stats=True)
    assert uniform_bound(tracked, "linf").upper == pytest.approx(1 / math.sqrt(1e-5))
    assert uniform_bound(nn.InstanceNorm1d(3)).upper == lipschitz(nn.InstanceNorm1d(3)).upper
    negative = nn.BatchNorm1d(3, affine=False, eps=1.0)
    negative.running_var.fill_(-0.75)
    assert uniform_bound(negative).upper == pytest.approx(2.0)
    for module in (
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, affine=False, momentum=1.5),  # may make a variance negative
        nn.BatchNorm1d(3, affine=False, eps=0.0),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).requires_grad_(False),
    ):
        assert uniform_bound(module) is None


def test_a_limited_model_keeps_its_limit_while_frozen_statistics_move() -> None:
    model = stabilize(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)), 1.0)
    for _ in range(200):
        model(1e-4 * torch.randn(8, 3))
    assert lipschitz(model).upper <= 1.0 + 1e-12
    trained = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(UncertifiableError, match=r"'1' \(BatchNorm1d\) has trainable parameters.*freeze them"):
        stabilize(trained, 1.0)


def test_a_uniform_bound_of_wrong_arguments_is_refused() -> None:
    for module in (NActivation(2), nn.Linear(2, 2), nn.ReLU()):
        with pytest.raises(ValueError, match="norm must be one of 'l2', 'linf', 'l1' and 'token_max', got 'l7'"):
            uniform_bound(module, "l7")
    with pytest.raises(TypeError, match=r"uniform_bound needs a torch\.nn\.Module, got int"):
        uniform_bound(3)  # type: ignore[arg-type]


def test_parts_of_two_tokens_may_meet_in_one_behind_parallel_branches() -> None:
    """In the norm of the largest token the constants of branches that mix tokens add up as squares."""
    cell = nn.RNNCell(1, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        cell.weight_hh.fill_(0.99)
        cell.weight_ih.fill_(0.01)
    model = nn.Sequential(Parallel(nn.Identity(), Recurrence(cell), sizes=(1, 1), dim=-1), LastStep())
    x = torch.zeros(1, 1000, 2)
    x[..., 1] = 1.0
    y = x.clone()
    y[:, -1] = torch.tensor([1.0, 0.0])  # one token has the first part, all others the second
    with torch.no_grad():
        moved = float((model(y) - model(torch.zeros_like(x))).norm())
    assert 1.3 < moved <= lipschitz(model, "token_max").upper <= math.sqrt(2) + 1e-9
