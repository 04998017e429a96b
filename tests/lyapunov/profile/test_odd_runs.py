"""Trainings that are not the plain loop: the right number, or an end that says why; and never another training."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stableopt as so
from stableopt.lyapunov.profile.finite.twin import Twin
from stableopt.lyapunov.profile.training import Profile


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, generator=generator), torch.randint(0, 2, (16,), generator=generator)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def train(model, optimizer, steps, *, loss=None, after=None):
    x, y = batch()
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y) if loss is None else loss(model, x, y)
            value.backward()
            if after is not None:
                after(model)
            return value

        optimizer.step(closure)


def tangent_and_difference(make, steps=6, *, model=net, loss=None, after=None, **options):
    """Return the perturbation that a profile has pushed through a training, and what two trainings say."""
    base = model()
    start = copy.deepcopy(base)
    optimizer = make(base)
    profile = Profile(base, optimizer, directions=1, cadence=1000, **options).attach()
    profile._follows()
    found = {id(p): c for p, c in zip(profile._system.parameters, profile._system.columns, strict=True)}
    along = [found[id(p)][""][0].clone() for p in base.parameters()]
    train(base, optimizer, steps, loss=loss, after=after)
    found = {id(p): c for p, c in zip(profile._system.parameters, profile._system.columns, strict=True)}
    pushed = torch.cat([found[id(p)][""][0].flatten() for p in base.parameters()])
    profile.close()
    ends = []
    for h in (1e-6, -1e-6):
        twin = copy.deepcopy(start)
        with torch.no_grad():
            for p, d in zip(twin.parameters(), along, strict=True):
                p.add_(d, alpha=h)
        train(twin, make(twin), steps, loss=loss, after=after)
        ends.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    return pushed, (ends[0] - ends[1]) / 2e-6, profile


def assert_right(pushed, difference, rtol=2e-6):
    assert torch.linalg.vector_norm(pushed - difference) <= rtol * torch.linalg.vector_norm(difference) + 1e-8


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


@pytest.mark.parametrize("method", ["auto", "exact", "forward"])
def test_clipping_that_was_stated_is_right_whatever_the_method(method):
    pushed, difference, profile = tangent_and_difference(sgd, after=clip, method=method, clip_norm=0.05)
    assert profile.reason == ""
    assert_right(pushed, difference)


@pytest.mark.parametrize("method", ["auto", "exact", "forward", "difference"])
@pytest.mark.parametrize("what", ["clip", "scale", "decay"])
def test_a_gradient_that_was_changed_ends_the_profile_whatever_the_method(method, what):
    def after(model):
        for p in model.parameters():
            if what == "scale":
                p.grad /= 4
            elif what == "decay":
                p.grad += 0.1 * p.detach()
        if what == "clip":
            clip(model)

    model = net()
    optimizer = sgd(model)
    said = "step 0: the gradients that the optimizer found"
    with pytest.warns(UserWarning, match=said), Profile(model, optimizer, directions=1, method=method):
        train(model, optimizer, 3, after=after)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def test_a_function_whose_backward_is_no_derivative():
    def loss(model, x, y):
        return F.cross_entropy(model[2](Reversed.apply(model[1](model[0](x)))), y)

    pushed, difference, profile = tangent_and_difference(sgd, loss=loss)
    assert "Reversed has a backward of its own" in profile._tap.reason
    assert profile._backend == "difference"
    assert_right(pushed, difference, rtol=1e-5)


@pytest.mark.parametrize("kind", ["parameter", "module"])
def test_backward_hooks_that_change_gradients(kind):
    def model():
        made = net()
        if kind == "parameter":
            made[0].weight.register_hook(lambda g: 0.25 * g)
        else:
            made[1].register_full_backward_hook(lambda _m, gi, _go: tuple(0.5 * g for g in gi))
        return made

    torch.manual_seed(0)
    base = model()
    optimizer = sgd(base)
    with Profile(base, optimizer, directions=2) as profile:
        train(base, optimizer, 4)
    assert profile.reason == ""
    assert profile.result().backend == "difference"
    assert "hooks" in profile.result().reason


def test_a_module_hook_is_seen_where_there_is_no_closure_and_where_it_comes_later():
    def hook(_module, gradients, _outputs):
        return tuple(0.5 * g for g in gradients)

    model, (x, y) = net(), batch()
    model[1].register_full_backward_hook(hook)
    optimizer = sgd(model)
    with (
        Profile(model, optimizer, directions=1) as profile,
        pytest.warns(UserWarning, match="there are backward hooks"),
    ):
        profile.backward(F.cross_entropy(model(x), y))
    model = net()
    optimizer = sgd(model)
    with Profile(model, optimizer, directions=1) as profile:
        train(model, optimizer, 2)
        model[1].register_full_backward_hook(hook)
        train(model, optimizer, 2)
    assert profile.result().backend == "difference"


def test_hooks_are_called_as_often_as_without_a_profile():
    counts = []
    for watched in (False, True):
        model, calls = net(), []
        model[0].weight.register_post_accumulate_grad_hook(lambda _p, calls=calls: calls.append(1))
        optimizer = sgd(model)
        if watched:
            with Profile(model, optimizer, directions=3):
                train(model, optimizer, 4)
        else:
            train(model, optimizer, 4)
        counts.append(len(calls))
    assert counts == [4, 4]


def test_weight_norm_whose_second_derivative_is_wrong_is_not_used_silently():
    def model():
        made = net()
        nn.utils.parametrizations.weight_norm(made[0])
        return made

    pushed, difference, profile = tangent_and_difference(sgd, model=model)
    assert profile._backend != "graph"
    assert "not symmetric" in profile._tap.reason
    assert_right(pushed, difference, rtol=1e-5)


def run_of_a_head(watched):
    model = net()
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)
    x, y = batch()
    x.requires_grad_()
    profile = Profile(model, head, directions=2)
    if watched:
        profile.attach()

    def closure():
        head.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    for _ in range(3):
        head.step(closure)
    if watched:
        profile.close()
    return [x.grad, model[0].weight.grad, *model.parameters()]


def test_leaves_outside_of_the_optimizer_are_left_alone():
    plain, watched = run_of_a_head(False), run_of_a_head(True)
    assert not any(x.requires_grad for x in watched[:2])
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.parametrize("kind", ["lstm", "orthogonal", "weight_norm"])
def test_the_run_is_the_same_in_float32_where_other_formulas_would_round_otherwise(kind):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.LSTM(3, 4, batch_first=True).float() if kind == "lstm" else net().float()
        if kind != "lstm":
            getattr(nn.utils.parametrizations, kind)(model[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x = torch.randn(4, 6, 3, dtype=torch.float32) if kind == "lstm" else batch()[0].float()

        def loss(m, _x, _y, x=x, kind=kind):
            return (m(x)[0] if kind == "lstm" else m(x)).square().sum()

        if watched:
            with Profile(model, optimizer, directions=2):
                train(model, optimizer, 5, loss=loss)
        else:
            train(model, optimizer, 5, loss=loss)
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_cannot_be_followed_is_refused_in_words():
    model = net()
    lazy = so.optim.SGD(model.parameters(), lr=0.1, guard="lazy")
    with pytest.raises(ValueError, match="lazy guard"):
        Profile(model, lazy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="window"):
        Profile(model, optimizer, window=(2, 4), errors=3)
    with pytest.raises(ValueError, match="other than zero"):
        Profile(model, optimizer, hyper=("momentum",))
    with pytest.raises(ValueError, match="other than zero"):
        Profile(model, torch.optim.Adam(model.parameters()), hyper=("betas",))


def test_the_effect_of_the_rate_under_a_guard_that_takes_a_share_of_it():
    def make(model, lr=5.0):
        return so.optim.SGD(model.parameters(), lr=lr, momentum=0.5)

    model = net()
    optimizer = make(model)
    with Profile(model, optimizer, directions=1, hyper=("lr",)) as profile:
        train(model, optimizer, 6)
    shares = [optimizer.last_step.scale]
    assert min(shares) < 1.0
    ends = []
    for h in (1e-6, -1e-6):
        twin = net()
        train(twin, make(twin, 5.0 + h), 6)
        ends.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    expected = math.log(float(torch.linalg.vector_norm(ends[0] - ends[1])) / 2e-6)
    assert profile.result().hyper[0].log_norms[-1] == pytest.approx(expected, abs=1e-5)


def test_a_result_between_backward_and_step_changes_nothing():
    found = []
    for asked in (False, True):
        model = net()
        optimizer = sgd(model)
        x, y = batch()
        with Profile(model, optimizer, directions=3, cadence=4) as profile:
            for _ in range(8):
                optimizer.zero_grad()
                profile.backward(F.cross_entropy(model(x), y))
                if asked:
                    profile.result()
                optimizer.step()
        found.append(profile.result().factors.log_diagonal.sum(0))
    assert found[0].tolist() == pytest.approx(found[1].tolist(), abs=1e-12)


def test_a_batch_that_was_skipped_is_forgotten():
    found = []
    for skipped in (False, True):
        model = net()
        optimizer = sgd(model)
        x, y = batch()
        with Profile(model, optimizer, directions=2, cadence=1) as profile:
            for i in range(6):
                optimizer.zero_grad()
                profile.backward(F.cross_entropy(model(x), y))
                if skipped and i == 2:
                    continue
                optimizer.step()
        assert profile.reason == ""
        found.append(profile.result().factors.R[:5])
    assert (found[0] == found[1]).all()


def sines(case, profile_of):
    w = nn.Parameter(torch.tensor([0.3, 1.0]))
    optimizer = torch.optim.SGD([w], lr=1e6 if case == "overflow" else 0.1)
    profile = profile_of(w, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = w.sum() if case == "constant" else w.sin().sum()
        if case == "no backward":
            (w.grad,) = torch.autograd.grad(loss, [w])
        elif case == "constant" and profile is not None:
            profile.backward(loss)
        else:
            loss.backward()
        return loss

    for _ in range(60):
        if case == "constant":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    if profile is not None:
        profile.close()
    return w.detach().clone()


@pytest.mark.parametrize("case", ["overflow", "no backward", "constant"])
def test_the_training_goes_on_where_the_profile_cannot(case):
    plain = sines(case, lambda *_: None)
    with pytest.warns(UserWarning, match="the profile ended early"):
        watched = sines(
            case,
            lambda w, o: Profile(
                nn.ParameterList([w]), o, directions=1, cadence=200 if case == "overflow" else 1
            ).attach(),
        )
    assert torch.equal(plain, watched)


def test_sparse_gradients_and_parameters_that_are_not_used():
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(5, 3, sparse=True), "unused": nn.Linear(2, 2), "out": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with Profile(model, optimizer, directions=2) as profile:
        for _ in range(3):

            def closure():
                optimizer.zero_grad(set_to_none=False)
                loss = model["out"](model["e"](torch.tensor([0, 2]))).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert profile.reason == ""
    assert profile.result().factors.count == 3


def test_all_directions_with_groups_of_which_some_keep_no_state():
    model = net()
    groups = [{"params": list(model[0].parameters()), "momentum": 0.9}, {"params": list(model[2].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with Profile(model, optimizer, directions="all", cadence=1) as profile:
        train(model, optimizer, 4)
    reading = profile.result()
    assert reading.factors.full
    assert reading.factors.dimension == 2 * 16 + 10
    assert reading.factors.steps.tolist() == [1, 2, 3, 4]


def test_a_finite_size_counts_from_where_the_profile_begins():
    model = net()
    optimizer = sgd(model)
    with Profile(model, optimizer, directions=1, start=10, finite_size=1e-5) as profile:
        train(model, optimizer, 50)
    assert profile.result().finite_size.exponent.count + profile.result().finite_size.exponent.burn_in == 40


@pytest.mark.parametrize("what", ["scale", "group"])
def test_a_twin_stops_where_somebody_changes_the_run(what):
    model = net()
    optimizer = torch.optim.SGD(list(model.parameters())[:3], lr=0.1)
    with Twin(model, optimizer, 1e-5, renormalize=(1, 1)) as twin:
        train(model, optimizer, 3)
        if what == "scale":
            model[0].weight.data.mul_(0.9)
        else:
            optimizer.add_param_group({"params": [model[2].bias]})
        train(model, optimizer, 3)
    assert twin.steps == 3
    assert "before step 3" in twin.stopped


def test_several_processes_are_refused(monkeypatch):
    model = net()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    Profile(model, sgd(model))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="one process"):
        Profile(model, sgd(model))
