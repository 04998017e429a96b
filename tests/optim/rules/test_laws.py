"""Every rule is the update map of its optimizer; what it says about energy, displacement and lack of keys holds for all alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from stableopt.constraints import L1, Box, NuclearNorm, SpectralBall
from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules import rule_for
from tests.optim.rules.laws import CATALOGUE, group_of

ONE_EACH = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.AdamW, {"weight_decay": 0.3}),
    (torch.optim.Adam, {"weight_decay": 0.3}),
    (torch.optim.RAdam, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    (torch.optim.RAdam, {"betas": (0.9, 0.6)}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("cls", "options"), CATALOGUE)
def test_the_pure_update_is_the_step_of_torch(
    cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    if cls is torch.optim.Muon and dtype.is_complex:
        pytest.skip("Muon takes no complex parameters")
    w = nn.Parameter(torch.randn(4, 3, dtype=dtype))
    optimizer = cls([w], lr=0.05, **options)
    rule, group = rule_for(optimizer), optimizer.param_groups[0]
    assert rule is not None
    value, state = w.detach().clone(), {}
    for step in range(25):
        gradient = torch.randn(4, 3, dtype=dtype) * (0.1 if step % 5 else 3.0)
        kept, old = value.clone(), {k: v.clone() for k, v in state.items()}
        new_value, new_state = rule.update(value, gradient, state, group)
        assert torch.equal(value, kept)  # pure
        assert all(torch.equal(state[k], old[k]) for k in old)
        value, state = new_value, new_state
        w.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(value, w.detach(), rtol=1e-11, atol=1e-13)
    kept = {k: v for k, v in optimizer.state[w].items() if v is not None}
    assert kept.keys() - {"step"} == state.keys() - {"step"}
    for name, tensor in kept.items():
        if name in state:
            torch.testing.assert_close(state[name], tensor, rtol=1e-11, atol=1e-13, check_dtype=False)


@pytest.mark.parametrize(("cls", "keys"), [
    (torch.optim.SGD, {"lr": 0.1}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}),
    (torch.optim.RAdam, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}),
    (torch.optim.NAdam, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}),
    (torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.9, "eps": 1e-8}),
    (PlainLion, {"lr": 0.1, "betas": (0.9, 0.99)}),
])  # fmt: skip
def test_a_key_that_a_group_lacks_has_torchs_default(cls: type[Optimizer], keys: dict[str, Any]) -> None:
    rule, full = rule_for(cls([nn.Parameter(torch.ones(1))])), group_of(cls, **keys)
    gradient = torch.randn(3)
    results = []
    for group in (keys, full):
        value, state = torch.ones(3), {}
        for _ in range(3):
            value, state = rule.update(value, gradient, state, group)
        results.append(value)
        metric, buffer = rule.metric(state, group), rule.buffer(state)
        results.append(rule.energy(value, buffer, metric, group, first=False))
        results.append(torch.tensor(rule.effective_lr(group, first=False)))
        if cls is not PlainLion:
            results.append(torch.tensor(rule.limit(group)))
        assert rule.takes(group, Box(0.0, 1.0)) == rule.takes(full, Box(0.0, 1.0))
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))


@pytest.mark.parametrize(("cls", "options"), ONE_EACH)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_buffer_stands_for_the_displacement_and_after_realign_for_the_realised_one(
    cls: type[Optimizer], options: dict[str, Any], steps: int
) -> None:
    """For the P of the step the buffer is the step just taken; RMSprop's, of whatever P."""
    rule, group = rule_for(cls([nn.Parameter(torch.ones(1))])), group_of(cls, lr=0.1, **options)
    value, state = torch.randn(5), {}
    gradient = torch.randn(5)  # fixed: P settles and the previous displacement is known below
    for _ in range(steps):
        start = value
        value, state = rule.update(value, gradient, state, group)
    metric = rule.metric(state, group)
    displacement = rule.displacement(value, rule.buffer(state), metric, group)
    torch.testing.assert_close(displacement, value - start, rtol=1e-9, atol=1e-12)
    moved = Box(-0.3, 0.3).project(value)
    rule.realign(value - moved, state, metric, group)
    displacement = rule.displacement(moved, rule.buffer(state), metric, group)
    torch.testing.assert_close(displacement, moved - start, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("cls", "options"), ONE_EACH)
def test_a_complex_parameter_has_the_energy_of_its_two_parts(cls: type[Optimizer], options: dict[str, Any]) -> None:
    rule, group = rule_for(cls([nn.Parameter(torch.ones(1))])), group_of(cls, lr=0.1, **options)
    value, state = torch.randn(2, 2, dtype=torch.complex128), {}
    twin, twins = torch.view_as_real(value).clone(), {}
    for _ in range(3):
        gradient = torch.randn(2, 2, dtype=torch.complex128)
        value, state = rule.update(value, gradient, state, group)
        twin, twins = rule.update(twin, torch.view_as_real(gradient), twins, group)
    torch.testing.assert_close(torch.view_as_real(value), twin)
    energies = [
        rule.energy(v, rule.buffer(s), rule.metric(s, group), group, first=False)
        for v, s in ((value, state), (twin, twins))
    ]
    assert energies[0] > 0
    torch.testing.assert_close(*energies, rtol=1e-12, atol=0.0)
    correction = torch.randn(2, 2, dtype=torch.complex128)
    for s, c in ((state, correction), (twins, torch.view_as_real(correction))):
        rule.realign(c, s, rule.metric(s, group), group)
    torch.testing.assert_close(torch.view_as_real(rule.buffer(state)), rule.buffer(twins))


@pytest.mark.parametrize(("cls", "options", "takes"), [
    (torch.optim.SGD, {"momentum": 0.9}, "LBNS"),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, ""),
    (torch.optim.AdamW, {}, "LBS"),
    (torch.optim.Adam, {}, "LBS"),
    (torch.optim.RAdam, {}, "LBS"),
    (torch.optim.RMSprop, {}, "LBS"),
    (torch.optim.NAdam, {}, ""),
    (PlainLion, {}, "BS"),
    (torch.optim.Muon, {}, "BS"),
])  # fmt: skip
def test_what_does_not_fit_an_update_is_refused_with_one_sentence(
    cls: type[Optimizer], options: dict[str, Any], takes: str
) -> None:
    rule, group = rule_for(cls([nn.Parameter(torch.ones(1, 1))])), group_of(cls, **options)
    for letter, regularizer in {
        "L": L1(0.1),
        "B": Box(0.0, 1.0),
        "N": NuclearNorm(0.1),
        "S": SpectralBall(1.0),
    }.items():
        answer = rule.takes(group, regularizer)
        if letter in takes:
            assert answer is None
        else:
            assert answer is not None
            assert answer.endswith(".")
            assert "use " in answer


def test_an_adaptive_metric_takes_nothing_for_complex_parameters() -> None:
    for cls in (torch.optim.AdamW, torch.optim.RAdam, torch.optim.RMSprop):
        optimizer = cls([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
        assert "complex" in rule_for(optimizer).takes(optimizer.param_groups[0], SpectralBall(1.0))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    assert rule_for(optimizer).takes(optimizer.param_groups[0], SpectralBall(1.0)) is None


@pytest.mark.parametrize("cls", [torch.optim.NAdam, PlainLion, torch.optim.Muon])
def test_where_nothing_is_proved_there_is_no_energy_limit(cls: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match="no dissipating energy"):
        rule_for(cls([nn.Parameter(torch.ones(1, 1))])).energy_limit(1.0, group_of(cls))
