"""Groups, hooks, state dicts and schedulers behave as torch's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box, L2Ball, NonNegative, SpectralBall, attach
from stableopt.optim import SGD, AdamW
from tests.optim.problems import closure_of, quadratic

PAIRS = [(SGD, torch.optim.SGD, {"momentum": 0.9}), (AdamW, torch.optim.AdamW, {})]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_step_hooks_run_once_whether_torch_patched_its_class_or_not(order: int, cls: type) -> None:
    w, f, _ = quadratic()
    if order:
        cls.torch_class(
            [nn.Parameter(torch.ones(1))]
        )  # torch wraps the step of its class when the first instance is made
    optimizer = cls([w], lr=0.01)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(closure_of(optimizer, w, f))
    assert calls == ["pre", "post"]


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
@pytest.mark.parametrize("foreach", [False, True, None])
def test_without_guard_and_prox_the_run_is_torchs_bit_for_bit(
    ours: type, theirs: type, options: dict, foreach: bool | None
) -> None:
    runs = []
    for make in (
        lambda p: ours(p, lr=0.05, guard="off", foreach=foreach, **options),
        lambda p: theirs(p, lr=0.05, foreach=foreach, **options),
    ):
        w, f, _ = quadratic()
        optimizer = make([w])
        for _ in range(20):
            optimizer.step(closure_of(optimizer, w, f))
        runs.append(w.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_a_checkpoint_of_torch_loads_and_training_goes_on_and_back_again(
    ours: type, theirs: type, options: dict
) -> None:
    w, f, _ = quadratic()
    optimizer = theirs([w], lr=0.05, **options)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, w, f))
    saved, start = copy.deepcopy(optimizer.state_dict()), w.detach().clone()
    for _ in range(5):
        optimizer.step(closure_of(optimizer, w, f))
    expected = w.detach().clone()

    def go_on(cls: type, state: dict, **extra: object) -> tuple[torch.Tensor, dict]:
        v = nn.Parameter(start.clone())
        second = cls([v], lr=1.0, **extra)
        second.load_state_dict(copy.deepcopy(state))  # torch shares tensors with what it loads
        for _ in range(5):
            second.step(closure_of(second, v, f))
        return v.detach(), second.param_groups[0]

    value, group = go_on(ours, saved, guard="off")
    assert torch.equal(value, expected)
    assert group["guard"] == "off"
    assert group["lr"] == 0.05

    mine = ours([nn.Parameter(start.clone())], lr=0.05, guard="off", **options)
    mine.load_state_dict(copy.deepcopy(saved))
    value, _ = go_on(theirs, mine.state_dict())
    assert torch.equal(value, expected)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_state_dicts_are_plain_data_and_restore_regularizers(cls: type) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = cls([{"params": [a], "prox": L1(0.1)}, {"params": [b], "constraint": Box(0.0, float("inf"))}], lr=0.1)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = cls([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))]}], lr=1.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["prox"] == L1(0.1)
    assert other.param_groups[1]["constraint"] == Box(0.0, float("inf"))
    assert other.param_groups[0]["step_count"] == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_copies_carry_on(cls: type, duplicate: object) -> None:
    w, f, _ = quadratic()
    optimizer = cls([w], lr=0.05, prox=L1(0.01), guard="strict")
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, f))
    twin = duplicate(optimizer)
    assert twin.last_step is None
    v = twin.param_groups[0]["params"][0]
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, f))
        twin.step(closure_of(twin, v, f))
    assert torch.equal(v.detach(), w.detach())
    twin.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert twin.param_groups[1]["guard"] == "strict"


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ],
)
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_schedulers_drive_the_rate(cls: type, schedule: object) -> None:
    w, f, _ = quadratic()
    optimizer = cls([w], lr=0.05)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(6):
        optimizer.step(closure_of(optimizer, w, f))
        scheduler.step()
        rates.append(optimizer.last_step.lr[0] / optimizer.last_step.scale)
    assert len({round(r, 12) for r in rates}) > 1


@pytest.mark.parametrize(
    "regularizer",
    [
        {"constraint": Box(-0.3, 0.3)},
        {"constraint": L2Ball(0.5)},
        {"constraint": NonNegative()},
        {"constraint": SpectralBall(0.5)},
    ],
)
@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_step_ends_in_the_set_in_the_storage_dtype(cls: type, regularizer: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    w = nn.Parameter(torch.randn(4, 3).to(dtype))
    optimizer = cls([w], lr=0.2, guard="off", **regularizer)
    target = torch.randn(4, 3)
    for _ in range(15):
        optimizer.step(closure_of(optimizer, w, lambda w: (w.double() - target).square().sum()))
        assert regularizer["constraint"].violation(w.detach()) == 0.0


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SGD, {"momentum": 0.9, "lr": 0.1}),
        (SGD, {"momentum": 0.5, "dampening": 0.5, "lr": 0.2}),
        (AdamW, {"weight_decay": 0.0, "lr": 0.05}),
    ],
)
def test_the_stationary_point_is_that_of_the_regularized_problem(cls: type, options: dict) -> None:
    """Soft threshold and clamp of the unconstrained minimizer, in closed form."""
    target = torch.tensor([2.0, 0.3, -1.5, -0.1])
    for key, regularizer, solution in (
        ("prox", L1(0.5), torch.tensor([1.5, 0.0, -1.0, 0.0])),
        ("constraint", Box(-1.0, 1.0), torch.tensor([1.0, 0.3, -1.0, -0.1])),
    ):
        w = nn.Parameter(torch.zeros(4))
        optimizer = cls([w], guard="backtrack", **options, **{key: regularizer})
        for _ in range(1500):
            optimizer.step(closure_of(optimizer, w, lambda w: 0.5 * (w - target).square().sum()))
        torch.testing.assert_close(w.detach(), solution, atol=2e-4, rtol=0)


def test_a_step_without_a_closure_is_torchs_and_says_so() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.5, guard="strict", constraint=Box(0.0, 1.0))
    w.grad = torch.tensor([1.0, -1.0])
    assert optimizer.step() is None
    assert w.tolist() == [0.5, 1.0]
    assert optimizer.last_step.verdict == "unobserved"
    assert "needs a closure" in optimizer.last_step.reason


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_rate_of_zero_moves_nothing(cls: type) -> None:
    w = nn.Parameter(torch.tensor([0.25, -0.5]))
    optimizer = cls([w], lr=0.0, constraint=Box(-1.0, 1.0), guard="strict")
    optimizer.step(closure_of(optimizer, w, lambda w: w.square().sum()))
    assert w.tolist() == [0.25, -0.5]
    assert optimizer.last_step.verdict == "undecided"
    w.grad = torch.zeros(2)
    optimizer.step()
    assert w.tolist() == [0.25, -0.5]


def test_a_closure_that_returns_nothing_is_not_judged() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = SGD([w], lr=0.5)

    def closure() -> None:
        w.grad = torch.ones(1)

    optimizer.step(closure)
    assert w.tolist() == [0.5]
    assert optimizer.last_step.verdict == "unobserved"


def test_groups_that_make_no_sense_are_refused_and_leave_the_optimizer_as_it_was() -> None:
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.1, momentum=0.5)
    for group, error, sentence in [
        ({"prox": L1(0.1), "constraint": Box(0, 1)}, ValueError, "got both"),
        ({"prox": 3.0}, TypeError, "must be a Regularizer"),
        ({"constraint": L1(0.1)}, TypeError, "a penalty goes to prox"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"maximize": True}, ValueError, "common energy"),
        ({"nesterov": True, "constraint": Box(0, 1)}, ValueError, "nesterov"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        (
            {"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)]},
            TypeError,
            "floating",
        ),
    ]:
        with pytest.raises(error, match=sentence):
            optimizer.add_param_group({"params": [v]} | group)
        assert len(optimizer.param_groups) == 1


def test_a_projected_parameter_must_come_with_its_constraint() -> None:
    w = nn.Parameter(torch.ones(2))
    attach(w, NonNegative())
    with pytest.raises(ValueError, match="parameter_groups"):
        SGD([w], lr=0.1)
    assert SGD([{"params": [w], "constraint": NonNegative()}], lr=0.1).param_groups[0]["constraint"] == NonNegative()


def test_a_regularizer_of_the_constructor_is_the_default_of_the_groups() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = SGD(
        [{"params": [a]}, {"params": [b], "prox": L1(1.0)}, {"params": [c], "constraint": None}],
        lr=0.1,
        constraint=Box(0.0, 1.0),
    )
    assert [(g["prox"], g["constraint"]) for g in optimizer.param_groups] == [
        (None, Box(0.0, 1.0)),
        (L1(1.0), None),
        (None, None),
    ]


def test_parameters_without_gradient_stay_where_they_are(device: torch.device) -> None:
    used, unused = nn.Parameter(torch.ones(2, device=device)), nn.Parameter(torch.ones(2, device=device))
    optimizer = SGD([used, unused], lr=0.1, momentum=0.9, guard="strict")
    optimizer.step(closure_of(optimizer, used, lambda w: w.square().sum()))
    assert unused.tolist() == [1.0, 1.0]
    assert optimizer.last_step.verdict == "decreased"
