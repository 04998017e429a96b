"""Laws of stabilize: the limit holds at every step and for every weight, a refusal leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.constraints import NonNegative, SpectralBall
from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, conv_norm, spectral_norm
from stableopt.nn import (
    GradientBlock,
    GroupSort,
    NormLimit,
    Scale,
    constrain,
    layer_limit,
    layers,
    lipschitz,
    stabilize,
)
from tests.nn.training import train


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), GroupSort(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), GroupSort(), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.GELU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *[GradientBlock(8, depth=5, strong=0.2) for _ in range(5)], nn.Linear(8, 3))


def sequence() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.MaxPool1d(3, stride=1),
        nn.Flatten(),
        nn.Linear(24, 2),
    )


MODELS = {"mlp": (mlp, (6,)), "cnn": (cnn, (1, 8, 8)), "deep": (deep, (6,)), "sequence": (sequence, (2, 8))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("init", ["rescale", "orthogonal", "keep"])
def test_the_model_keeps_its_limit_before_and_while_training(name: str, limit: float, init: str) -> None:
    make, shape = MODELS[name]
    model = stabilize(make(), limit, init=init)
    opt = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(4):
        assert lipschitz(model).upper <= limit
        opt.zero_grad()
        model(torch.randn(5, *shape)).square().sum().neg().backward()  # pull outwards
        opt.step()
    assert lipschitz(model).upper <= limit


@pytest.mark.parametrize("name", ["mlp", "cnn", "sequence"])
def test_the_start_uses_the_limit(name: str) -> None:
    model = stabilize(MODELS[name][0](), 2.0)
    for _, layer in layers(model):
        limit = layer_limit(layer)
        if limit is not None:
            assert 0.85 * limit <= lipschitz(layer).upper <= limit * 1.08


def test_the_radii_multiply_to_the_limit() -> None:
    model = stabilize(cnn(), 3.0)
    radii = [layer_limit(layer) for _, layer in layers(model) if layer_limit(layer) is not None]
    rest = [lipschitz(layer).upper for _, layer in layers(model) if layer_limit(layer) is None]
    assert len(radii) == 3
    assert len(set(radii)) == 1
    assert math.prod(radii) * math.prod(rest) == pytest.approx(3.0, rel=1e-12)  # type: ignore[arg-type]
    assert layer_limit(stabilize(nn.Linear(2, 2), 0.7)) == 0.7


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.0])
def test_the_radii_are_rounded_so_that_the_product_obeys_the_limit(limit: float) -> None:
    for count in range(1, 40):
        model = stabilize(nn.Sequential(*[nn.Linear(1, 1) for _ in range(count)], nn.GELU()), limit)
        radius = layer_limit(model[0])
        assert radius is not None
        product = (Bound.point(radius) ** count * lipschitz(nn.GELU())).upper
        assert limit * (1 - 1e-13) <= product <= limit


def test_the_damping_of_a_block_is_not_spent() -> None:
    """A block counts 1, not its bound of the moment, which training may raise."""
    model = stabilize(deep(), 1.0)
    assert layer_limit(model[0]) == 1.0
    assert lipschitz(model[1]).upper < 1.0


def test_a_repeated_layer_counts_each_time() -> None:
    layer = nn.Linear(4, 4)
    model = stabilize(nn.Sequential(layer, nn.ReLU(), layer), 4.0)
    assert layer_limit(layer) == pytest.approx(2.0)
    assert lipschitz(model).upper <= 4.0


def jump(weight: torch.Tensor) -> torch.Tensor:
    flat = 0.1 * torch.randn(weight.shape).flatten(1)
    spike = 0.2 * torch.randn(flat.shape[0], 1) @ torch.randn(1, flat.shape[1])
    return (flat + 30 * spike).view(weight.shape)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(4, 6, 3), nn.Conv1d(3, 2, 5)], ids=str)
@pytest.mark.parametrize("mode", [True, False])
def test_a_weight_jump_is_followed_at_once(layer: nn.Module, mode: bool) -> None:
    layer = stabilize(copy.deepcopy(layer).double(), 1.0).train(mode)
    for _ in range(3):
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(jump(layer.weight))  # type: ignore[union-attr]
        norm = conv_norm(layer.weight) if layer.weight.ndim > 2 else spectral_norm(layer.weight)  # type: ignore[union-attr, arg-type]
        assert 0.5 < norm.upper <= 1.0  # type: ignore[union-attr]


def test_the_result_has_no_history_and_no_mode() -> None:
    model = stabilize(cnn(), 1.0)
    x = torch.randn(2, 1, 8, 8)
    first = model.eval()(x)
    for _ in range(5):
        model.train()(torch.randn(2, 1, 8, 8))
    torch.testing.assert_close(model.eval()(x), first, rtol=0, atol=0)
    torch.testing.assert_close(model.train()(x), first, rtol=0, atol=0)
    assert dict(model.named_buffers()) == {}


def test_weights_within_the_limit_are_kept_bit_for_bit() -> None:
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1)
    before = model(torch.ones(1, 6))
    torch.testing.assert_close(stabilize(model, 1.0, init="keep")(torch.ones(1, 6)), before, rtol=0, atol=0)


@given(
    m=st.integers(1, 9), n=st.integers(1, 9), rank_one=st.booleans(), log_scale=st.integers(-20, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), radius=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_stored_numbers_obey_the_radius(
    m: int, n: int, rank_one: bool, log_scale: int, dtype: torch.dtype, radius: float, seed: int
) -> None:
    """Also where Gram iteration is exact (rank one), and after rounding to the storage dtype."""
    torch.manual_seed(seed)
    W = torch.randn(m, 1) @ torch.randn(1, n) if rank_one else torch.randn(m, n)
    W = (10.0**log_scale * W).to(dtype)
    limited = NormLimit(radius)(W)
    assert limited.dtype == dtype
    assert spectral_norm(limited).upper <= radius
    if spectral_norm(W).upper > radius * 1.1:
        assert spectral_norm(limited).upper >= radius / (1.05 + 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(2, 2, 3)], ids=str)
def test_zero_weights_stay_zero_with_finite_gradients(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).double()
    nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    stabilize(layer, 1.0)
    x = torch.ones(1, 3) if isinstance(layer, nn.Linear) else torch.ones(1, 2, 4, 4)
    layer(x).sum().backward()
    assert not layer.weight.any()  # type: ignore[operator]
    grad = layer.parametrizations.weight.original.grad  # type: ignore[union-attr]
    assert grad.isfinite().all()
    assert grad.any()


def test_the_gradient_through_the_norm_is_right() -> None:
    limit = NormLimit(0.5)
    assert torch.autograd.gradcheck(limit, torch.randn(4, 3).requires_grad_())
    assert torch.autograd.gradcheck(NormLimit(0.5, groups=2), torch.randn(4, 1, 3).requires_grad_())


def test_orthogonal_starts_are_orthogonal() -> None:
    layer = stabilize(nn.Linear(6, 4), 1.0, init="orthogonal")
    W = layer.weight.detach()
    torch.testing.assert_close(W @ W.T, torch.eye(4) * float((W @ W.T)[0, 0]))
    conv = stabilize(nn.Conv2d(4, 4, 3, padding=1, groups=2), 1.0, init="orthogonal")
    kernel = conv.weight.detach().clone()
    kernel[:, :, 1, 1] = 0.0
    assert not kernel.any()


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_keep_the_map(name: str) -> None:
    make, shape = MODELS[name]
    model = stabilize(make(), 1.0)
    x = torch.randn(2, *shape)
    expected = model(x)
    fresh = stabilize(make(), 1.0)
    fresh.load_state_dict(model.state_dict())
    calls = [
        copy.deepcopy(model), fresh, torch.compile(model, backend="eager", fullgraph=True),
        lambda v: torch.func.functional_call(model, dict(model.named_parameters()), (v,)),
    ]  # fmt: skip
    for call in calls:
        torch.testing.assert_close(call(x), expected)
    bound = lipschitz(model).upper
    for _, layer in layers(model):
        if P.is_parametrized(layer):
            P.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert lipschitz(model).upper == bound
    assert fresh.to("meta")(x.to("meta")).shape == expected.shape


def test_the_radius_of_a_copy_is_readable() -> None:
    assert layer_limit(copy.deepcopy(stabilize(nn.Linear(2, 2), 0.5))) == 0.5
    assert "radius=0.5" in str(stabilize(nn.Linear(2, 2), 0.5))


def test_models_without_numbers_and_in_half_precision_work() -> None:
    with torch.device("meta"):
        model = stabilize(mlp(), 1.0)
    model.to_empty(device="cpu")
    source = stabilize(mlp(), 1.0)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(torch.ones(1, 6)), source(torch.ones(1, 6)), rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        for make in (mlp, cnn):
            half = stabilize(make().to(dtype), 1.0)
            assert lipschitz(half).upper <= 1.0
            assert lipschitz(stabilize(make(), 1.0).to(dtype)).upper <= 1.0  # converted afterwards


def test_autocast_does_not_loosen_the_limit() -> None:
    layer = stabilize(nn.Linear(48, 48).float(), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.weight.detach()
    torch.testing.assert_close(inside, layer.weight.detach(), rtol=0, atol=0)


def test_assigning_a_weight_goes_through_the_limit() -> None:
    layer = stabilize(nn.Linear(3, 3), 1.0)
    layer.weight = 0.3 * torch.eye(3)
    torch.testing.assert_close(layer.weight.detach(), 0.3 * torch.eye(3), rtol=0, atol=0)
    layer.weight = 100 * torch.randn(3, 3)
    assert 0.9 < lipschitz(layer).upper <= 1.0


def tied() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, second)


def bad_weight(value: float) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[3].weight[0, 0] = value
    return model


def hooked() -> nn.Module:
    model = mlp()
    model[3].register_forward_hook(lambda *_: None)
    return model


class Mine(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def positive() -> nn.Module:
    return constrain(nn.Linear(2, 2), "weight", NonNegative())


def projected() -> nn.Module:
    return constrain(nn.Linear(2, 2), "weight", SpectralBall(1.0), by="projection")


def reflected() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"))


REFUSED = [
    ("twice", lambda: stabilize(mlp(), 1.0), ValueError, r"'0' \(ParametrizedLinear\) is stabilized already"),
    ("parametrized", lambda: nn.Sequential(nn.Linear(2, 2), positive()), ValueError, "already"),
    ("projected", lambda: nn.Sequential(nn.Linear(2, 2), projected()), ValueError, "projection already"),
    ("unknown at the end", lambda: nn.Sequential(mlp(), nn.LayerNorm(3)), UncertifiableError, r"'1' \(LayerNorm\)"),
    ("container", lambda: nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.ReLU()])), UncertifiableError, r"nested nn\.Sequential"),
    ("tied", tied, ValueError, "shared"),
    ("nan", lambda: bad_weight(math.nan), ValueError, r"'3' \(Linear\) holds NaN"),
    ("inf", lambda: bad_weight(math.inf), ValueError, "NaN or infinity"),
    ("lazy", lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), ValueError, "lazy"),
    ("padding", reflected, UncertifiableError, r"'1' \(Conv1d\).*zeros"),
    ("hook", hooked, UncertifiableError, r"'3' \(Linear\) has a forward hook"),
    ("own forward", lambda: nn.Sequential(nn.Linear(2, 2), Mine(2, 2)), UncertifiableError, "overrides forward"),
    ("nothing", lambda: nn.Sequential(nn.ReLU()), ValueError, "no Linear"),
    ("closed", lambda: nn.Sequential(nn.Linear(2, 2), Scale(0.0)), ValueError, "constant 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
@pytest.mark.parametrize("init", ["rescale", "orthogonal"])
def test_a_refused_model_is_left_unchanged(make: object, error: type[Exception], message: str, init: str) -> None:
    model = make()  # type: ignore[operator]
    lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())
    before = (
        {k: v.clone() for k, v in model[0].state_dict().items()}
        if lazy
        else {k: v.clone() for k, v in model.state_dict().items()}
    )
    types = [type(part) for part in model.modules()]
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message):
        stabilize(model, 1.0, init=init)
    assert [type(part) for part in model.modules()] == types
    after = (model[0] if lazy else model).state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), rng)


def test_trainable_constants_are_refused() -> None:
    from stableopt.nn import lipschitz_rule

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.gain * x

    @lipschitz_rule.register(Gain)
    def _(module: Gain, norm: str) -> Bound:
        return Bound.point(abs(float(module.gain.detach())))

    with pytest.raises(UncertifiableError, match="trainable parameters"):
        stabilize(nn.Sequential(nn.Linear(2, 2), Gain()), 1.0)
    frozen = nn.Sequential(nn.Linear(2, 2), Gain().requires_grad_(False))
    assert lipschitz(stabilize(frozen, 1.0)).upper <= 1.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_no_positive_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="lipschitz must be positive and finite"):
        stabilize(mlp(), bad)
    with pytest.raises(ValueError, match="radius must be positive and finite"):
        NormLimit(bad)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="init must be one of"):
        stabilize(mlp(), 1.0, init="luck")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        stabilize(lambda x: x, 1.0)  # type: ignore[arg-type]


def test_a_frozen_weight_stays_frozen_and_an_optimizer_keeps_working() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    stabilize(model, 1.0)
    assert not model[0].weight.requires_grad
    before = model[3].weight.detach().clone()
    model(torch.randn(4, 6)).sum().backward()
    opt.step()
    assert not torch.equal(model[3].weight.detach(), before)


def test_a_failure_half_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    register, calls = P.register_parametrization, []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return register(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(P, "register_parametrization", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        stabilize(model, 0.5)
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.slow
def test_the_recommended_recipe_reaches_its_figures_under_the_limit() -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(64, 128), GroupSort(), nn.Linear(128, 128), GroupSort(), nn.Linear(128, 10))
    margins = train(stabilize(model, 1.0), 12.0, 0.5, lr=3e-3, epochs=80)
    bound = lipschitz(model).upper
    assert bound <= 1.0
    for radius, share in ((0.0, 0.97), (0.1, 0.94), (0.25, 0.89), (0.5, 0.57)):
        assert float((margins > math.sqrt(2) * radius * bound).double().mean()) >= share
