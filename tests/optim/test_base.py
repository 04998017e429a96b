"""Groups, hooks, state dicts and schedulers behave as torch's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box, L2Ball, NonNegative, SpectralBall, attach
from stableopt.optim import SGD, AdamW, RMSprop
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
        for _ in range(300):
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


def test_a_parameter_attached_to_a_set_brings_it_along() -> None:
    w, free = nn.Parameter(-torch.ones(2)), nn.Parameter(-torch.ones(2))
    attach(w, NonNegative())
    optimizer = SGD([w, free], lr=0.1)
    assert optimizer.param_groups[0]["constraint"] == [NonNegative(), None]
    w.grad, free.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert w.tolist() == [0.0, 0.0]
    assert free.tolist() == [-1.1, -1.1]
    assert SGD([w], lr=0.1).param_groups[0]["constraint"] == NonNegative()
    assert SGD([w], lr=0.1, constraint=NonNegative()).param_groups[0]["constraint"] == NonNegative()


@pytest.mark.parametrize("own", [{"constraint": Box(-1.0, 1.0)}, {"prox": L1(0.1)}])
def test_a_parameter_attached_to_one_set_is_refused_with_another(own: dict) -> None:
    w = nn.Parameter(torch.ones(2))
    attach(w, NonNegative())
    with pytest.raises(ValueError, match="constrained to"):
        SGD([w], lr=0.1, **own)


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


def test_the_first_step_takes_the_prox_of_its_own_rate() -> None:
    """torch does not dampen the first gradient: the prox step is then η, not η(1−δ), or the law of the step fails."""
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.1, momentum=0.9, dampening=0.5, prox=L1(2.0), guard="off")
    for expected in (1.0 - 0.1 * 2.0, None):
        start, buffer = w.item(), optimizer.state.get(w, {}).get("momentum_buffer")
        buffer = None if buffer is None else buffer.item()
        w.grad = torch.zeros(1)
        optimizer.step()
        if expected is None:
            expected = start - 0.1 * 0.9 * buffer - 0.1 * 0.5 * 2.0
        assert w.item() == pytest.approx(expected, abs=1e-15)
        assert optimizer.state[w]["momentum_buffer"].item() == pytest.approx((start - w.item()) / 0.1, abs=1e-13)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_settings_of_the_guard_belong_to_the_whole_optimizer(cls: type) -> None:
    w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    for setting in ({"guard": "off"}, {"shrink": 0.1}, {"armijo": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} belongs to the whole"):
            cls([{"params": [w]}, {"params": [v]} | setting], guard="strict")
    optimizer = cls([{"params": [w], "guard": "strict"}], guard="strict")
    optimizer.param_groups[0]["guard"] = "monitor"
    optimizer.add_param_group({"params": [v]})
    assert optimizer.param_groups[1]["guard"] == "monitor"


@pytest.mark.parametrize(
    ("cls", "options"),
    [(SGD, {"momentum": 0.9, "weight_decay": 0.1}), (AdamW, {"weight_decay": 0.1}), (RMSprop, {"momentum": 0.5})],
)
def test_complex_parameters_are_pairs_of_real_ones(cls: type, options: dict) -> None:
    """A step on z is the step on (re, im), energies included; adaptive steps take no regularizer for it."""
    z, pair = nn.Parameter(torch.tensor([2.0 + 1.0j, -1.0j])), nn.Parameter(torch.tensor([[2.0, 1.0], [0.0, -1.0]]))
    reports = []
    for w in (z, pair):
        optimizer = cls([w], lr=0.1, guard="strict", **options)
        for _ in range(5):
            optimizer.step(
                closure_of(optimizer, w, lambda w: (w * w.conj()).real.sum() if w.is_complex() else w.square().sum())
            )
        reports.append(optimizer.last_step)
    torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach())
    assert reports[0].energy_after == pytest.approx(reports[1].energy_after, rel=1e-9)
    assert reports[0].predicted == pytest.approx(reports[1].predicted, rel=1e-9)
    with pytest.raises(ValueError, match="view_as_real"):
        AdamW([nn.Parameter(torch.ones(1, dtype=torch.complex128))], prox=L1(0.1))


@pytest.mark.parametrize(("ours", "theirs", "options"), [(SGD, torch.optim.SGD, {"weight_decay": 0.1}), PAIRS[1]])
def test_differentiable_is_torchs_step(ours: type, theirs: type, options: dict) -> None:
    """The derivative of a step with respect to its start, through the optimizer."""
    slopes = []
    for cls, extra in ((ours, {"guard": "off"}), (theirs, {})):
        start = torch.tensor([2.0], requires_grad=True)
        w = start.clone()
        w.retain_grad()
        optimizer = cls(
            [nn.Parameter(torch.ones(1))], lr=0.1, differentiable=True, **options, **extra
        )  # takes leaves only
        optimizer.param_groups[0]["params"] = [w]
        w.grad = 2 * w
        optimizer.step()
        slopes.append(torch.autograd.grad(w.sum(), start)[0])
    assert torch.equal(*slopes)
    assert slopes[0].item() != 1.0


@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize("guard", ["monitor", "strict"])
def test_scalars_empty_tensors_and_strided_parameters_are_parameters(
    cls: type, guard: str, device: torch.device
) -> None:
    scalar, empty = nn.Parameter(torch.tensor(3.0, device=device)), nn.Parameter(torch.zeros(0, 3, device=device))
    strided = nn.Parameter(torch.randn(4, 3, device=device).T)
    plain = nn.Parameter(strided.detach().clone(memory_format=torch.contiguous_format))
    optimizer = cls([scalar, empty, strided], lr=0.05, prox=L1(0.1), guard=guard)
    twin = cls([nn.Parameter(torch.tensor(3.0, device=device)), plain], lr=0.05, prox=L1(0.1), guard=guard)

    def closure_for(o: torch.optim.Optimizer) -> object:
        def closure() -> torch.Tensor:
            o.zero_grad()
            loss = sum(p.square().sum() for p in o.param_groups[0]["params"])
            loss.backward()
            return loss

        return closure

    for _ in range(5):
        optimizer.step(closure_for(optimizer))
        twin.step(closure_for(twin))
        assert optimizer.last_step.verdict == "decreased"
    assert torch.equal(strided.detach(), plain.detach())
    assert strided.stride() == (1, 3)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_distributed_checkpoints_carry_settings_and_move_nothing(cls: type) -> None:
    """torch creates missing state by a step with zero gradients and learning rate zero: it must change no weight."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = cls(model.parameters(), lr=0.1, guard="strict", prox=L1(0.1))
    saved = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    other = cls(model.parameters(), lr=0.7)
    set_optimizer_state_dict(model, other, saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    group = other.param_groups[0]
    assert (group["lr"], group["guard"], group["prox"]) == (0.1, "strict", L1(0.1))


@pytest.mark.parametrize("cls", [SGD, AdamW])
@pytest.mark.parametrize(
    "regularizer", [{"prox": L1(0.3)}, {"constraint": Box(-0.5, 0.5)}, {"constraint": L2Ball(1.0)}]
)
def test_watching_changes_nothing_with_a_regularizer_either(cls: type, regularizer: dict) -> None:
    """monitor, and strict at a rate that passes, give the iterates of off, bit for bit."""
    runs = []
    for guard in ("off", "monitor", "strict"):
        w, f, _ = quadratic()
        with torch.no_grad():
            w.mul_(0.1)
        optimizer = cls([w], lr=0.01, guard=guard, **regularizer)
        for _ in range(30):
            optimizer.step(closure_of(optimizer, w, f))
            assert guard != "strict" or optimizer.last_step.scale == 1.0
        runs.append((w.detach(), optimizer.state_dict()["state"].get(0, {})))
    for value, state in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert all(torch.equal(v, runs[0][1][k]) for k, v in state.items())
