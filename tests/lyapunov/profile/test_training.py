"""Perturbations through a training: against the training itself, without touching it, and an honest end of a profile."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stableopt as so
from stableopt.constraints import L1, L2Ball, NonNegative
from stableopt.lyapunov.profile.training import Profile


def net(*, norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)] if norm else [nn.Tanh()]
    return nn.Sequential(nn.Linear(3, 4, bias=not norm), *middle, nn.Linear(4, 2))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    drawn = [torch.randint(0, 64, (16,), generator=generator) for _ in range(steps)]
    return [(x[i], y[i]) for i in drawn]


def train(model, optimizer, steps=12, *, clip=None, closure=True, backward=None):
    torch.manual_seed(2)
    for x, y in batches(steps):

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (backward or torch.Tensor.backward)(loss)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


def groups(model, **options):
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == deep] for deep in (True, False))
    return [{"params": matrices, **options}, {"params": vectors}]


RULES = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
    "heavy ball": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "Nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.02),
    "AdamW, amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1, amsgrad=True),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.02),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.02),
    "Adam, coupled decay": lambda m: torch.optim.Adam(m.parameters(), lr=0.02, weight_decay=0.1),
    "NAdam, coupled decay": lambda m: torch.optim.NAdam(m.parameters(), lr=0.02, weight_decay=0.1),
    "RAdam, coupled decay": lambda m: torch.optim.RAdam(m.parameters(), lr=0.02, weight_decay=0.1),
    "RMSprop, decay": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, weight_decay=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "Lion": lambda m: so.optim.Lion(m.parameters(), lr=0.01),
    "guarded SGD": lambda m: so.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "guarded SGD, far too fast": lambda m: so.optim.SGD(m.parameters(), lr=30.0, momentum=0.9),
    "guarded AdamW": lambda m: so.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
    "prox": lambda m: so.optim.SGD(groups(m, prox=L1(0.01)), lr=0.1, momentum=0.9, guard="off"),
    "projection": lambda m: so.optim.SGD(groups(m, constraint=L2Ball(1.0)), lr=0.2, momentum=0.5, guard="off"),
    "prox in a metric": lambda m: so.optim.AdamW(groups(m, prox=L1(0.01)), lr=0.02, guard="off"),
    "a set in a metric": lambda m: so.optim.Adam(groups(m, constraint=NonNegative()), lr=0.02, guard="off"),
}


def first_direction(profile, model):
    """Return the first perturbation, in the order of the parameters of the model."""
    found = {id(p): c[""][0].clone() for p, c in zip(profile._system.parameters, profile._system.columns, strict=True)}
    return [found[id(p)] for p in model.parameters()]


def displaced(make, along, size, steps, **options):
    """Return where a training ends that begins a little beside."""
    model = net(**options)
    with torch.no_grad():
        for p, d in zip(model.parameters(), along, strict=True):
            p.add_(d, alpha=size)
    optimizer = make(model)
    train(model, optimizer, steps)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("norm", [False, True])
def test_the_perturbation_is_the_derivative_of_the_whole_training(name, norm):
    """Twelve steps of the real optimizer from two beginnings a little apart, batch statistics and dropout included."""
    make, steps = RULES[name], 12
    start = [p.detach().clone() for p in net(norm=norm).parameters()]
    if name == "projection":  # begin inside, where the projection before the first step has a derivative
        start = [0.5 * p / max(1.0, float(p.norm())) for p in start]
    if name == "a set in a metric":
        start = [p.abs() + 0.01 for p in start]
    model = net(norm=norm)
    with torch.no_grad():
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
    optimizer = make(model)
    profile = Profile(model, optimizer, directions=1, cadence=1000).attach()
    profile._follows()
    along = first_direction(profile, model)
    train(model, optimizer, steps)
    assert profile.reason == ""
    found = torch.cat([d.flatten() for d in first_direction(profile, model)])
    profile.close()
    offsets = [a - b for a, b in zip(start, net(norm=norm).parameters(), strict=True)]

    def end(size):
        moved = [o.detach() + size * d for o, d in zip(offsets, along, strict=True)]
        return displaced(make, moved, 1.0, steps, norm=norm)

    h = 1e-6
    difference = (end(h) - end(-h)) / (2 * h)
    assert torch.linalg.vector_norm(found - difference) <= 2e-6 * torch.linalg.vector_norm(difference) + 1e-8


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("closure", [True, False])
def test_the_run_is_bit_for_bit_that_without_a_profile(name, closure):
    ends = []
    for watched in (False, True):
        model = net(norm=True)
        optimizer = RULES[name](model)
        if isinstance(optimizer, so.optim.GuardedOptimizer):
            optimizer.project_()
        if watched:
            probe = torch.randn(5, 3, generator=torch.Generator().manual_seed(5))
            options = {"finite_size": 1e-4} if closure and "guarded" not in name else {}
            with Profile(
                model, optimizer, directions=3, probe=probe, look_every=5, errors=4, hyper=("lr",), **options
            ) as profile:
                train(model, optimizer, 11, closure=closure, backward=profile.backward if not closure else None)
            assert profile.reason == ""
            assert profile.result().factors.steps[-1] == 11
        else:
            train(model, optimizer, 11, closure=closure)
        state = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        grads = [p.grad for p in model.parameters()]
        ends.append([*model.parameters(), *model.buffers(), *grads, *state, torch.get_rng_state()])
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


D = sum(p.numel() for p in small().parameters())
IDENTITIES = {
    "heavy ball": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), D * math.log(0.9)),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), lr=0.02), D * math.log(0.9 * 0.999)),
    "AdamW": (
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.5),
        D * math.log(0.9 * 0.999) + D * math.log(1 - 0.01),
    ),
    "guarded AdamW": (
        lambda m: so.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.5),
        D * math.log(0.9 * 0.999) + D * math.log(1 - 0.01),
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_sum_of_all_exponents_is_known(name):
    make, expected = IDENTITIES[name]
    model = small()
    optimizer = make(model)
    with Profile(model, optimizer, directions="all", cadence=1) as profile:
        train(model, optimizer, 41)
    reading = profile.result()
    assert reading.factors.full
    assert reading.factors.count == 40  # after the first step, which makes the state
    assert abs(reading.determinant - expected) <= 1e-10
    sums = reading.factors.log_volume  # in every single step
    assert np.abs(sums - expected).max() <= 1e-9


def test_a_broken_rule_is_seen_by_the_sum_of_exponents():
    """The identity can fail: with another momentum than the one that is claimed it does, by far more than is allowed."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Profile(model, optimizer, directions="all", cadence=1) as profile:
        train(model, optimizer, 21)
    assert abs(profile.result().determinant - D * math.log(0.9001)) > 1e-4


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_clipped_gradients_are_part_of_the_map(clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    profile = Profile(model, optimizer, directions=1, cadence=1000, clip_norm=clip).attach()
    profile._follows()
    along = first_direction(profile, model)
    train(model, optimizer, 8, clip=clip)
    found = torch.cat([d.flatten() for d in first_direction(profile, model)])
    profile.close()
    ends = []
    for h in (1e-6, -1e-6):
        twin = net()
        with torch.no_grad():
            for p, d in zip(twin.parameters(), along, strict=True):
                p.add_(d, alpha=h)
        train(twin, torch.optim.SGD(twin.parameters(), lr=0.5), 8, clip=clip)
        ends.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert torch.allclose(found, (ends[0] - ends[1]) / 2e-6, atol=1e-7)


def test_a_profile_ends_where_gradients_are_not_those_of_the_loss():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with (
        pytest.warns(UserWarning, match="step 0: the gradients that the optimizer found"),
        Profile(model, optimizer) as profile,
    ):
        train(model, optimizer, 4, clip=0.05)
    reading = profile.result()
    assert "clip_norm=" in reading.reason
    assert reading.factors.count == 0
    assert reading.verdict.kind == "inconclusive"
    assert reading.exponents == ()


@pytest.mark.parametrize("within", [True, False])
def test_a_profile_ends_where_somebody_else_moves_the_parameters(within):
    """Within the step, as another library that has wrapped it, or between two steps."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    taken = []

    def meddle(*_):
        taken.append(None)
        if len(taken) == 4:
            model[0].weight.data.mul_(0.9)

    profile = Profile(model, optimizer, directions=2)
    said = "step 3: the step moved the parameters by" if within else "step 4: parameters or the state"
    if within:
        optimizer.register_step_post_hook(meddle)
    profile.attach()
    if not within:
        optimizer.register_step_post_hook(meddle)  # after that of the profile
    with pytest.warns(UserWarning, match=said):
        train(model, optimizer, 6)
    profile.close()
    assert profile.result().factors.steps.tolist() == list(range(4 if within else 5))


@pytest.mark.parametrize("what", ["momentum", "state", "load", "freeze", "group"])
def test_a_profile_ends_where_the_state_is_changed_between_steps(what):
    model = net()
    optimizer = torch.optim.SGD(list(model.parameters())[:3], lr=0.1, momentum=0.9)
    kept = copy.deepcopy(optimizer.state_dict())
    with Profile(model, optimizer, directions=2) as profile:
        train(model, optimizer, 3)
        if what == "momentum":
            optimizer.state[model[0].weight]["momentum_buffer"].zero_()
        elif what == "state":
            optimizer.state.clear()
        elif what == "load":
            optimizer.load_state_dict(kept)
        elif what == "freeze":
            model[0].weight.requires_grad_(False)
        else:
            optimizer.add_param_group({"params": [model[2].bias]})
        with pytest.warns(UserWarning, match="the profile ended early: step 3: "):
            train(model, optimizer, 2)
    assert profile.result().factors.steps.tolist() == [0, 1, 2, 3]


def test_without_closure_and_backward_it_says_what_to_do():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.warns(UserWarning, match="profile.backward"), Profile(model, optimizer):
        train(model, optimizer, 2, closure=False)


def test_an_undone_step_leaves_perturbations_as_they_are():
    model = net()
    optimizer = so.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Profile(model, optimizer, directions=2, cadence=1) as profile:
        train(model, optimizer, 3)

        def broken():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]) * math.inf
            loss.backward()
            return loss

        optimizer.step(broken)
        assert optimizer.last_step.action == "undone"
    assert np.allclose(profile.result().factors.R[-1], np.eye(2), atol=1e-12)


def test_an_error_in_one_update_and_the_learning_rate():
    """Against trainings in which the error is made and the rate is changed by hand."""
    make = RULES["heavy ball"]
    model = net()
    optimizer = make(model)
    drawn = []
    profile = Profile(model, optimizer, directions=1, errors=20, hyper=("lr",)).attach()
    strike = profile._responses._strike

    def remember():
        strike()
        drawn.append([c[""][profile._responses._directions].clone() for c in profile._system.columns])

    profile._responses._strike = remember
    train(model, optimizer, 10)
    reading = profile.result()
    profile.close()

    def end(error, lr):
        twin = net()
        other = make(twin)
        for group in other.param_groups:
            group["lr"] += lr
        if error:

            def strike_once(*_):
                hook.remove()
                for p, d in zip(twin.parameters(), drawn[0], strict=True):
                    p.data.add_(d, alpha=error)

            hook = other.register_step_post_hook(strike_once)
        train(twin, other, 10)
        return torch.cat([p.detach().flatten() for p in twin.parameters()])

    h = 1e-6
    by_error = torch.linalg.vector_norm(end(h, 0.0) - end(-h, 0.0)) / (2 * h)
    by_rate = torch.linalg.vector_norm(end(0.0, h) - end(0.0, -h)) / (2 * h)
    assert reading.errors.starts.tolist() == [0]
    assert reading.errors.log_norms[0, 0] == pytest.approx(0.0, abs=1e-12)
    assert math.exp(reading.errors.log_norms[0, 9]) == pytest.approx(float(by_error), rel=1e-6)
    assert math.exp(reading.hyper[0].log_norms[-1]) == pytest.approx(float(by_rate), rel=1e-6)


def test_a_response_that_overflows_is_kept_as_a_logarithm():
    w = nn.Parameter(torch.tensor([1e-300, 0.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    with Profile(nn.ParameterList([w]), optimizer, directions=1, errors=3000, cadence=1) as profile:
        for _ in range(300):

            def closure():
                optimizer.zero_grad()
                loss = -7.5 * (w * w).sum()
                loss.backward()
                return loss

            w.data.zero_()
            optimizer.step(closure)
    reading = profile.result()
    assert reading.errors.log_norms[0, 299] == pytest.approx(299 * math.log(16.0), rel=1e-12)  # e^829
    assert reading.windows.path[-1] == pytest.approx(300 * math.log(16.0), rel=1e-12)


def test_windows_follow_a_part_of_the_run():
    model = net()
    optimizer = RULES["heavy ball"](model)
    with Profile(model, optimizer, directions=2, window=(3, 5), cadence=1) as profile:
        train(model, optimizer, 12)
    reading = profile.result()
    assert [piece.steps.tolist() for piece in reading.pieces] == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12]]
    assert reading.windowed
    assert reading.products == 2 * 8


def test_factors_of_several_steps_are_products_of_those_of_one():
    found = []
    for cadence in (1, 4, "auto"):
        model = net()
        optimizer = RULES["Adam"](model)
        with Profile(model, optimizer, directions=3, cadence=cadence) as profile:
            train(model, optimizer, 12)
        found.append(profile.result())
    for other in found[1:]:
        assert other.windows.path[-1] == pytest.approx(found[0].windows.path[-1], abs=1e-9)
        assert np.allclose(other.factors.log_diagonal.sum(0), found[0].factors.log_diagonal.sum(0), atol=1e-9)


@pytest.mark.parametrize("method", ["exact", "forward"])
def test_every_exact_method_gives_the_same_factors(method):
    found = []
    for m in ("graph", method):
        model = net(norm=True)
        optimizer = RULES["heavy ball"](model)
        with Profile(model, optimizer, directions=2, cadence=1, method=m) as profile:
            train(model, optimizer, 6)
        found.append(profile.result())
    assert [f.backend for f in found] == ["graph", method]
    assert np.allclose(found[0].factors.R, found[1].factors.R, rtol=1e-9)


def test_the_files_hold_what_the_reading_says(tmp_path):
    model = net()
    optimizer = RULES["Adam"](model)
    with Profile(model, optimizer, tmp_path, directions=3, probe=torch.randn(4, 3), look_every=10, errors=8) as profile:
        train(model, optimizer, 30)
    reading = profile.result()
    numbers = json.loads((tmp_path / "profile.json").read_text())
    assert numbers["schema"] == 1
    assert numbers["backend"] == "graph"
    assert numbers["directions"] == 3
    assert numbers["verdict"]["kind"] == reading.verdict.kind
    assert numbers["energy"]["holds"] is True
    assert numbers["layers"] == ["0", "2"]
    assert len(numbers["forward"]) == 4
    from safetensors.numpy import load_file

    arrays = load_file(tmp_path / "profile.safetensors")
    assert np.array_equal(arrays["factors/R"], reading.factors.R)
    assert arrays["factors/steps"].dtype == np.int64
    assert np.allclose(arrays["mixed/log_norms"], np.stack(list(reading.mixed[1].values()), axis=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.json", "profile.safetensors"]


def test_the_mixed_block_is_the_derivative_of_the_representations():
    probe = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    model = net()
    optimizer = RULES["heavy ball"](model)
    profile = Profile(model, optimizer, directions=1, cadence=1, probe=probe, look_every=6).attach()
    profile._follows()
    along = first_direction(profile, model)
    train(model, optimizer, 6)
    steps, mixed = profile.result().mixed
    profile.close()
    outputs = []
    for h in (1e-6, -1e-6):
        twin = net()
        with torch.no_grad():
            for p, d in zip(twin.parameters(), along, strict=True):
                p.add_(d, alpha=h)
        train(twin, RULES["heavy ball"](twin), 6)
        outputs.append((twin[1](twin[0](probe)).detach(), twin(probe).detach()))
    assert steps.tolist() == [0, 6]
    for name, ahead, behind in zip(mixed, *outputs, strict=True):
        expected = torch.linalg.vector_norm(ahead - behind) / 2e-6
        assert math.exp(mixed[name][1]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("size", [1e-5, True])
def test_the_exponent_at_a_finite_size_is_that_of_the_derivative_for_a_smooth_net(size, tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with Profile(model, optimizer, tmp_path, directions=1, cadence=1, finite_size=size) as profile:
        train(model, optimizer, 60)
    reading = profile.result()
    assert reading.finite_size.stopped == ""
    assert reading.finite_size.kinks == ()
    count = len(reading.factors.growth) if size is not True else 50
    assert reading.finite_size.exponent.count == count - count // 10
    assert reading.finite_size.exponent.value == pytest.approx(float(reading.factors.growth[6:].mean()), abs=2e-3)
    assert json.loads((tmp_path / "profile.json").read_text())["finite_size"]["size"] > 0


def test_arguments_that_make_no_sense_are_refused():
    model = net()
    optimizer = RULES["SGD"](model)
    for options, said in [
        ({"directions": 0}, "directions"), ({"directions": 10**6}, "directions"), ({"cadence": 0}, "cadence"),
        ({"window": (5, 3)}, "window"), ({"errors": 0}, "errors"), ({"start": -1}, "start"), ({"look_every": 1.5}, "look_every"),
        ({"hyper": ("rate",)}, "hyper"), ({"clip_norm": 0.0}, "clip_norm"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Profile(model, optimizer, **options)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        Profile(optimizer, optimizer)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        Profile(model, model)
    with pytest.raises(ValueError, match="nothing is known about the update of Rprop"):
        Profile(model, torch.optim.Rprop(model.parameters()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises(ValueError, match="half precision"):
        Profile(half, torch.optim.SGD(half.parameters(), lr=0.1))


def test_nothing_is_kept_of_the_graphs():
    """Memory does not grow: no graph of a gradient lives on, and no warning of a cycle is heard."""
    model = net()
    optimizer = RULES["SGD"](model)
    with warnings.catch_warnings(), Profile(model, optimizer, directions=1):
        warnings.simplefilter("error")
        train(model, optimizer, 3)
        assert all(p.grad.grad_fn is None for p in model.parameters())
