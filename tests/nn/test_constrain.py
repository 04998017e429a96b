"""Laws of constrain and parameter_groups: feasible at once, recorded, refused without a trace."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import nn

from stableopt.constraints import Box, L2Ball, NonNegative, Orthogonal, SpectralBall, attached
from stableopt.linalg import spectral_norm
from stableopt.nn import constrain, layer_limit, lipschitz, parameter_groups


@pytest.mark.parametrize(
    "constraint", [Box(-0.1, 0.1), NonNegative(), L2Ball(0.5), SpectralBall(0.3), Orthogonal()], ids=str
)
@pytest.mark.parametrize("shape", [(4, 3), (3, 7), (5, 5), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("by", ["parametrization", "projection"])
def test_the_value_is_feasible_at_once(constraint: object, shape: tuple[int, int], by: str) -> None:
    layer = nn.Linear(shape[1], shape[0])
    assert constrain(layer, "weight", constraint, by=by) is layer  # type: ignore[arg-type]
    value = layer.weight.detach()
    assert constraint.violation(value) <= (0.0 if by == "projection" else 1e-12)  # type: ignore[attr-defined]
    assert type(layer).__mro__[1 if by == "parametrization" else 0] is nn.Linear


def test_a_parametrized_weight_stays_feasible_while_trained() -> None:
    layer = constrain(nn.Linear(4, 4), "weight", SpectralBall(0.5))
    opt = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(5):
        opt.zero_grad()
        layer(torch.randn(8, 4)).square().sum().neg().backward()
        opt.step()
        assert spectral_norm(layer.weight).upper <= 0.5 * (1 + 1e-12)
    assert lipschitz(layer).upper <= 0.5 * (1 + 1e-12)
    assert layer_limit(layer) == 0.5


def test_a_projection_is_recorded_and_attached() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight
    constrain(layer, "weight", Box(-0.1, 0.1), by="projection")
    assert layer.weight is weight  # optimizers keep their reference
    assert attached(weight) == Box(-0.1, 0.1)
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_the_record_follows_a_copy_of_the_model(copied: object) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    constrain(model[0], "weight", SpectralBall(0.7), by="projection")
    other = copied(model)  # type: ignore[operator]
    assert layer_limit(other[0]) == 0.7
    groups = parameter_groups(other)
    assert groups[1]["constraint"] == SpectralBall(0.7)
    assert groups[1]["params"][0] is other[0].weight
    assert attached(other[0].weight) == SpectralBall(0.7)  # attached anew, so that an optimizer can insist on it


def test_groups_partition_the_parameters_in_order() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[3].bias = model[0].bias = None  # type: ignore[assignment]
    constrain(model[0], "weight", SpectralBall(1.0), by="projection")
    constrain(model[3], "weight", SpectralBall(1.0), by="projection")
    constrain(model[2], "weight", NonNegative(), by="projection")
    constrain(model[1], "weight", SpectralBall(2.0))
    groups = parameter_groups(model, lr=0.1, weight_decay=0.0)
    assert [g.get("constraint") for g in groups] == [None, SpectralBall(1.0), NonNegative()]
    assert [id(p) for p in groups[1]["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert all(g["lr"] == 0.1 and g["weight_decay"] == 0.0 for g in groups)
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p in groups[0]["params"]] == [
        id(p) for p in model.parameters() if id(p) in set(everything[: len(groups[0]["params"])])
    ]
    torch.optim.SGD(groups)


def test_groups_are_never_empty() -> None:
    layer = constrain(nn.Linear(2, 2, bias=False), "weight", NonNegative(), by="projection")
    assert [list(g) for g in parameter_groups(layer)] == [["params", "constraint"]]
    assert parameter_groups(nn.ReLU()) == []
    assert len(parameter_groups(nn.Linear(2, 2))) == 1


def test_a_shared_parameter_is_in_one_group_once() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    constrain(first, "weight", NonNegative(), by="projection")
    second.weight = first.weight
    groups = parameter_groups(nn.Sequential(first, second))
    assert [len(g["params"]) for g in groups] == [2, 1]
    second.__dict__["_stableopt_projections"] = {"weight": Box(0.0, 1.0)}
    with pytest.raises(ValueError, match="shares it asks for"):
        parameter_groups(nn.Sequential(first, second))


def nan_layer(value: float) -> nn.Module:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = value
    return layer


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(2))
            self.inner = nn.Linear(2, 2)
            self.inner.weight = self.weight

    return Tied()


def twice(by: str) -> nn.Module:
    return constrain(nn.Linear(2, 2), "weight", SpectralBall(1.0), by=by)  # type: ignore[arg-type]


REFUSED = [
    (
        "no such parameter",
        lambda: nn.ReLU(),
        "weight",
        SpectralBall(1.0),
        ValueError,
        r"\(ReLU\) has no parameter 'weight'.*none",
    ),
    (
        "not its own",
        lambda: nn.Sequential(nn.Linear(2, 2)),
        "0.weight",
        SpectralBall(1.0),
        ValueError,
        "no parameter '0.weight'",
    ),
    (
        "no bias",
        lambda: nn.Linear(2, 2, bias=False),
        "bias",
        NonNegative(),
        ValueError,
        r"has no parameter 'bias'.*weight",
    ),
    ("buffer", lambda: nn.BatchNorm1d(2), "running_mean", NonNegative(), ValueError, "no parameter 'running_mean'"),
    ("vector", lambda: nn.Linear(2, 2), "bias", SpectralBall(1.0), ValueError, "SpectralBall"),
    ("kernel", lambda: nn.Conv2d(1, 1, 3), "weight", SpectralBall(1.0), ValueError, "stabilize"),
    ("nan", lambda: nan_layer(math.nan), "weight", SpectralBall(1.0), ValueError, "NaN or infinity"),
    ("inf", lambda: nan_layer(math.inf), "weight", Box(-1.0, 1.0), ValueError, "NaN or infinity"),
    ("lazy", lambda: nn.LazyLinear(2), "weight", SpectralBall(1.0), ValueError, "lazy"),
    (
        "complex",
        lambda: nn.Linear(2, 2, dtype=torch.complex128),
        "weight",
        SpectralBall(1.0),
        TypeError,
        "real and floating",
    ),
    ("tied", tied, "weight", SpectralBall(1.0), ValueError, r"shared \(weight, inner.weight\)"),
    ("parametrized twice", lambda: twice("parametrization"), "weight", SpectralBall(2.0), ValueError, "already|use by"),
    ("projected twice", lambda: twice("projection"), "weight", SpectralBall(2.0), ValueError, "already"),
    ("not a constraint", lambda: nn.Linear(2, 2), "weight", 1.0, TypeError, "Constraint"),
]


@pytest.mark.parametrize("by", ["parametrization", "projection"])
@pytest.mark.parametrize(
    ("make", "name", "constraint", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_what_cannot_be_constrained_is_refused_and_left_alone(
    make: object, name: str, constraint: object, error: type[Exception], message: str, by: str
) -> None:
    module = make()  # type: ignore[operator]
    lazy = isinstance(module, nn.LazyLinear)
    before = {} if lazy else {k: v.clone() for k, v in module.state_dict().items()}
    kind, record = type(module), dict(vars(module).get("_stableopt_projections", {}))
    with pytest.raises(error, match=message):
        constrain(module, name, constraint, by=by)  # type: ignore[arg-type]
    assert type(module) is kind
    assert vars(module).get("_stableopt_projections", {}) == record
    if not lazy:
        assert module.state_dict().keys() == before.keys()
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_wrapped_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module):  # no process group
            nn.Module.__init__(self)
            self.module = module
            self.weight = nn.Parameter(torch.eye(2))

    with pytest.raises(ValueError, match="DistributedDataParallel"):
        constrain(Wrapped(nn.ReLU()), "weight", SpectralBall(1.0))


def test_mixing_the_two_ways_is_refused() -> None:
    with pytest.raises(ValueError, match="projection already"):
        constrain(twice("projection"), "weight", NonNegative())
    with pytest.raises(ValueError, match="use by='parametrization'"):
        constrain(twice("parametrization"), "weight", NonNegative(), by="projection")


def test_a_set_of_another_kind_can_be_stacked() -> None:
    layer = constrain(constrain(nn.Linear(3, 3), "weight", NonNegative()), "weight", SpectralBall(0.1))
    assert layer_limit(layer) == 0.1
    assert (layer.weight >= 0).all()
    assert lipschitz(layer).upper <= 0.1 * (1 + 1e-12)
    outer = constrain(constrain(nn.Linear(3, 3), "weight", SpectralBall(0.1)), "weight", Box(-1.0, 1.0))
    assert layer_limit(outer) is None  # only the outermost map has the last word


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'parametrization' or 'projection', got 'hope'"):
        constrain(nn.Linear(1, 1), "weight", NonNegative(), by="hope")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        constrain(torch.eye(2), "weight", NonNegative())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        parameter_groups([nn.Linear(1, 1)])  # type: ignore[arg-type]
    for key in ("params", "constraint"):
        with pytest.raises(ValueError, match=key):
            parameter_groups(nn.Linear(1, 1), **{key: None})


def test_removing_the_parametrization_leaves_the_constrained_value() -> None:
    layer = constrain(nn.Linear(3, 3), "weight", SpectralBall(0.2))
    value = layer.weight.detach().clone()
    P.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight.detach(), value, rtol=0, atol=0)
    constrain(layer, "weight", SpectralBall(0.2))
    torch.testing.assert_close(
        layer.weight.detach(), value, rtol=0.05, atol=0
    )  # the Gram bound may shrink it once more


def test_a_limit_is_read_from_every_kind_of_constraint() -> None:
    assert layer_limit(constrain(nn.Linear(2, 2), "weight", Orthogonal())) == 1.0
    assert layer_limit(constrain(nn.Linear(2, 2), "weight", SpectralBall(3.0), by="projection")) == 3.0
    assert layer_limit(constrain(nn.Linear(2, 2), "weight", NonNegative(), by="projection")) is None
    assert layer_limit(nn.ReLU()) is None
