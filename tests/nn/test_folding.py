"""Laws of kept weights: computed once in evaluation, and never used after anything has changed that they depend on."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn
from torch.autograd import forward_ad

from stableopt.constraints import SpectralBall
from stableopt.nn import GroupSort, constrain, folding, lipschitz
from stableopt.nn.budget import LearnedBudget
from stableopt.nn.folding import is_foldable
from stableopt.nn.weights import METHODS, Geometry
from tests.nn.weights.catalogue import DENSE
from tests.nn.zoo import ANIMALS, stabilize


def two(budget: str = "even", method: str | None = None, norm: str = "l2") -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(6, 6), GroupSort(), nn.Linear(6, 6))
    return stabilize(layers, 1.0, budget=budget, method=method, norm=norm).eval()  # type: ignore[arg-type, return-value]


def chains(model: nn.Module) -> list[P.ParametrizationList]:
    return [part for part in model.modules() if isinstance(part, P.ParametrizationList)]


def agrees(layer: nn.Module) -> bool:
    """Whether the weight in force is the one that the originals of this moment give."""
    return torch.equal(layer.weight, chains(layer)[0]())  # type: ignore[arg-type]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the maps that have been run."""
    names: list[str] = []
    for method in METHODS.values():

        def counted(self: nn.Module, V: Tensor, forward: Callable[..., Tensor] = method.forward) -> Tensor:
            names.append(type(self).__name__)
            return forward(self, V)

        monkeypatch.setattr(method, "forward", counted)

    def multiplied(self: Any, *args: Any, multiply: Callable[..., Any] = METHODS["power"].multiply) -> Any:  # type: ignore[attr-defined]
        product = multiply(self, *args)
        names.extend([] if product is None else [type(self).__name__])
        return product

    monkeypatch.setattr(METHODS["power"], "multiply", multiplied)
    return names


@pytest.mark.parametrize("method", DENSE)
@torch.no_grad()
def test_in_evaluation_a_weight_is_computed_once(method: str, computed: list[str]) -> None:
    model, x = two(method=method, norm=DENSE[method]), torch.randn(3, 6)
    computed.clear()
    first = model(x)
    assert len(computed) == 2
    for _ in range(3):
        assert model(x).equal(first)
    assert len(computed) == 2
    assert agrees(model[0])
    model.train()
    computed.clear()
    model(x)
    model(x)
    assert len(computed) == 4


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a step in place": lambda layer: chains(layer)[0].original.mul_(-0.5),
    "a write behind the counter": lambda layer: chains(layer)[0].original.data.mul_(-0.5),
    "one number behind the counter": lambda layer: chains(layer)[0].original.data[3, 4].mul_(-1.0),
    "another memory": lambda layer: setattr(chains(layer)[0].original, "data", torch.randn(6, 6)),
    "another parameter": lambda layer: setattr(chains(layer)[0], "original", nn.Parameter(torch.randn(6, 6))),
    "numpy": lambda layer: chains(layer)[0].original.detach().numpy().__imul__(-1.0),
    "a checkpoint": lambda layer: layer.load_state_dict(two()[0].state_dict()),
    "an assignment": lambda layer: setattr(layer, "weight", torch.eye(6)),
    "another radius": lambda layer: setattr(chains(layer)[0][0], "radius", 0.25),
    "a write into the weight": lambda layer: layer.weight.detach().mul_(2.0),
    "another dtype": lambda layer: layer.float(),
    "training in between": lambda layer: (layer.train(), chains(layer)[0].original.data.mul_(-0.5), layer.eval()),
    "NaN": lambda layer: chains(layer)[0].original.data.fill_(torch.nan),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_changes_the_weight_goes_unnoticed(change: str) -> None:
    layer = two()[0]
    with torch.no_grad():
        before = layer.weight.clone()
        assert agrees(layer)
        CHANGES[change](layer)
        after = layer.weight
        torch.testing.assert_close(after, chains(layer)[0](), rtol=0, atol=0, equal_nan=True)
        assert change == "a write into the weight" or not (before.dtype == after.dtype and before.equal(after))


def test_a_step_of_the_shared_budget_changes_the_weights_of_all_layers() -> None:
    model = two("learned")
    with torch.no_grad():
        before = [layer.weight.clone() for layer in (model[0], model[2])]
        budget = next(part for part in model.modules() if isinstance(part, LearnedBudget))
        for write in (budget.shares.mul_, budget.shares.data.copy_):
            write(torch.tensor([0.5, -0.25]))
            assert all(agrees(layer) for layer in (model[0], model[2]))
        budget.log_mean -= 1.0
        assert all(agrees(layer) for layer in (model[0], model[2]))
        assert not any(layer.weight.equal(w) for layer, w in zip((model[0], model[2]), before, strict=True))


@pytest.mark.parametrize("name", ANIMALS)
@torch.no_grad()
def test_every_model_computes_the_same_with_kept_weights(name: str) -> None:
    animal = ANIMALS[name]
    model, x = animal.stabilized().eval(), animal.x()
    first = model(x)
    assert model(x).equal(first)
    for parameter in model.parameters():
        parameter.data.mul_(-0.5)
    assert all(is_foldable(chain) for chain in chains(model))
    assert copy.deepcopy(model)(x).equal(model(x))
    assert pickle.loads(pickle.dumps(model))(x).equal(model(x))
    assert not model(x).equal(first)


def test_gradients_in_evaluation_are_not_lost() -> None:
    layer, x = two()[0], torch.randn(2, 6)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert chains(layer)[0].original.grad is not None
    assert chains(layer)[0].original.grad.any()


def test_frozen_weights_are_kept_while_the_input_is_attacked(computed: list[str]) -> None:
    model = two().requires_grad_(False)
    x = torch.randn(2, 6, requires_grad=True)
    model(x)
    computed.clear()
    model(x).sum().backward()
    assert computed == []
    assert x.grad is not None
    model.requires_grad_(True)
    model(x).sum().backward()
    assert len(computed) == 2


def test_inference_mode_leaves_weights_that_gradients_can_use() -> None:
    model, x = two().requires_grad_(False), torch.randn(2, 6, requires_grad=True)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert x.grad is not None
    built_there = None
    with torch.inference_mode():
        built_there = two()
        first = built_there(x.detach())
    with torch.no_grad():
        assert built_there(x.detach()).equal(first)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch's forward mode
def test_transforms_and_tangents_see_the_map() -> None:
    layer, x = two()[0], torch.randn(2, 6)
    original = chains(layer)[0].original.detach()
    state = {"parametrizations.weight.original": original, "bias": layer.bias.detach()}

    def run(V: Tensor) -> Tensor:
        return torch.func.functional_call(layer, state | {"parametrizations.weight.original": V}, (x,))

    with torch.no_grad():
        layer(x)
        tangent = torch.func.jvp(run, (original,), (torch.ones_like(original),))[1]
        assert tangent.any()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(original, torch.ones_like(original))
            torch.testing.assert_close(forward_ad.unpack_dual(run(dual)).tangent, tangent)
        many = torch.func.vmap(run)(torch.stack([original, -original]))
        torch.testing.assert_close(many[0], layer(x))
        assert not many[1].equal(many[0])
    assert torch.func.grad(lambda V: run(V).sum())(original).any()


def test_what_compiles_or_traces_computes_the_map() -> None:
    layer, x = two()[0], torch.randn(2, 6)
    with torch.no_grad():
        layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        compiled(x)
        chains(layer)[0].original.data.mul_(-0.5)
        torch.testing.assert_close(compiled(x), layer(x))
        chains(layer)[0].original.data.mul_(-0.5)
        torch.testing.assert_close(compiled(x), layer(x))


def test_maps_of_others_are_never_kept(computed: list[str]) -> None:
    class Noisy(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return W + torch.randn_like(W)

    layer = nn.Linear(6, 6)
    P.register_parametrization(layer, "weight", Noisy())
    stabilize(layer, 1.0).eval()
    with torch.no_grad():
        assert not is_foldable(chains(layer)[0])
        assert not layer.weight.equal(layer.weight)
        assert lipschitz(layer).upper <= 1.0


def test_one_map_in_training_mode_is_enough_to_compute() -> None:
    layer = two(method="power")[0]
    with torch.no_grad():
        chains(layer)[0][0].train()
        assert not is_foldable(chains(layer)[0])


def test_the_kept_weight_cannot_be_written_through_the_attribute() -> None:
    layer = two()[0]
    with torch.no_grad():
        for write in (lambda w: w.mul_(2.0), lambda w: w.data.mul_(2.0), lambda w: w.__setitem__(0, 1.0)):
            with pytest.raises(RuntimeError, match="computed from an unconstrained original"):
                write(layer.weight)
        assert agrees(layer)


def test_a_kept_weight_goes_with_its_module() -> None:
    gc.collect()
    before = len(folding._FOLDS)
    model = two()
    with torch.no_grad():
        model(torch.randn(1, 6))
    assert len(folding._FOLDS) == before + 2
    del model
    gc.collect()
    assert len(folding._FOLDS) <= before


def test_constraints_of_constrain_are_computed() -> None:
    layer = constrain(nn.Linear(3, 3), "weight", SpectralBall(0.5)).eval()
    with torch.no_grad():
        assert layer.weight.equal(layer.weight)


def test_the_geometry_is_part_of_what_is_compared() -> None:
    layer = stabilize(nn.Conv1d(1, 1, 3), 1.0).eval()
    with torch.no_grad():
        layer.weight.clone()
        chains(layer)[0].original.fill_(1.0)
        once = layer.weight.clone()
        chains(layer)[0][0].geometry = Geometry("conv", padding=(1,), padding_mode="reflect")
        assert float(layer.weight.norm()) < 0.9 * float(once.norm())
