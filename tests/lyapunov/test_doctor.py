"""The doctor: for each kind of net it says which products with the Hessian work and why the others do not, and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import stableopt as so
from stableopt.lyapunov.budget import Every
from stableopt.lyapunov.diagnosis import Diagnosis, Way
from stableopt.lyapunov.doctor import diagnose
from stableopt.optim.curvature import Exact, asymmetry
from tests.optim.test_sharpness import NoSecond, everything, same


class Last(nn.Module):
    """A recurrent net, read at its last step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


def mlp(first: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Module:
    return nn.Sequential(first(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))


def mse(output: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(output, F.one_hot(y, 3).to(output))


def huber(output: Tensor, y: Tensor) -> Tensor:
    return F.huber_loss(output, F.one_hot(y, 3).to(output))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, set[str]]] = {
    # name: net, shape of the inputs, loss, what does not work
    "mlp": (mlp, (4,), F.cross_entropy, set()),
    "cnn with batch norm": (cnn, (1, 6, 6), F.cross_entropy, set()),
    "gru": (lambda: Last(nn.GRU(4, 6, batch_first=True)), (5, 4), F.cross_entropy, set()),
    "lstm": (lambda: Last(nn.LSTM(4, 6, batch_first=True)), (5, 4), F.cross_entropy, set()),
    "transformer": (transformer, (5, 8), F.cross_entropy, {"graph"}),
    "spectral norm": (lambda: mlp(spectral_norm), (4,), F.cross_entropy, {"forward"}),
    "weight norm": (lambda: mlp(weight_norm), (4,), F.cross_entropy, {"graph", "exact", "forward"}),
    "mean squared error": (mlp, (4,), mse, {"forward"}),
    "huber": (mlp, (4,), huber, {"forward"}),
}


LONGER = {"lstm", "gru", "huber", "spectral norm"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in LONGER else []) for c in CASES])
def test_each_way_is_judged_on_each_kind_of_net(case: str) -> None:
    make, shape, criterion, fails = CASES[case]
    model, x, y = make(), torch.randn(10, *shape), torch.randint(3, (10,))
    if case == "weight norm" and not second_backward_of_weight_norm_is_wrong():
        fails = {"forward"}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = everything(model, optimizer)
    found = diagnose(model, lambda: criterion(model(x), y), optimizer)
    assert same(before, everything(model, optimizer))
    ways = {way.name: way for way in found.ways}
    assert list(ways) == ["graph", "exact", "forward", "difference"]
    assert {name for name, way in ways.items() if not way.works} == fails
    assert found.chosen == ("difference" if "exact" in fails else "exact")
    assert found.repeatable
    for way in found.ways:
        assert bool(way.why) is not way.works
        if way.works:
            assert 0.0 < way.cost < 500.0
            # the power iteration of the spectral norm is hidden from autograd, and not from a difference
            assert not way.difference > 1e-5 or case == "spectral norm"
    tiers = {tier.name: tier for tier in found.tiers}
    assert all(tier.runs for tier in tiers.values())
    assert all(tier.every >= getattr(Every(), tier.name) for tier in found.tiers)
    assert sum(tier.cost / tier.every for tier in found.tiers) <= 0.05 * (1 + 1e-9)
    assert found.kinks == (("2",) if "cnn" in case else ())
    assert found.statistics == (("1",) if "cnn" in case else ())
    assert ("MaxPool2DWithIndices" in found.operations) is ("cnn" in case)
    json.dumps(found.as_dict(), allow_nan=False)
    assert f"{found.chosen}*" in str(found)
    assert any("hidden from autograd" in note for note in found.notes) is (case == "spectral norm")


def second_backward_of_weight_norm_is_wrong() -> bool:
    """Torch 2.13 raises nothing there."""
    model = mlp(weight_norm)
    with Exact(lambda: model(torch.ones(2, 4)).square().sum(), list(model.parameters())) as product:
        return asymmetry(product) > 1e-6


def test_second_derivatives_that_are_silently_wrong_do_not_count_as_working() -> None:
    if not second_backward_of_weight_norm_is_wrong():
        pytest.skip("this torch has mended it")
    found = diagnose(model := mlp(weight_norm), lambda: model(torch.ones(2, 4)).square().sum())
    graph, exact = found.ways[:2]
    assert "not symmetric" in graph.why
    assert "not symmetric" in exact.why


def test_kinks_make_a_difference_another_quantity_and_the_doctor_says_so() -> None:
    torch.set_default_dtype(torch.float32)
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1)), torch.randn(32, 8)
    found = diagnose(model, lambda: model(x).square().mean())
    difference = next(way for way in found.ways if way.name == "difference")
    assert difference.difference > 0.01
    assert not difference.works
    assert "kinks or rounding" in difference.why
    assert any(note.startswith("with kinks a difference measures their jumps") for note in found.notes)
    assert (found.kinks, found.operations, found.random) == (("1",), ("Relu",), ("2",))
    assert any("same masks of dropout" in note for note in found.notes)
    assert any("give the optimizer" in note for note in found.notes)


def test_what_does_not_work_is_said_in_a_sentence_and_the_rest_is_there() -> None:
    w, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    model = nn.Module()
    model.w, model.unused = w, unused
    found = diagnose(model, lambda: NoSecond.apply(w), so.optim.Lion([w, unused], 0.1))  # type: ignore[arg-type]
    assert found.chosen == "difference"
    assert found.unused == ("unused",)
    assert {way.name: way.works for way in found.ways} == {
        "graph": False, "exact": False, "forward": False, "difference": True,
    }  # fmt: skip
    assert any("only the plain sharpness" in note for note in found.notes)
    assert any("does not depend on unused" in note for note in found.notes)
    tiers = {tier.name: tier for tier in found.tiers}
    assert tiers["sharpness"].runs
    assert not found.as_dict()["ways"][0]["cost"]


def test_a_loss_that_draws_its_batch_is_not_repeatable() -> None:
    model = nn.Linear(2, 1)
    generator = torch.Generator().manual_seed(0)
    found = diagnose(model, lambda: model(torch.randn(4, 2, generator=generator)).square().mean())
    assert not found.repeatable
    assert found.notes[0].startswith("the loss is not repeatable (")
    energy = next(tier for tier in found.tiers if tier.name == "energy")
    assert (energy.runs, energy.why, energy.every) == (False, "the loss is not repeatable", 0)
    dropout = nn.Sequential(nn.Linear(2, 8), nn.Dropout(), nn.Dropout())
    dropout[2].eval()
    again = diagnose(dropout, lambda: dropout(torch.ones(4, 2)).square().mean())
    assert again.repeatable  # same random numbers
    assert again.random == ("1",)


def test_a_forward_derivative_that_is_silently_wrong_does_not_count_as_working() -> None:
    model, x = so.nn.Sandwich(3, 4), torch.randn(12, 3)
    found = diagnose(model, lambda: model(x).square().mean())
    forward = next(way for way in found.ways if way.name == "forward")
    if forward.works:
        pytest.skip("this torch has mended it")
    assert "not symmetric" in forward.why
    assert forward.difference > 1e-3


def test_the_cost_of_several_products_shares_the_first_evaluation() -> None:
    assert Way("exact", works=True, cost=3.0, further=1.5).of(4) == 7.5
    text = str(Diagnosis(3, 1e-3, True, (), (), (), (), (), (Way("exact", False, "no"),), "", (), ("a note",)))
    assert text.splitlines()[3].split() == ["exact", "no", "-", "-", "no"]
    assert text.endswith("- a note")


def test_what_cannot_be_examined_is_refused_with_a_sentence() -> None:
    model = nn.Linear(2, 1)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (3, lambda: None, TypeError, "diagnose needs a torch.nn.Module as model, got int"),
        (model, 3, TypeError, "a function that returns the loss with its graph, got int"),
        (model, lambda: 3.0, ValueError, "the loss must be one real number, a tensor with its graph, got float"),
        (model, lambda: model(torch.ones(3, 2)), ValueError, "got a tensor of shape (3, 1)"),
        (model, lambda: model(torch.ones(1, 2)).detach(), ValueError, "the loss has no graph"),
        (nn.Linear(1, 1).requires_grad_(requires_grad=False), lambda: None, ValueError, "nothing to train"),
    ]
    for given, loss, kind, said in cases:
        with pytest.raises(kind) as error:
            diagnose(given, loss)
        assert said in str(error.value)
