"""Laws of stabilize: the limit holds at every step and for every weight, a refusal leaves no trace."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.constraints import NonNegative, Orthogonal, SpectralBall
from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, conv_norm, spectral_norm
from stableopt.nn import (
    GradientBlock,
    GroupSort,
    Scale,
    constrain,
    layer_limit,
    layers,
    lipschitz,
    parameter_groups,
)
from stableopt.nn.export import export, release
from stableopt.nn.limits import limit_of, limited_slots
from stableopt.nn.slots import find_slots
from stableopt.nn.table import table
from stableopt.nn.weights import METHODS, Geometry, WeightMap
from stableopt.optim import SGD, AdamW
from tests.nn.methods import CASES, inputs, limited, norm_of
from tests.nn.training import train
from tests.nn.zoo import ANIMALS, stabilize


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
    limited = METHODS["gram"](Geometry("linear"), radius)(W)
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
    limit = METHODS["gram"](Geometry("linear"), 0.5)
    assert torch.autograd.gradcheck(limit, torch.randn(4, 3).requires_grad_())
    assert torch.autograd.gradcheck(
        METHODS["gram"](Geometry("conv", groups=2), 0.5), torch.randn(4, 1, 3).requires_grad_()
    )


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


REFUSED = [
    ("twice", lambda: stabilize(mlp(), 2.0), ValueError, r"'0' \(ParametrizedLinear\) is stabilized already.*lipschitz=2.0"),
    ("inside", lambda: nn.Sequential(stabilize(mlp(), 1.0)), ValueError, r"'0\.0' \(ParametrizedLinear\) is stabilized already"),
    ("parametrized", lambda: nn.Sequential(nn.Linear(2, 2), positive()), ValueError, "already"),
    ("projected", lambda: nn.Sequential(nn.Linear(2, 2), projected()), ValueError, "projection already"),
    ("unknown at the end", lambda: nn.Sequential(mlp(), nn.LayerNorm(3)), UncertifiableError, r"'1' \(LayerNorm\)"),
    ("container", lambda: nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.ReLU()])), UncertifiableError, r"nested nn\.Sequential"),
    ("tied", tied, ValueError, "shared"),
    ("nan", lambda: bad_weight(math.nan), ValueError, r"'3' \(Linear\) holds NaN"),
    ("inf", lambda: bad_weight(math.inf), ValueError, "NaN or infinity"),
    ("lazy", lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), ValueError, "lazy"),
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


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_padding_that_repeats_pixels_is_paid_for(mode: str) -> None:
    layer = stabilize(nn.Conv1d(1, 1, 3, padding=2, padding_mode=mode), 1.0)
    layer.weight = torch.tensor([[[1.0, 5.0, 1.0]]])
    J = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), torch.zeros(1, 1, 6))
    assert 0.4 < float(torch.linalg.matrix_norm(J.flatten(1), 2)) <= 1.0  # type: ignore[union-attr]


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
        stabilize(mlp(), radius=bad)


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


# --------------------------------------------------------------------------------------------------- any model, any norm, any way


@pytest.mark.parametrize("name", ANIMALS)
@pytest.mark.parametrize("mode", [True, False])
def test_every_kind_of_weight_keeps_its_radius_and_trains(name: str, mode: bool) -> None:
    animal = ANIMALS[name]
    model, x = animal.stabilized(0.7).train(mode), animal.x()
    slots = list(find_slots(model))
    assert tuple(slot.parts for slot in slots) == animal.parts
    opt = torch.optim.SGD(model.parameters(), lr=10.0)
    first = model(x).detach()
    for step in range(3):
        opt.zero_grad()
        (model(x) - 3.0).square().sum().backward()
        for key, p in model.named_parameters():
            assert p.grad is not None, key
            assert p.grad.any() or step, key  # later units may saturate: the steps are absurdly large
        opt.step()
        for slot in slots:
            for part in slot.matrices(slot.value):
                assert slot.geometry.proved(part).upper <= 0.7
    assert not torch.allclose(model(x), first)


@pytest.mark.parametrize("name", ANIMALS)
def test_every_kind_of_weight_starts_at_its_radius_and_the_raw_one_is_not_used(name: str) -> None:
    """torch's recurrent layers keep a list of the raw weights aside, which a parametrization leaves as it is."""
    animal = ANIMALS[name]
    model, x = animal.stabilized(0.7), animal.x()
    for slot in find_slots(model):
        for part in slot.matrices(slot.value):
            assert 0.5 <= slot.geometry.proved(part).upper <= 0.7
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("original"):
                p.mul_(1000.0)
    expected = export(model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def chain_for(norm: str) -> tuple[nn.Sequential, torch.Tensor]:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 6), nn.Tanh(), nn.Linear(6, 3)
    ), torch.randn(1, 2, 5)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("by", ["parametrization", "projection"])
@pytest.mark.parametrize("init", ["rescale", "orthogonal", "keep"])
def test_every_norm_is_limited_against_the_jacobian(norm: str, by: str, init: str) -> None:
    model, x = chain_for(norm)
    if by == "projection" and norm != "linf":
        model = nn.Sequential(*model[2:])  # no projection of a kernel is known in these norms
        x = torch.randn(1, 15)
    stabilize(model, 0.8, norm=norm, by=by, init=init)  # type: ignore[arg-type]
    order = {"l2": 2, "linf": float("inf"), "l1": 1}[norm]
    groups = parameter_groups(model)
    opt = SGD(groups, lr=0.5, guard="off") if by == "projection" else torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(4):
        J = torch.autograd.functional.jacobian(lambda v: model(v).flatten(), x).flatten(1)
        assert float(torch.linalg.matrix_norm(J, order)) <= 0.8
        opt.zero_grad()
        model(x).sum().neg().backward()
        opt.step()
    assert table(model).proved.upper <= 0.8  # type: ignore[union-attr]
    for slot, limit in limited_slots(model):
        assert limit.norm == norm
        assert slot.geometry.proved(slot.value, norm).upper <= limit.radius


@pytest.mark.parametrize(
    "name", [n for n in ANIMALS if n.startswith(("mlp", "rnn", "lstm", "gru", "attention", "embedding"))]
)
def test_projection_keeps_plain_parameters_within_the_radius(name: str) -> None:
    animal = ANIMALS[name]
    model, x = animal.stabilized(0.7, by="projection"), animal.x()
    assert list(model.state_dict()) == list(animal.make().state_dict())
    opt = SGD(parameter_groups(model), lr=1.0, guard="off")
    for _ in range(3):
        opt.zero_grad()
        (model(x) - 3.0).square().sum().backward()
        opt.step()
    for slot in find_slots(model):
        assert spectral_norm(slot.value).upper <= 0.7


def test_embeddings_are_limited_in_the_metric_of_one_hot_vectors() -> None:
    for norm, order in (("l2", 2), ("linf", float("inf")), ("l1", 1)):
        with pytest.warns(UserWarning, match="no Lipschitz bound"):
            layer = stabilize(nn.Embedding(5, 3), radius=0.9, norm=norm)  # type: ignore[arg-type]
        E = layer(torch.arange(5)).detach()  # row v is the image of the unit vector e_v
        assert 0.6 < float(torch.linalg.matrix_norm(E.T, order)) <= 0.9
        assert limit_of(layer, "weight").norm == norm  # type: ignore[union-attr]


def test_attention_limits_query_key_and_value_each_for_itself() -> None:
    model = ANIMALS["attention"].stabilized(0.7)
    W = model.attention.in_proj_weight.detach()  # type: ignore[union-attr]
    norms = [float(torch.linalg.matrix_norm(part, 2)) for part in W.chunk(3)]
    assert all(0.65 < norm <= 0.7 for norm in norms)
    assert float(torch.linalg.matrix_norm(W, 2)) > 0.75


@pytest.mark.parametrize("train", [True, False])
def test_the_fast_path_of_torch_uses_the_limited_weights(train: bool) -> None:
    model, x = ANIMALS["transformer"].stabilized(0.2).train(train), ANIMALS["transformer"].x()
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x), rtol=1e-9, atol=1e-9)


def test_a_model_that_is_no_chain_needs_a_radius_and_says_what_does_not_follow() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(UncertifiableError, match=r"LayerNorm.*Or pass radius="):
        stabilize(model, 1.0)
    with pytest.warns(
        UserWarning, match=r"each of the 1 weights found keeps its l2 norm within 0.5, but no .*LayerNorm"
    ):
        stabilize(model, radius=0.5)
    assert layer_limit(model[0]) == 0.5
    chain = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a bound follows: nothing to warn of
        stabilize(chain, radius=0.5)
    assert lipschitz(chain).upper <= 0.125


def test_repeating_a_call_changes_nothing() -> None:
    for options in (
        {"lipschitz": 2.0},
        {"radius": 0.5},
        {"budget": "fan"},
        {"budget": "learned"},
        {"by": "projection"},
        {"skip": ["2"]},
    ):
        model = mlp()
        model[2].requires_grad_(False)
        stabilize(model, **options)  # type: ignore[arg-type]
        before = {k: v.clone() for k, v in model.state_dict().items()}
        x = torch.randn(2, 6)
        expected = model(x)
        assert stabilize(model, **options) is model  # type: ignore[arg-type]
        assert stabilize(copy.deepcopy(model), **options)  # type: ignore[arg-type]
        assert model.state_dict().keys() == before.keys()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        for changed in ({"lipschitz": 3.0}, {"radius": 0.1}):
            with pytest.raises(ValueError, match=r"stabilized already, with .*release"):
                stabilize(model, **changed)  # type: ignore[arg-type]
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        stabilize(release(model), 5.0)


def test_a_limit_that_was_removed_by_hand_is_missed() -> None:
    model = stabilize(mlp(), 1.0)
    P.remove_parametrizations(model[0], "weight")
    with pytest.raises(ValueError, match=r"the limit of 0\.weight was removed since"):
        stabilize(model, 1.0)
    for i in (2, 3):
        P.remove_parametrizations(model[i][0] if i == 2 else model[i], "weight")
    assert lipschitz(stabilize(model, 1.0)).upper <= 1.0  # all are gone: a fresh start


def test_skipped_layers_are_left_alone_and_paid_for() -> None:
    model = mlp()
    with pytest.raises(UncertifiableError, match=r"'3' \(Linear\) has trainable parameters.*freeze.*Or pass radius"):
        stabilize(model, 1.0, skip=["3"])
    model[3].requires_grad_(False)
    frozen = model[3].weight.detach().clone()
    stabilize(model, 1.0, skip=["3"])
    torch.testing.assert_close(model[3].weight.detach(), frozen, rtol=0, atol=0)
    assert layer_limit(model[3]) is None
    assert 0.9 < lipschitz(model).upper <= 1.0
    with pytest.warns(UserWarning, match="no Lipschitz bound"):
        both = stabilize(
            nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Conv1d(1, 1, 1), "c": mlp()}),
            radius=1.0,
            skip=[nn.Conv1d, "c"],
        )
    assert [slot.key for slot, _ in limited_slots(both)] == ["a.weight"]


def test_what_has_no_constant_can_be_replaced() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)))

    model = stabilize(make(), 1.0, replace={nn.LayerNorm: lambda layer: nn.Identity()})
    assert [type(m).__name__ for m in model] == ["ParametrizedLinear", "Identity", "Sequential"]
    assert lipschitz(model).upper <= 1.0
    unlucky = make()
    for make_new, error in ((lambda layer: nn.BatchNorm1d(3), UncertifiableError), (lambda layer: 3, TypeError)):
        with pytest.raises(error):
            stabilize(unlucky, 1.0, replace={nn.LayerNorm: make_new})
        assert [type(m) for m in unlucky.modules()] == [type(m) for m in make().modules()]
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        stabilize(nn.LayerNorm(2), 1.0, replace={nn.LayerNorm: lambda layer: nn.Identity()})


def test_methods_by_name_by_kind_and_by_function() -> None:
    def models() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))

    def cautious(geometry: Geometry, radius: float, norm: str) -> WeightMap:
        return METHODS["gram"](geometry, 0.5 * radius, norm)

    for method, kinds in (
        ("frobenius", ["Frobenius", "Frobenius"]),
        ({"conv": "schur", "linear": "gram"}, ["Schur", "Gram"]),
        ({"conv": "frobenius"}, ["Frobenius", "Power"]),
        (cautious, ["Gram", "Gram"]),
    ):
        model = stabilize(models(), 1.0, method=method)
        assert [limit.constraint for _, limit in limited_slots(model)] == kinds
        assert table(model).proved.upper <= 1.0  # type: ignore[union-attr]
    for bad, message in (
        ("magic", "method must be one of power, gram"),
        ({"conv": "magic"}, "method must be one of power, gram"),
        ("rowsum", "limits"),
    ):
        model = models()
        with pytest.raises(ValueError, match=message):
            stabilize(model, 1.0, method=bad)
        assert not P.is_parametrized(model[0])


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_method_keeps_its_limit_in_a_chain(method: str, kind: str) -> None:
    model = limited(method, kind, 0.9)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        opt.zero_grad()
        model(inputs()).square().sum().neg().backward()
        opt.step()
        assert lipschitz(export(model), norm_of(method)).upper <= 0.9
        if METHODS[method].by_construction:
            assert table(model).proved.upper <= 0.9  # type: ignore[union-attr]


WRONG = [
    ({"lipschitz": 1.0, "radius": 1.0}, "either lipschitz"), ({"radius": -1.0}, "radius must be positive"),
    ({"norm": "l3"}, "norm must be one of l2, linf, l1"), ({"budget": "odd"}, "budget must be one of"),
    ({"by": "magic"}, "by must be one of"), ({"radius": 1.0, "budget": "fan"}, "shares the limit of a model"),
    ({"by": "projection", "budget": "learned"}, "do not apply"), ({"by": "projection", "method": "gram"}, "do not apply"),
    ({"by": "projection", "method": {"linear": "gram"}}, "do not apply"), ({"method": "orthogonal"}, "method must be one of"),
    ({"by": "projection", "method": "orthogonal", "lipschitz": 4.0}, "but orthogonal matrices have norm 1"),
    ({"by": "projection", "method": "orthogonal", "norm": "linf"}, "keeps matrices in the l2 norm"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_arguments_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        stabilize(model, **options)  # type: ignore[arg-type]
    assert not any(P.is_parametrized(part) for part in model.modules())


def test_skip_must_be_a_collection() -> None:
    with pytest.raises(TypeError, match="skip must be a collection"):
        stabilize(mlp(), 1.0, skip="3")


@pytest.mark.parametrize("make", [SGD, AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_on_the_manifold_every_step_ends_at_an_orthogonal_matrix(make: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), GroupSort(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    stabilize(model, 1.0, by="projection", method="orthogonal")
    assert stabilize(model, 1.0, by="projection", method="orthogonal") is model  # again: nothing
    assert all(type(layer) is nn.Linear and type(layer.weight) is nn.Parameter for layer in model[::2])
    opt, x = make(parameter_groups(model), lr=0.1, guard="off"), torch.randn(7, 6, dtype=dtype)
    before = [layer.weight.detach().clone() for layer in model[::2]]
    for _ in range(5):
        opt.zero_grad()
        (model(x) - 1.0).square().sum().backward()
        opt.step()
        assert lipschitz(model).upper <= 1.0
        for layer in model[::2]:
            assert Orthogonal().violation(layer.weight) == 0.0
            values = torch.linalg.svdvals(layer.weight.detach().double())
            assert float(values[-1]) > 1.0 - 16.0 * max(
                torch.finfo(dtype).eps, 2.0**-46
            )  # what a proof in float64 costs
    assert all(not torch.equal(layer.weight, old) for layer, old in zip(model[::2], before, strict=True))
    assert {row.constraint for row in table(model).rows} == {"Orthogonal"}
    plain = export(model)
    torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_no_kernel_is_put_on_the_manifold() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 3))
    with pytest.raises(ValueError, match=r"keeps matrices in the l2 norm, and '1' \(Conv1d\).*'bcop'"):
        stabilize(model, 1.0, by="projection", method="orthogonal")


def test_no_projection_of_a_kernel_is_pretended() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'2' \(Conv1d\).*by='parametrization'"):
        stabilize(model, 1.0, by="projection")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert parameter_groups(model) == [{"params": list(model.parameters())}]
