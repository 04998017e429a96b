"""Tangents of one update map: the steps are the same numbers as the optimizer's, the tangents their derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import stableopt as so
from stableopt.constraints import (
    L1,
    L2,
    PSD,
    Box,
    Constraint,
    DoublyStochastic,
    GroupLasso,
    Hyperplane,
    L1Ball,
    L2Ball,
    L2Squared,
    NonNegative,
    NuclearNorm,
    Orthogonal,
    Regularizer,
    Simplex,
    Sparsity,
    SpectralBall,
    Sphere,
    Stiefel,
)  # fmt: skip
from stableopt.lyapunov.profile.tangents.push import push, tangent_names
from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules import Adaptive, AdaptiveNesterov, HeavyBall, Rectified, RootMeanSquare, SpectralDescent
from stableopt.optim.rules.unknown import Unknown
from tests.constraints.catalogue import ROWS, name_of, random, shapes_of
from tests.constraints.rows import Row
from tests.lyapunov.profile.tangents.pushing import Run, check_run
from tests.optim.rules.laws import CATALOGUE

SMOOTH = [(cls, options) for cls, options in CATALOGUE if cls is not torch.optim.Muon]
SGD: tuple[type, dict[str, Any]] = (torch.optim.SGD, {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1})
ADAMW: tuple[type, dict[str, Any]] = (torch.optim.AdamW, {"eps": 1e-2, "weight_decay": 0.1})
RMSPROP: tuple[type, dict[str, Any]] = (torch.optim.RMSprop, {"eps": 1e-2, "momentum": 0.6})
RADAM: tuple[type, dict[str, Any]] = (torch.optim.RAdam, {"betas": (0.9, 0.6)})
PLAIN: tuple[type, dict[str, Any]] = (torch.optim.SGD, {})
PENALTIES: list[Regularizer] = [L1(0.3), L2Squared(0.7), L2(0.6), GroupLasso(0.2, None, dims=-1), NuclearNorm(0.4)]
SETS: list[Constraint] = [
    Box(-0.5, 0.8), NonNegative(), L2Ball(0.9), L2Ball(1.2, weights=(0.3, 4.0, 1.0, 0.5, 2.0, 1.7, 1.0, 1.0, 3.0)), Simplex(1.0),
    L1Ball(1.3), SpectralBall(0.9), Stiefel(), Orthogonal(), PSD(), Sphere(1.3), Sparsity(3), DoublyStochastic(),
]  # fmt: skip


def start_of(g: Regularizer | None, shape: tuple[int, ...] = (3, 3)) -> Tensor:
    """A point where a step may begin."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return g.project(w) if isinstance(g, Constraint) else w


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_tangents_of_a_run_are_the_differences_of_the_real_optimizer(case: tuple[type, dict[str, Any]]) -> None:
    check_run(case[0], {"lr": 0.05} | case[1], torch.randn(4, 3), steps=3)


@pytest.mark.parametrize("g", [None, L1(0.2), L2Ball(0.9)], ids=repr)
def test_radam_before_and_after_it_trusts_its_second_moment(g: Regularizer | None) -> None:
    """From the sixth step on."""
    check_run(torch.optim.RAdam, {"lr": 0.05, "betas": (0.9, 0.9)}, start_of(g), g, steps=8, k=1)


@pytest.mark.parametrize("g", [*PENALTIES, *SETS], ids=lambda g: repr(g)[:30])
@pytest.mark.parametrize("case", [SGD, ADAMW, RMSPROP, RADAM], ids=["SGD", "AdamW", "RMSprop", "RAdam"])
def test_prox_and_projection_are_part_of_the_map(case: tuple[type, dict[str, Any]], g: Regularizer) -> None:
    if isinstance(g, NuclearNorm) and case is not SGD:
        pytest.skip("no prox in a diagonal metric")
    check_run(case[0], {"lr": 0.05} | case[1], start_of(g), g, steps=2, k=1)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("case", [SGD, ADAMW, RMSPROP, PLAIN], ids=["SGD", "AdamW", "RMSprop", "plain"])
def test_every_regularizer_is_part_of_the_map(case: tuple[type, dict[str, Any]], row: Row) -> None:
    for shape in shapes_of(row)[:2]:
        w = random(row, shape, 1)
        inside = row.g.project(1.2 * w) if isinstance(row.g, Constraint) else w
        try:
            run = Run(case[0], {"lr": 0.05} | case[1], inside, row.g)
        except ValueError:  # the optimizer does not take it
            pytest.skip("no prox in a diagonal metric")
        assert run.regularizer is row.g
        check_run(case[0], {"lr": 0.05} | case[1], inside if inside.any() else w, row.g, k=1, h=1e-7)


class Unrounded(TorchFunctionMode):
    """Leave bfloat16 out of torch's Muon."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


MUONS: list[dict[str, Any]] = [{}, {"nesterov": False, "weight_decay": 0.5}, {"momentum": 0.0}, {"ns_steps": 2}]


@pytest.mark.parametrize("options", MUONS, ids=repr)
@pytest.mark.parametrize("shape", [(4, 3), (2, 5)])
def test_muon_of_torch_is_differentiated_without_its_rounding(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    with Unrounded():
        check_run(torch.optim.Muon, {"lr": 0.05} | options, torch.randn(shape))


def test_muon_of_torch_does_its_own_rounded_steps() -> None:
    run = Run(torch.optim.Muon, {"lr": 0.05}, torch.randn(4, 3, dtype=torch.float32))
    for _ in range(3):
        pushed = run.pushed(torch.randn(2, 4, 3, dtype=torch.float32), {})
        run.step()
        assert torch.equal(pushed.parameter, run.parameter.detach())
        assert pushed.d_parameter.dtype == torch.float32


@pytest.mark.parametrize("options", MUONS, ids=repr)
@pytest.mark.parametrize("g", [None, SpectralBall(0.9), Stiefel(), Box(-0.4, 0.4)], ids=repr)
def test_our_muon_with_and_without_a_set(options: dict[str, Any], g: Constraint | None) -> None:
    check_run(so.optim.Muon, {"lr": 0.05} | options, start_of(g, (4, 3)), g, steps=2)


@pytest.mark.parametrize(
    "case",
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.NAdam, {}),
     (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}), (torch.optim.RAdam, {"betas": (0.9, 0.6)}), (PlainLion, {})],
    ids=lambda case: case[0].__name__,
)  # fmt: skip
def test_parts_of_complex_parameters_are_parameters(case: tuple[type, dict[str, Any]]) -> None:
    check_run(case[0], {"lr": 0.05, "weight_decay": 0.1} | case[1], torch.randn(3, 2, dtype=torch.complex128), steps=2)


def test_a_complex_parameter_takes_a_penalty_in_sgd() -> None:
    check_run(*SGD[:1], {"lr": 0.05} | SGD[1], torch.randn(3, 2, dtype=torch.complex128), L2(0.3))


@pytest.mark.parametrize(
    "case", [SGD, ADAMW, RMSPROP, (torch.optim.NAdam, {}), (PlainLion, {})], ids=lambda c: c[0].__name__
)
@pytest.mark.parametrize("shape", [(), (1,), (2, 0, 3)])
def test_numbers_and_nothing_are_parameters(case: tuple[type, dict[str, Any]], shape: tuple[int, ...]) -> None:
    if 0 not in shape:
        return check_run(case[0], {"lr": 0.05} | case[1], torch.randn(shape), L1(0.1) if case in (SGD, ADAMW) else None)
    run = Run(case[0], {"lr": 0.05} | case[1], torch.randn(shape))
    assert run.pushed(torch.randn(2, *shape), {}).d_parameter.shape == (2, *shape)
    return None


def test_counts_of_a_single_number_carry_no_tangent() -> None:
    w = torch.ones(())
    state = Run(torch.optim.NAdam, {}, w).pushed(torch.ones(1), {}).state
    assert {"step", "mu_product"} < state.keys()
    assert tangent_names(AdaptiveNesterov(), state, w) == ("exp_avg", "exp_avg_sq")
    assert tangent_names(AdaptiveNesterov(), {}, w) == ()


def test_heavy_ball_by_hand() -> None:
    lr, beta, delta, omega = 0.1, 0.9, 0.3, 0.2
    group = {"lr": lr, "momentum": beta, "dampening": delta, "weight_decay": omega}
    w, g, b = torch.randn(3, 5)
    dw, dg, db = torch.randn(3, 2, 5)
    pushed = push(HeavyBall(), group, w, g, {"momentum_buffer": b}, dw, dg, {"momentum_buffer": db})
    after = beta * db + (1 - delta) * (dg + omega * dw)
    torch.testing.assert_close(pushed.d_state["momentum_buffer"], after, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(pushed.d_parameter, dw - lr * after, rtol=1e-14, atol=1e-15)
    shrunk = push(
        HeavyBall(), group, w, g, {"momentum_buffer": b}, dw, dg, {"momentum_buffer": db}, regularizer=L1(0.5)
    )
    kept = shrunk.parameter != 0
    assert 0 < int(kept.sum()) < 5 or kept.all()
    torch.testing.assert_close(shrunk.d_parameter, (dw - lr * after) * kept, rtol=1e-14, atol=1e-15)
    realised = -(shrunk.d_parameter - dw) / lr  # the buffer stands for minus the displacement over lr
    torch.testing.assert_close(shrunk.d_state["momentum_buffer"], realised, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("omega", [0.0, 0.4])
def test_adam_by_hand(omega: float) -> None:
    lr, b1, b2, eps, t = 0.1, 0.9, 0.99, 1e-3, 4.0
    group = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": omega, "decoupled_weight_decay": True}
    w, g, m = torch.randn(3, 5)
    v = torch.rand(5)
    dw, dg, dm, dv = torch.randn(4, 2, 5)
    state = {"step": torch.tensor(t), "exp_avg": m, "exp_avg_sq": v}
    pushed = push(Adaptive(), group, w, g, state, dw, dg, {"exp_avg": dm, "exp_avg_sq": dv})
    m1, v1 = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    dm1, dv1 = b1 * dm + (1 - b1) * dg, b2 * dv + 2 * (1 - b2) * g * dg
    mh, vh = m1 / (1 - b1 ** (t + 1)), v1 / (1 - b2 ** (t + 1))
    dmh, dvh = dm1 / (1 - b1 ** (t + 1)), dv1 / (1 - b2 ** (t + 1))
    P = vh.sqrt() + eps
    moved = (1 - lr * omega) * dw - lr * (dmh / P - mh * dvh / (2 * vh.sqrt() * P * P))
    torch.testing.assert_close(pushed.d_state["exp_avg"], dm1, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(pushed.d_state["exp_avg_sq"], dv1, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(pushed.d_parameter, moved, rtol=1e-12, atol=1e-14)


def log_determinant(cls: type, options: dict[str, Any], n: int = 6) -> float:
    """The logarithm of |det| of the derivative of one step of the state, in the middle of a run, for its own smooth gradient."""
    run = Run(cls, {"lr": 0.05} | options, torch.randn(n))
    for _ in range(3):
        run.step()
    names = tangent_names(run.rule, run.state, run.parameter)
    columns = torch.eye(n * (1 + len(names))).view(-1, 1 + len(names), n)
    pushed = run.pushed(columns[:, 0], {name: columns[:, 1 + i] for i, name in enumerate(names)})
    return float(torch.linalg.slogdet(torch.cat([pushed.d_parameter, *(pushed.d_state[n] for n in names)], dim=1))[1])


@pytest.mark.parametrize(
    ("cls", "options", "rate"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, math.log(0.9)),
        (torch.optim.SGD, {"momentum": 0.6, "nesterov": True, "weight_decay": 0.3}, None),
        (torch.optim.SGD, {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.2}, math.log(0.7)),
        (torch.optim.Adam, {"betas": (0.9, 0.99)}, math.log(0.9 * 0.99)),
        (torch.optim.Adam, {"betas": (0.8, 0.95), "weight_decay": 0.3}, math.log(0.8 * 0.95)),
        (torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.5}, math.log(0.9 * 0.99) + math.log1p(-0.05 * 0.5)),
        (torch.optim.RAdam, {"betas": (0.9, 0.6)}, math.log(0.9 * 0.6)),
    ],
)  # fmt: skip
def test_volumes_shrink_as_they_must_whatever_the_loss(cls: type, options: dict[str, Any], rate: float | None) -> None:
    """Sheared, the step is u -> beta u + what depends on the rest: the Hessian has no part in its determinant."""
    if rate is None:  # Nesterov's step is no shear: its determinant has the Hessian in it
        assert abs(log_determinant(cls, options) - 6 * math.log(0.6)) > 1e-3
    else:
        assert log_determinant(cls, options) == pytest.approx(6 * rate, abs=1e-12)


ADAPTIVE: list[tuple[Any, dict[str, Any]]] = [
    (Adaptive(), {}), (Adaptive(), {"amsgrad": True}), (AdaptiveNesterov(), {}), (Rectified(), {}),
    (RootMeanSquare(), {"alpha": 0.9}), (RootMeanSquare(), {"alpha": 0.9, "centered": True, "momentum": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "options"), ADAPTIVE, ids=repr)
def test_without_gradient_the_tangent_is_that_of_the_limit(
    rule: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where g = m = v = 0 the direction is odd, m / (c |h| + eps): its derivative is that of m / eps, and no NaN."""
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0} | options
    w, g, one = torch.ones(2), torch.tensor([0.0, 0.7]), torch.ones(1, 2)
    pushed = push(rule, group, w, g, {}, 0 * one, one, {})
    for h in (1e-6, 1e-8):
        ahead, behind = (rule.update(w, g + s * h, {}, group) for s in (1, -1))
        measured = (ahead[0] - behind[0]) / (2 * h)
        torch.testing.assert_close(pushed.d_parameter[0], measured, rtol=3e3 * h + 1e-6, atol=1e-16 / h)
    assert all(d.isfinite().all() for d in pushed.d_state.values())
    monkeypatch.setattr("stableopt.lyapunov.profile.tangents.push.written", lambda *_: None)
    forward = push(rule, group, w, g, {}, 0 * one, one, {})
    torch.testing.assert_close(forward.d_parameter, pushed.d_parameter, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forward.d_state, pushed.d_state, rtol=1e-12, atol=1e-12)


def test_adam_without_gradient_by_hand() -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    w, g, one = torch.ones(1), torch.zeros(1), torch.ones(1, 1)
    pushed = push(Adaptive(), group, w, g, {}, 0 * one, one, {})
    torch.testing.assert_close(pushed.d_parameter, torch.full((1, 1), -0.1 / 1e-8), rtol=1e-14, atol=0)
    assert torch.equal(pushed.d_state["exp_avg_sq"], torch.zeros(1, 1))


def test_muon_without_gradient_is_linear() -> None:
    """Below eps a matrix is only scaled: (3.4445^5 / eps) dX for torch's polynomial."""
    for rule, gain in ((SpectralDescent(polar=False), 3.4445**5), (SpectralDescent(), None)):
        group = {
            "lr": 1.0,
            "momentum": 0.0,
            "eps": 1e-7,
            "nesterov": False,
            "ns_coefficients": (3.4445, -4.775, 2.0315),
        }
        w, d = torch.zeros(2, 3), 100 * torch.randn(1, 2, 3)
        pushed = push(rule, group, w, w, {}, 0 * d, d, {})
        if gain is None:
            h = 1e-20
            gain = -float((rule.update(w, h * d[0], {}, group)[0] / h / d[0]).mean()) * 1e-7
        torch.testing.assert_close(pushed.d_parameter, -gain / 1e-7 * d, rtol=1e-9, atol=0.0)


def test_where_two_moments_of_amsgrad_tie_each_has_half() -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.5), "eps": 1e-3, "weight_decay": 0.0, "amsgrad": True}
    w, g, one = torch.ones(1), torch.full((1,), 2.0), torch.ones(1, 1)
    old = {
        "step": torch.tensor(1.0),
        "exp_avg": g,
        "exp_avg_sq": torch.full((1,), 4.0),
        "max_exp_avg_sq": torch.full((1,), 4.0),
    }
    sides = [
        push(
            Adaptive(),
            group,
            w,
            g,
            old | {"max_exp_avg_sq": torch.full((1,), x)},
            0 * one,
            one,
            {"max_exp_avg_sq": 7 * one},
        )
        for x in (3.9, 4.0, 4.1)
    ]
    low, tie, high = (float(s.d_state["max_exp_avg_sq"]) for s in sides)
    assert (low, tie, high) == pytest.approx((2.0, 4.5, 7.0))


def test_the_sign_of_lion_has_no_derivative_on_either_side() -> None:
    run = Run(PlainLion, {"lr": 0.1, "weight_decay": 0.5}, torch.tensor([1.0, 0.0, -1.0]))
    d = torch.randn(2, 3)
    torch.testing.assert_close(run.pushed(d, {}).d_parameter, 0.95 * d)


HYPER: list[tuple[type, dict[str, Any], Any, str]] = [
    (*SGD, None, "lr"), (*SGD, None, "momentum"), (*SGD, None, "dampening"), (*SGD, None, "weight_decay"),
    (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}, None, "momentum"), (*SGD, L1(0.3), "lr"), (*SGD, L2(0.3), "lr"),
    (*SGD, L1(0.3), "dampening"), (*PLAIN, NuclearNorm(0.4), "lr"), (*SGD, SpectralBall(0.5), "lr"), (*ADAMW, None, "lr"),
    (*ADAMW, None, "betas"), (*ADAMW, None, "eps"), (*ADAMW, None, "weight_decay"), (*ADAMW, L1(0.3), "lr"),
    (*ADAMW, L1(0.3), "betas"), (*ADAMW, L2(0.2), "eps"), (*ADAMW, L2Ball(0.9), "lr"), (*RMSPROP, L1(0.2), "lr"),
    (*RMSPROP, None, "alpha"), (*RMSPROP, None, "momentum"), (torch.optim.RAdam, {"betas": (0.9, 0.6)}, None, "betas"),
    (torch.optim.RAdam, {"betas": (0.9, 0.9)}, None, "betas"), (torch.optim.NAdam, {}, None, "lr"),
    (torch.optim.NAdam, {"weight_decay": 0.1}, None, "weight_decay"), (PlainLion, {}, None, "lr"), (PlainLion, {}, None, "betas"),
    (so.optim.Muon, {}, None, "lr"), (so.optim.Muon, {}, None, "momentum"), (so.optim.Muon, {}, Stiefel(), "weight_decay"),
]  # fmt: skip


def _with(group: dict[str, Any], name: str, change: Any) -> dict[str, Any]:
    old = group[name]
    return {name: tuple(x + c for x, c in zip(old, change, strict=True)) if name == "betas" else old + float(change)}


@pytest.mark.parametrize("case", HYPER, ids=lambda c: f"{c[0].__name__} {c[3]} {c[2]!r}"[:40])
def test_hyper_parameters_have_tangents(case: tuple[type, dict[str, Any], Regularizer | None, str]) -> None:
    cls, options, g, name = case
    w, h = start_of(g, (4, 3)), 1e-6
    runs = [Run(cls, {"lr": 0.05} | options, w, g) for _ in range(3)]
    for run in runs:
        for _ in range(8 if cls is torch.optim.RAdam else 2):
            run.step()
    change = torch.tensor([[0.3, -0.01], [0.5, 0.02]]) if name == "betas" else torch.tensor([0.3, -2.0])
    none = torch.zeros(2, *w.shape)
    pushed = runs[0].pushed(none, {}, d_hyper={name: change})
    saved = {name: v.clone() if isinstance(v, Tensor) else v for name, v in runs[0].state.items()}
    at, group = runs[0].parameter.detach().clone(), dict(runs[0].group)
    for row, c in enumerate(change):
        ends = []
        for sign, run in zip((1, -1), runs[1:], strict=True):
            run.parameter.data.copy_(at)
            run.optimizer.state[run.parameter].update({n: v.clone() for n, v in saved.items()})
            run.group.update(_with(group, name, sign * h * c))
            run.step()
            ends.append(run.carried())
        for key, value in ends[0].items():
            measured = (value - ends[1][key]) / (2 * h)
            mine = pushed.d_parameter if key == "parameter" else pushed.d_state[key]
            torch.testing.assert_close(mine[row], measured, rtol=1e-6, atol=1e-7 * (1.0 + float(measured.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [SGD, ADAMW, RMSPROP], ids=["SGD", "AdamW", "RMSprop"])
def test_a_learning_rate_may_be_a_tensor_and_float32_stays(
    case: tuple[type, dict[str, Any]], dtype: torch.dtype
) -> None:
    lr = torch.tensor(0.05) if case is ADAMW else 0.05
    run = Run(case[0], {"lr": lr} | case[1], torch.randn(4, dtype=dtype))
    d = torch.randn(2, 4, dtype=dtype)
    pushed = run.pushed(d, {}, d_hyper={"lr": torch.ones(2)})
    number = Run(case[0], {"lr": 0.05} | case[1], run.parameter.detach()).pushed(d, {}, d_hyper={"lr": torch.ones(2)})
    assert pushed.d_parameter.dtype == dtype
    assert all(x.dtype == dtype for x in pushed.d_state.values())
    torch.testing.assert_close(pushed.d_parameter, number.d_parameter, rtol=1e-6, atol=1e-6)


def test_rows_do_not_see_each_other_and_none_is_no_special_case() -> None:
    run = Run(*ADAMW[:1], {"lr": 0.05} | ADAMW[1], torch.randn(3, 3), L2Ball(0.9))
    run.step()
    d, d_state = torch.randn(4, 3, 3), {"exp_avg": torch.randn(4, 3, 3)}
    lr = {"lr": torch.randn(4)}
    whole = run.pushed(d, d_state, d_hyper=lr)
    for i in range(4):
        one = run.pushed(d[i : i + 1], {"exp_avg": d_state["exp_avg"][i : i + 1]}, d_hyper={"lr": lr["lr"][i : i + 1]})
        torch.testing.assert_close(one.d_parameter[0], whole.d_parameter[i], rtol=1e-14, atol=1e-15)
        for name, x in one.d_state.items():
            torch.testing.assert_close(x[0], whole.d_state[name][i], rtol=1e-13, atol=1e-14)
    none = run.pushed(d[:0], {"exp_avg": d[:0]}, d_hyper={"lr": lr["lr"][:0]})
    assert none.d_parameter.shape == (0, 3, 3)
    assert {n: x.shape for n, x in none.d_state.items()} == {"exp_avg": (0, 3, 3), "exp_avg_sq": (0, 3, 3)}
    torch.testing.assert_close(none.parameter, whole.parameter, rtol=0, atol=0)


def test_nothing_is_changed_in_place() -> None:
    for case, g in ((SGD, L1(0.3)), (ADAMW, L2Ball(0.9)), (RMSPROP, Box(-0.1, 0.1))):
        run = Run(case[0], {"lr": 0.05} | case[1], start_of(g), g)
        run.step()
        w, state, gradient = run.parameter.detach().clone(), run.state, run.gradient(run.parameter.detach())
        kept, d = {n: v.clone() for n, v in state.items()}, torch.randn(1, 3, 3)
        group = dict(run.group)
        pushed = push(run.rule, group, w, gradient, state, d, d, {}, regularizer=g)
        assert all(torch.equal(kept[n], v) for n, v in state.items())
        assert torch.equal(w, run.parameter)
        assert not torch.equal(pushed.parameter, w)
        assert not any(t.requires_grad for t in (pushed.parameter, pushed.d_parameter, *pushed.d_state.values()))


@pytest.mark.parametrize(
    "g", [Sphere(1.3), Hyperplane((1.0, -2.0, 0.5), 0.3), Sparsity(1), Stiefel(), Box(0.5, 0.5)], ids=repr
)
def test_a_step_that_stays_in_a_set_without_interior_keeps_tangents_in_its_tangent_space(g: Constraint) -> None:
    """With a learning rate of 0, as warmups begin, y is in the set, where autograd takes the identity."""
    shape = (3, 2) if isinstance(g, Stiefel) else (3,)
    w = start_of(g, shape)
    w = g.project(w)
    d, h = torch.randn(2, *shape), 1e-6
    pushed = push(HeavyBall(), {"lr": 0.0, "momentum": 0.9}, w, torch.zeros_like(w), {}, d, 0 * d, {}, regularizer=g)
    assert torch.equal(pushed.parameter, w)
    measured = torch.stack([(g.project(w + h * x) - g.project(w - h * x)) / (2 * h) for x in d])
    torch.testing.assert_close(pushed.d_parameter, measured, rtol=1e-6, atol=1e-8)
    assert float((pushed.d_parameter - d).abs().max()) > 0.01


@pytest.mark.parametrize("g", [L2Ball(5.0), Box(-9.0, 9.0), SpectralBall(9.0), L1Ball(50.0)], ids=repr)
def test_a_set_that_is_not_reached_has_no_part(g: Constraint) -> None:
    run, free = (Run(*SGD[:1], {"lr": 0.05} | SGD[1], start_of(g), c) for c in (g, None))
    d = torch.randn(2, 3, 3)
    assert torch.equal(run.pushed(d, {}).d_parameter, free.pushed(d, {}).d_parameter)


@dataclass(frozen=True)
class _Detached(Constraint):
    """A set whose projection hides from autograd."""

    def project(self, x: Tensor) -> Tensor:
        return x.detach().clamp(-0.5, 0.5)

    def violation(self, x: Tensor) -> float:
        return max(0.0, float(x.abs().max()) - 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": None}, "register one with stableopt.optim.rule_for.register"),
        ({"rule": Unknown()}, "of which no update is known"),
        ({"d_parameter": torch.ones(2, 4, dtype=torch.float64)}, r"d_parameter of shape \(2, 3\)"),
        ({"d_gradient": torch.ones(1, 3, dtype=torch.float64)}, r"d_gradient of shape \(2, 3\)"),
        ({"d_parameter": torch.ones(2, 3, dtype=torch.float32)}, "torch.float32"),
        ({"gradient": torch.ones(4)}, "a gradient of the shape"),
        ({"d_state": {"exp_avg": torch.ones(2, 3, dtype=torch.float64)}}, r"got 'exp_avg'; before the first step there are none"),
        ({"d_hyper": {"nesterov": torch.ones(2)}}, "got 'nesterov'"),
        ({"d_hyper": {"betas": torch.ones(2, 2)}}, "got 'betas'"),
        ({"d_hyper": {"lr": torch.ones(3)}}, r"d_hyper\['lr'\] of shape \(2,\)"),
        ({"regularizer": _Detached(), "parameter": 0.2 * torch.ones(3, dtype=torch.float64)}, "comes back detached"),
        ({"rule": Adaptive(), "regularizer": NuclearNorm(0.3)}, "no exact prox in the metric"),
        ({"group": {"lr": 0.0}, "regularizer": L1(0.3), "d_hyper": {"lr": torch.ones(2)}}, "a step of 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "rule": HeavyBall(), "group": {"lr": 0.1, "nesterov": False}, "parameter": 2 * torch.ones(3), "gradient": torch.ones(3),
        "state": {}, "d_parameter": torch.ones(2, 3), "d_gradient": torch.ones(2, 3), "d_state": {},
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        push(**given)


def test_a_rule_that_reads_a_hyper_parameter_as_a_float_is_refused() -> None:
    class Blunt(HeavyBall):
        def update(self, parameter: Tensor, gradient: Tensor, state: Any, group: Any) -> Any:
            return parameter - float(group["lr"]) * gradient, dict(state)

    w, d = torch.ones(3), torch.ones(1, 3)
    assert torch.equal(push(Blunt(), {"lr": 0.1}, w, w, {}, d, 0 * d, {}).d_parameter, d)
    with pytest.raises(ValueError, match="reads as a float"):
        push(Blunt(), {"lr": 0.1}, w, w, {}, d, 0 * d, {}, d_hyper={"lr": torch.ones(1)})


def test_expanded_gradients_are_plain_ones() -> None:
    """As torch.autograd.grad gives them for a sum."""
    d, w = torch.randn(2, 3, 2), torch.randn(3, 2)
    for rule, group in ((HeavyBall(), {"lr": 0.1}), (SpectralDescent(), {"lr": 0.1, "momentum": 0.9})):
        expanded, plain = (
            push(rule, group, w, g, {}, d, d, {}) for g in (torch.ones(1, 1).expand(3, 2), torch.ones(3, 2))
        )
        assert torch.equal(expanded.d_parameter, plain.d_parameter)


def test_sparse_gradients_are_dense_ones() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 3])).square().sum().backward()
    w, g = embedding.weight, embedding.weight.grad
    assert g is not None
    d = torch.randn(2, 4, 2)
    group = {"lr": 0.1, "momentum": 0.9}
    sparse, dense = (push(HeavyBall(), group, w, x, {}, d, d, {}) for x in (g, g.to_dense()))
    assert torch.equal(sparse.parameter, dense.parameter)
    assert torch.equal(sparse.d_parameter, dense.d_parameter)


@pytest.mark.parametrize("g", [None, Box(-0.3, 0.3)], ids=repr)
@pytest.mark.parametrize("case", [SGD, ADAMW, RMSPROP, (so.optim.Muon, {})], ids=lambda case: case[0].__name__)
def test_float32_is_float64_up_to_rounding(case: tuple[type, dict[str, Any]], g: Regularizer | None) -> None:
    w, d = start_of(g, (4, 3)), torch.randn(2, 4, 3)
    wide, narrow = (Run(case[0], {"lr": 0.05} | case[1], w.to(dtype), g) for dtype in (torch.float64, torch.float32))
    narrow.H = wide.H.float()
    for _ in range(3):
        x, y = wide.pushed(d, {}), narrow.pushed(d.float(), {})
        assert y.d_parameter.dtype == torch.float32
        torch.testing.assert_close(y.d_parameter.double(), x.d_parameter, rtol=1e-3, atol=1e-4)
        for name, rows in x.d_state.items():
            torch.testing.assert_close(
                y.d_state[name].double(), rows, rtol=1e-3, atol=1e-4 * float(1 + rows.abs().max())
            )
        wide.step()
        narrow.step()
