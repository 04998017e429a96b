"""Prox and projection inside the step: per group or per parameter, serialised as data, feasible whatever happens in between."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import stableopt as so
from stableopt.constraints import (
    L1,
    Box,
    ElasticNet,
    L2Ball,
    NonNegative,
    SpectralBall,
    WeightedL1,
    attach,
    attached,
)
from stableopt.optim import SGD, AdamW
from stableopt.optim.regularize import decoded, encoded, gather_attached, regularized, regularizer_of
from tests.optim.problems import closure_of

CLASSES = [SGD, AdamW]
SETS = [Box(-0.3, 0.3), L2Ball(0.5), SpectralBall(0.5)]


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mode", ["off", "monitor", "strict"])
def test_each_parameter_of_a_list_stays_in_its_own_set(cls: type, mode: str) -> None:
    ps = [nn.Parameter(5 * torch.randn(3, 3)) for _ in range(4)]
    sets = [Box(-0.1, 0.1), None, SpectralBall(0.5), NonNegative()]
    optimizer = cls(ps, lr=0.1, constraint=sets, guard=mode)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(((p + 1) ** 2).sum() for p in ps)
        loss.backward()
        return loss

    free = ps[1].detach().clone()
    for _ in range(10):
        optimizer.step(closure)
        for p, constraint in zip(ps, sets, strict=True):
            assert constraint is None or constraint.violation(p.detach()) == 0.0
    assert not torch.equal(ps[1].detach(), free)
    assert float(ps[1].detach().abs().max()) > 0.5


@pytest.mark.parametrize("bad", [[Box(0.0, 1.0)], [Box(0.0, 1.0), None, None], []])
def test_a_list_of_another_length_is_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="one entry for each of the 2 parameters"):
        SGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], constraint=bad)
    with pytest.raises(TypeError, match="a penalty goes to prox"):
        SGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], constraint=[L1(0.1), None])


def test_a_list_of_the_user_is_not_shared() -> None:
    sets = [Box(0.0, 1.0)]
    optimizer = SGD([nn.Parameter(torch.ones(1))], constraint=sets)
    sets[0] = None
    assert optimizer.param_groups[0]["constraint"] == [Box(0.0, 1.0)]


def test_regularizers_of_a_group_in_order() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    group = {"params": [a, b], "prox": None, "constraint": [None, Box(0.0, 1.0)]}
    assert [regularizer_of(group, i) for i in (0, 1)] == [None, Box(0.0, 1.0)]
    assert [(p is b, r) for p, _, r in regularized([group])] == [(True, Box(0.0, 1.0))]
    group |= {"prox": L1(0.1), "constraint": None}
    assert [r for _, _, r in regularized([group])] == [L1(0.1)] * 2


def test_sets_of_constrained_modules_are_taken_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    so.constrain(model[0], "weight", SpectralBall(0.5), by="projection")
    optimizer = so.optim.AdamW(model.parameters(), lr=0.1)
    by_name = {id(p): name for name, p in model.named_parameters()}
    sets = {by_name[id(p)]: c for p, _, c in regularized(optimizer.param_groups)}
    assert sets == {"0.weight": SpectralBall(0.5)}
    x = torch.randn(16, 4)
    for _ in range(10):
        optimizer.step(closure_of(optimizer, model, lambda model: -model(x).square().mean()))
        assert SpectralBall(0.5).violation(model[0].weight.detach()) == 0.0
    again = so.optim.AdamW(model.parameters(), lr=0.5)
    again.load_state_dict(reloaded(optimizer.state_dict()))
    assert again.param_groups[0]["constraint"] == optimizer.param_groups[0]["constraint"]


def test_parameters_without_a_set_leave_the_group_as_it_is() -> None:
    group = {"params": [nn.Parameter(torch.ones(1))], "prox": L1(0.1), "constraint": None}
    gather_attached(group)
    assert group["constraint"] is None
    w = nn.Parameter(torch.ones(1))
    attach(w, NonNegative())
    attach(w, None)
    assert attached(w) is None
    assert SGD([w]).param_groups[0]["constraint"] is None


@pytest.mark.parametrize("value", [None, L1(0.5), Box(-1.0, float("inf")), [None, SpectralBall(2.0)], [], 3])
def test_specifications_are_data_and_come_back(value: Any) -> None:
    spec = encoded(value)
    assert reloaded({"x": spec})["x"] == spec
    assert decoded(spec) == value
    assert decoded(decoded(spec)) == value  # what is decoded already stays
    with pytest.raises(ValueError, match="Nonsense"):
        decoded({"name": "Nonsense"})


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("given", [Box(-0.3, 0.3), [Box(-0.3, 0.3), None], [SpectralBall(0.5), L2Ball(1.0)]])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_sets_survive_files_copies_and_pickles(cls: type, given: Any, copied: Any) -> None:
    ps = [nn.Parameter(torch.randn(2, 2)) for _ in range(2)]
    optimizer = cls(ps, lr=0.1, constraint=given)
    other = cls([nn.Parameter(torch.randn(2, 2)) for _ in range(2)], lr=0.7)
    other.load_state_dict(reloaded(optimizer.state_dict()))
    for one in (other, copied(optimizer), copied(other)):
        assert one.param_groups[0]["constraint"] == given
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        one.step()
        assert all(c.violation(p.detach()) == 0.0 for p, _, c in regularized(one.param_groups))
    assert optimizer.param_groups[0]["constraint"] == given  # writing a file does not turn sets into data


@pytest.mark.parametrize("constraint", SETS, ids=repr)
@pytest.mark.parametrize("cls", CLASSES)
def test_loading_a_state_moves_parameters_into_their_sets(cls: type, constraint: Any) -> None:
    trained = cls([nn.Parameter(torch.zeros(4, 3))], lr=0.1, constraint=constraint)
    w = nn.Parameter(5 * torch.randn(4, 3))
    optimizer = cls([w], lr=0.1)
    optimizer.load_state_dict(trained.state_dict())
    assert constraint.violation(w.detach()) == 0.0


def into(model: nn.Module, how: str) -> None:
    if how == "bfloat16":
        model.to(torch.bfloat16)
    elif how == "half":
        model.half()
    elif how == "load_state_dict":
        model.load_state_dict({k: 10 * torch.randn_like(v) for k, v in model.state_dict().items()})
    elif how == "assign":
        with torch.no_grad():
            model.weight.data = 10 * torch.randn_like(model.weight)
    else:
        with torch.no_grad():
            model.weight.mul_(30)


@pytest.mark.parametrize("how", ["bfloat16", "half", "load_state_dict", "assign", "moved"])
@pytest.mark.parametrize("constraint", SETS, ids=repr)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mode", ["off", "strict"])
def test_whatever_happens_to_the_weights_the_closure_sees_them_inside_and_the_step_ends_inside(
    how: str, constraint: Any, cls: type, mode: str
) -> None:
    model = nn.Linear(6, 5, bias=False)
    optimizer = cls(model.parameters(), lr=0.1, constraint=constraint, guard=mode)
    target = torch.randn(5, 6)
    seen = []

    def loss(model: nn.Module) -> torch.Tensor:
        seen.append(constraint.violation(model.weight.detach()))
        return (model.weight.double() - target).square().sum()

    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, loss))
    model.zero_grad()
    into(model, how)
    if how in {"bfloat16", "half"}:  # state of another dtype is an error of torch's step
        optimizer.state.clear()
    assert how in {"bfloat16", "half"} or constraint.violation(model.weight.detach()) > 0.0
    optimizer.step(closure_of(optimizer, model, loss))
    assert constraint.violation(model.weight.detach()) == 0.0
    into(model, how)
    optimizer.project_()
    assert constraint.violation(model.weight.detach()) == 0.0
    assert set(seen) == {0.0}


def test_a_set_that_becomes_smaller_is_entered_before_anything_is_evaluated() -> None:
    """A radius that falls over time: the way into the new set is no displacement."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SGD([w], lr=0.1, momentum=0.9, constraint=L2Ball(5.0), guard="strict")
    flat = closure_of(optimizer, w, lambda w: 0.0 * w.sum())
    optimizer.step(flat)
    optimizer.param_groups[0]["constraint"] = L2Ball(1.0)
    for _ in range(3):
        optimizer.step(flat)
        torch.testing.assert_close(w.detach(), torch.tensor([0.6, 0.8]))
        assert optimizer.last_step.displacement == 0.0


def test_a_set_that_becomes_smaller_holds_a_parameter_without_gradient_too() -> None:
    w, v = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1))
    optimizer = SGD([w, v], lr=0.1, constraint=[L2Ball(5.0), None])
    v.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["constraint"] = [L2Ball(1.0), None]
    optimizer.step()
    assert L2Ball(1.0).violation(w.detach()) == 0.0


def test_a_frozen_parameter_is_left_alone_and_enters_its_set_when_it_is_thawed() -> None:
    w, v = nn.Parameter(torch.tensor([6.0, 8.0]), requires_grad=False), nn.Parameter(torch.ones(1))
    optimizer = SGD([w, v], lr=0.1, momentum=0.9, constraint=[L2Ball(1.0), None], guard="strict")
    optimizer.step(closure_of(optimizer, v, lambda v: v.sum()))
    assert w.tolist() == [6.0, 8.0]
    w.requires_grad_()
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, lambda w: 0.0 * w.sum()))
        torch.testing.assert_close(w.detach(), torch.tensor([0.6, 0.8]))


def test_only_the_parameters_with_a_gradient_are_thresholded() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SGD([a, b], lr=0.1, prox=L1(1.0))
    a.grad = torch.zeros(2)
    optimizer.step()
    assert a.tolist() == pytest.approx([0.9, 0.9])
    assert b.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distributed_checkpoints_carry_lists_of_sets(cls: type, dtype: torch.dtype) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2).to(dtype)
    optimizer = cls(model.parameters(), lr=0.1, constraint=[SpectralBall(0.5), None])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    other = cls(model.parameters(), lr=0.7)
    set_optimizer_state_dict(model, other, saved)
    assert other.param_groups[0]["constraint"] == [SpectralBall(0.5), None]
    assert other.param_groups[0]["step_count"] == 1


def test_creating_state_for_a_distributed_checkpoint_is_no_step() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1, constraint=L2Ball(9.0))
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["step_count"] == 0


def test_a_state_whose_sets_do_not_fit_is_refused() -> None:
    w = nn.Parameter(torch.ones(2, 2))
    source = SGD([w], lr=0.1, prox=so.constraints.NuclearNorm(0.1))
    target = AdamW([w], lr=0.1)
    state = target.state_dict()
    state["param_groups"][0]["prox"] = source.state_dict()["param_groups"][0]["prox"]
    with pytest.raises(ValueError, match="no exact prox"):
        target.load_state_dict(state)
    assert target.param_groups[0]["prox"] is None
    state["param_groups"][0] |= {"prox": None, "constraint": [None, None]}
    with pytest.raises(ValueError, match="one entry for each"):
        target.load_state_dict(state)


@pytest.mark.parametrize("options", [{"constraint": Box(-1.0, 1.0)}, {"constraint": L2Ball(1.0)}, {"prox": L1(0.01)}])
@pytest.mark.parametrize("mode", ["off", "lazy", "strict"])
def test_momentum_of_sparse_gradients_is_that_of_dense_ones(options: dict, mode: str) -> None:
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=sparse)
        optimizer = SGD(table.parameters(), lr=0.7, momentum=0.9, guard=mode, **options)  # pyright: ignore[reportArgumentType]

        def closure(table: nn.Embedding = table, optimizer: SGD = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = table(torch.tensor([1, 2, 2])).pow(2).sum()
            loss.backward()
            return loss

        with torch.sparse.check_sparse_tensor_invariants(enable=True):
            for _ in range(8):
                optimizer.step(closure)
        ends.append(table.weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("regularizer", [L1(0.05), ElasticNet(0.05, 0.1)])
def test_parameters_of_different_ages_take_the_prox_of_their_own_rate(regularizer: Any) -> None:
    """Where torch does not dampen, in the first step of a parameter, the prox is that of the whole rate."""
    young, old = (nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    optimizer = SGD([old, young], lr=0.1, momentum=0.9, dampening=0.5, prox=regularizer, guard="off")
    old.grad = torch.zeros(3)
    optimizer.step()
    with torch.no_grad():
        old.fill_(2.0)
    buffer = optimizer.state[old]["momentum_buffer"].clone()
    old.grad = young.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(young.detach(), regularizer.prox(torch.full((3,), 2.0 - 0.1), 0.1))
    torch.testing.assert_close(old.detach(), regularizer.prox(2.0 - 0.1 * (0.9 * buffer + 0.5), 0.05))


@pytest.mark.parametrize("cls", [AdamW, so.optim.Adam, so.optim.RAdam, so.optim.RMSprop])
def test_a_penalty_that_is_treated_alone_is_treated_in_the_metric_like_one_of_many(cls: type) -> None:
    """Weighted or not, and a parameter with a single entry or one entry of many: the same threshold."""
    start, ends = torch.tensor([2.0, -1.0, 0.5]), []
    parts = ([start.clone()], [start.clone()], [x.reshape(1) for x in start.clone()])
    for values, penalty in zip(parts, (L1(0.05), WeightedL1((0.05, 0.05, 0.05)), L1(0.05)), strict=True):
        ws = [nn.Parameter(v) for v in values]
        optimizer = cls(ws, lr=0.1, prox=penalty, guard="off")
        for step in range(4):
            whole = torch.tensor([3.0, 0.1, -0.4]) * (1 + step)
            for w, grad in zip(ws, whole.split([w.numel() for w in ws]), strict=True):
                w.grad = grad.clone()
            optimizer.step()
        ends.append(torch.cat([w.detach() for w in ws]))
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])
