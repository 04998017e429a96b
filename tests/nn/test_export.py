"""Laws of release and export: the same function in plain torch, proved within the limits, and nothing shared with the model."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.constraints import NonNegative, attached
from stableopt.linalg import spectral_norm
from stableopt.nn import GroupSort, constrain, layer_limit, lipschitz, parameter_groups
from stableopt.nn.export import export, plain_state_dict, proved_within, release
from stableopt.nn.limits import Limit, limited_slots
from stableopt.nn.slots import find_slots
from stableopt.nn.stabilize import record_of
from stableopt.nn.table import table
from tests.nn.weights.catalogue import DENSE
from tests.nn.zoo import ANIMALS, mlp, stabilize

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def keys_and_types(model: nn.Module) -> tuple[list[str], list[type], list[str]]:
    return (
        list(model.state_dict()),
        [type(part) for part in model.modules()],
        [name for name, _ in model.named_parameters()],
    )


def true_norms(weight: torch.Tensor, parts: int) -> list[float]:
    """Largest singular values of the parts, matrices only; an oracle that shares nothing with the code."""
    return [float(torch.linalg.matrix_norm(part.double().flatten(1), 2)) for part in weight.chunk(parts)]


@pytest.mark.parametrize("name", ANIMALS)
def test_release_keeps_the_function_bit_for_bit_and_restores_the_plain_model(name: str) -> None:
    animal = ANIMALS[name]
    model, x = animal.stabilized(), animal.x()
    expected = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    released = release(model)
    assert released is model
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert keys_and_types(model) == keys_and_types(animal.make())
    assert {id(p) for p in model.parameters()} == held
    assert record_of(model) is None
    assert list(limited_slots(model)) == []
    animal.make().load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ANIMALS)
def test_export_gives_a_plain_copy_and_leaves_the_model_alone(name: str) -> None:
    animal = ANIMALS[name]
    model, x = animal.stabilized(), animal.x()
    expected = model(x).detach()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(part) for part in model.modules()]
    plain = export(model)
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    assert keys_and_types(plain) == keys_and_types(animal.make())
    with torch.no_grad():
        for p in plain.parameters():
            p.fill_(7.0)
    release(plain)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert [type(part) for part in model.modules()] == types
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ANIMALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exported_weights_are_proved_within_their_radius_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    animal = ANIMALS[name]
    model = animal.stabilized(0.7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    plain = export(model.to(dtype))
    slots = list(find_slots(plain))
    assert tuple(slot.parts for slot in slots) == animal.parts
    for slot in slots:
        for part in slot.matrices(slot.value):
            assert part.dtype == dtype
            proved = slot.geometry.proved(part).upper
            assert proved <= 0.7
            assert proved >= 0.7 * (1 - 0.25 - 30 * torch.finfo(dtype).eps)  # not thrown away either
        if slot.geometry.kind == "linear":
            assert max(true_norms(slot.value, slot.parts)) <= 0.7


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), log_scale=st.integers(-3, 6), dtype=st.sampled_from(DTYPES),
    radius=st.sampled_from([1e-3, 0.3, 1.0, 5.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_weight_is_shrunk_until_its_stored_numbers_are_proved(
    rows: int, columns: int, log_scale: int, dtype: torch.dtype, radius: float, seed: int
) -> None:
    torch.manual_seed(seed)
    slot = next(find_slots(nn.Linear(columns, rows)))
    W = (10.0**log_scale * torch.randn(rows, columns)).clamp(-6e4, 6e4).to(dtype)
    fitted = proved_within(slot, W, Limit(radius, "l2", "parametrization", ""))
    assert fitted.dtype == dtype
    assert spectral_norm(fitted).upper <= radius
    if spectral_norm(W).upper <= radius:
        assert fitted is W
    else:
        assert spectral_norm(fitted).upper >= radius * (1 - 20 * torch.finfo(dtype).eps) - 2 * torch.finfo(dtype).tiny
        cosine = (fitted.double() * W.double()).sum() / (fitted.double().norm() * W.double().norm())
        assert cosine >= 1 - 20 * torch.finfo(dtype).eps


def test_a_weight_with_nan_has_no_proof() -> None:
    slot = next(find_slots(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        proved_within(slot, torch.tensor([[math.nan, 0.0]]), Limit(1.0, "l2", "parametrization", ""))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", ["even", "fan", "learned"])
def test_an_exported_chain_is_proved_to_keep_the_limit_of_the_model(dtype: torch.dtype, budget: str) -> None:
    model = stabilize(mlp(), 2.0, budget=budget).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=dtype))
    assert lipschitz(export(model)).upper <= 2.0
    plain = mlp().to(dtype)
    plain.load_state_dict(plain_state_dict(model))
    x = torch.randn(3, 6, dtype=dtype)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)


def test_the_mode_and_the_frozen_parameters_are_kept() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    stabilize(model, 1.0)
    model.train()
    model[2].eval()
    for plain in (export(model), release(copy.deepcopy(model))):
        assert [part.training for part in plain.modules()] == [part.training for part in mlp_like(plain)]
        assert not plain[0].weight.requires_grad  # type: ignore[index, union-attr]
        assert plain[3].weight.requires_grad  # type: ignore[index, union-attr]


def mlp_like(plain: nn.Module) -> list[nn.Module]:
    model = mlp().train()
    model[2].eval()
    assert len(list(model.modules())) == len(list(plain.modules()))
    return list(model.modules())


def test_a_copy_and_its_original_can_each_lose_their_parametrizations() -> None:
    """torch lets both share a class, and removing from one would delete the weight of the other."""
    model = stabilize(mlp(), 1.0)
    clones = [copy.deepcopy(model) for _ in range(3)]
    x = torch.randn(2, 6)
    expected = model(x)
    P.remove_parametrizations(clones[0][0], "weight")
    release(clones[1])
    for part in (clones[0], clones[1], clones[2], model):
        torch.testing.assert_close(part(x), expected, rtol=0, atol=0)
    P.remove_parametrizations(model[0], "weight")
    torch.testing.assert_close(clones[2](x), expected, rtol=0, atol=0)
    assert layer_limit(clones[2][0]) == 1.0


def test_constrained_layers_can_be_copied_and_freed_as_well() -> None:
    layer = constrain(nn.Linear(2, 2), "weight", NonNegative())
    clone = copy.deepcopy(layer)
    P.remove_parametrizations(clone, "weight")
    assert (layer.weight >= 0).all()


def test_release_of_projected_weights_forgets_the_sets() -> None:
    model = stabilize(mlp(), 1.0, by="projection")
    assert any("constraint" in group for group in parameter_groups(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    release(model)
    assert not any("constraint" in group for group in parameter_groups(model))
    assert attached(model[0].weight) is None
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert lipschitz(export(stabilize(mlp(), 1.0, by="projection"))).upper <= 1.0


def test_export_folds_what_others_have_parametrized_below_a_limit() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    stabilize(layer, 0.5)
    x = torch.randn(3, 4)
    expected = layer(x).detach()
    plain = export(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected, rtol=1e-13, atol=1e-13)
    assert lipschitz(plain).upper <= 0.5
    plain(x).sum().backward()
    assert plain.weight.grad is not None


def test_other_parameters_keep_their_constraints() -> None:
    layer = stabilize(nn.Linear(3, 3), 1.0)
    constrain(layer, "bias", NonNegative())
    release(layer)
    assert P.is_parametrized(layer, "bias")
    assert not P.is_parametrized(layer, "weight")
    assert type(layer.weight) is nn.Parameter
    assert (layer.bias >= 0).all()


def test_a_model_without_limits_is_left_as_it_is() -> None:
    model = mlp()
    before = keys_and_types(model)
    assert release(model) is model
    assert keys_and_types(model) == keys_and_types(export(model)) == before
    for function in (release, export, table):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function(3)  # type: ignore[arg-type]


def test_models_without_numbers_are_exported_without_numbers() -> None:
    with torch.device("meta"):
        plain = export(stabilize(mlp(), 1.0))
    assert all(p.is_meta for p in plain.parameters())


# ------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ANIMALS)
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_plain_checkpoints_load_with_a_notice_and_come_back(name: str, scale: float) -> None:
    animal = ANIMALS[name]
    source, target, x = animal.make(), animal.stabilized(0.7), animal.x()
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(scale)
    with pytest.warns(UserWarning, match="loaded plain weights"):
        result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    if scale < 1:
        torch.testing.assert_close(target(x), source(x), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(plain_state_dict(target), dict(source.state_dict()), rtol=1e-14, atol=0)
    for slot, limit in limited_slots(target):
        for part in slot.matrices(slot.value):
            assert slot.geometry.proved(part).upper <= limit.radius
    back = animal.make()
    back.load_state_dict(plain_state_dict(target))
    torch.testing.assert_close(back(x), target(x), rtol=0, atol=0)


def test_the_notice_is_given_for_plain_weights_only() -> None:
    model = stabilize(mlp(), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(copy.deepcopy(model).state_dict())
        model.load_state_dict(model.state_dict(), assign=True)


def test_plain_checkpoints_load_into_copies_parts_and_learned_budgets() -> None:
    plain = mlp()
    learned = stabilize(mlp(), 50.0, budget="learned")
    for model, state in (
        (copy.deepcopy(stabilize(mlp(), 50.0)), plain.state_dict()),
        (stabilize(mlp(), 50.0)[3], plain[3].state_dict()),
        (nn.ModuleDict({"inner": stabilize(mlp(), 50.0)}), {f"inner.{k}": v for k, v in plain.state_dict().items()}),
        (learned, plain.state_dict()),
    ):
        original = {k: v.clone() for k, v in state.items()}
        with pytest.warns(UserWarning, match="plain weights"):
            model.load_state_dict(state)
        assert state.keys() == original.keys()  # the checkpoint of the caller is not changed
    x = torch.randn(2, 6)
    torch.testing.assert_close(learned(x), plain(x))


def test_a_plain_weight_of_another_shape_or_with_missing_keys_is_refused_by_name() -> None:
    model = stabilize(nn.Sequential(nn.Linear(2, 2)), 1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(nn.Sequential(nn.Linear(3, 2)).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.bias": torch.zeros(2)})
    torch.testing.assert_close(
        model[0].parametrizations["weight"].original.detach(), before["0.parametrizations.weight.original"]
    )  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("mode", [True, False])
def test_with_every_method_the_exported_weights_load_back_as_the_same_function(method: str, mode: bool) -> None:
    """Also where the original has another shape than the weight; one of a wrong shape is refused, and the weight stays."""
    model = stabilize(
        nn.Sequential(nn.Linear(40, 40), GroupSort(), nn.Linear(40, 40)), 1.0, method=method, norm=DENSE[method]
    ).train(mode)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    plain, x = export(twin), torch.randn(5, 40)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = nn.Sequential(nn.Linear(40, 40), GroupSort(), nn.Linear(39, 40)).state_dict()
    with (
        pytest.warns(UserWarning, match="plain weights"),
        pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight"),
    ):
        model.load_state_dict(wrong)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items() if k.startswith("2.param"))
    with pytest.warns(UserWarning, match="plain weights"):
        model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-6, atol=1e-6)


def test_after_release_checkpoints_load_without_a_notice() -> None:
    model = release(stabilize(mlp(), 1.0))
    model.load_state_dict(mlp().state_dict())
    assert not model[0]._load_state_dict_pre_hooks


# ------------------------------------------------------------------------------------------------------------------------ table


def test_the_table_tells_what_was_and_what_is() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), GroupSort(), nn.Linear(8, 2))
    norms = [float(torch.linalg.matrix_norm(model[i].weight.detach(), 2)) for i in (0, 2, 4)]
    found = table(stabilize(model, 2.0))
    assert [row.name for row in found.rows] == ["0.weight", "2.weight", "4.weight"]
    for row, norm, i in zip(found.rows, norms, (0, 2, 4), strict=True):
        assert norm * (1 - 1e-14) <= row.before <= 1.1 * norm  # type: ignore[operator]
        assert row.limit == layer_limit(model[i])
        true = float(torch.linalg.matrix_norm(model[i].weight.detach(), 2))
        assert true <= row.after.upper <= true * (1 + 1e-9)  # type: ignore[union-attr]
        assert row.after.upper <= row.limit  # type: ignore[union-attr]
    assert found.proved.upper <= found.enforced.upper <= 2.0  # type: ignore[union-attr]
    assert found.proved.upper == pytest.approx(lipschitz(model).upper)  # type: ignore[union-attr]
    text = str(found)
    assert len(text.splitlines()) == 7
    assert "of at most 2" in text
    assert f"{norms[0]:.2f}"[:3] in text


def test_the_table_of_a_model_without_a_bound_says_so() -> None:
    found = table(ANIMALS["lstm"].stabilized(0.7))
    assert found.proved is None
    assert found.enforced is None
    assert "no bound of the whole model follows" in str(found)
    assert [row.limit for row in found.rows] == [0.7] * 4
    assert all(row.after.upper <= 0.7 for row in found.rows)  # type: ignore[union-attr]
    with torch.device("meta"):
        assert "?" in str(table(stabilize(mlp(), 1.0)))
    assert str(table(nn.ReLU())).startswith("weight")


def test_the_table_counts_a_repeated_layer_and_takes_a_radius_for_a_chain() -> None:
    layer = nn.Linear(3, 3)
    model = stabilize(nn.Sequential(layer, nn.Tanh(), layer), 4.0)
    assert "0.weight (2 times)" in str(table(model))
    assert table(model).enforced.upper == pytest.approx(4.0)  # type: ignore[union-attr]
    chain = table(stabilize(mlp(), radius=0.5))
    assert chain.lipschitz == pytest.approx(0.125)
    assert chain.proved.upper <= chain.lipschitz  # type: ignore[union-attr, operator]
