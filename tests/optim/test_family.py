"""Arguments are torch's, and bad ones are refused with a sentence."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from stableopt.constraints import L2Ball
from stableopt.constraints.base import Regularizer
from stableopt.optim import SGD, AdamW, GuardedOptimizer


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_they_are_torch_optimizers_with_the_same_arguments_and_defaults(cls: type[GuardedOptimizer]) -> None:
    assert issubclass(cls, cls.torch_class)
    theirs = inspect.signature(cls.torch_class.__init__).parameters
    ours = inspect.signature(cls.__init__).parameters
    assert {n: p.default for n, p in theirs.items()} == {n: ours[n].default for n in theirs}
    assert {n: p.kind for n, p in theirs.items()} == {n: ours[n].kind for n in theirs}


@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1.0}, ValueError), ({"lr": float("nan")}, ValueError), ({"lr": float("inf")}, ValueError),
        ({"lr": True}, TypeError), ({"lr": "0.1"}, TypeError), ({"lr": None}, TypeError),
        ({"lr": torch.ones(2)}, ValueError), ({"weight_decay": -1.0}, ValueError),
        ({"weight_decay": float("nan")}, ValueError), ({"weight_decay": float("inf")}, ValueError),
        ({"lr": torch.tensor(float("nan"))}, ValueError), ({"lr": torch.tensor(-1.0)}, ValueError),
        ({"guard": "loud"}, ValueError), ({"differentiable": True}, ValueError), ({"constraint": 1.0}, TypeError),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(cls: type, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        cls([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    "options", [{"eps": float("inf")}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, float("nan"))}]
)
def test_bad_arguments_of_adamw_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"eps|epsilon|beta"):
        AdamW([nn.Parameter(torch.ones(1))], **options)


def test_a_tensor_rate_works() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([w], lr=torch.tensor(0.25), guard="strict")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert w.tolist() == [1.0]
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.last_step.lr == (0.25,)


def test_an_empty_list_of_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        SGD([])


class _Norm(Regularizer):
    """A penalty that is not separable."""

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return x.norm().double()

    def prox(self, x: torch.Tensor, step: float | torch.Tensor = 1.0) -> torch.Tensor:
        return x


def test_adamw_refuses_a_penalty_without_a_prox_in_its_metric() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no exact prox in the metric of an adaptive optimizer"):
        AdamW([w], prox=_Norm())
    assert AdamW([w], constraint=L2Ball(1.0)).param_groups[0]["constraint"] == L2Ball(1.0)


@pytest.mark.parametrize("dampening", [1.0, 1.5, float("nan"), float("inf")])
def test_a_dampening_that_leaves_no_gradient_is_refused_where_an_energy_is_asked_for(dampening: float) -> None:
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="dampening"):
        SGD([w], momentum=0.9, dampening=dampening)
    with pytest.raises(ValueError, match="dampening"):
        SGD([w], momentum=0.9, dampening=dampening, guard="off", constraint=L2Ball(1.0))
    if dampening in {1.0, 1.5}:
        assert SGD([w], momentum=0.9, dampening=dampening, guard="off").defaults["dampening"] == dampening


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_rate_that_a_schedule_spoils_is_refused_before_anything_moves(cls: type) -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = cls([w], lr=0.1)
    for bad, error in (
        (float("nan"), ValueError),
        (-0.1, ValueError),
        ("0.1", TypeError),
        (torch.tensor(float("inf")), ValueError),
    ):
        optimizer.param_groups[0]["lr"] = bad
        w.grad = torch.ones(1)
        with pytest.raises(error, match="lr"):
            optimizer.step()
        assert w.item() == 1.0
