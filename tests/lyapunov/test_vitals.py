"""The vital signs against what plain formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.lyapunov.tiers import trust_facts
from stableopt.lyapunov.vitals import Names, measure_vitals
from stableopt.optim.agree import Alone


def parameter(values, grad, dtype=torch.float64, device="cpu"):
    p = nn.Parameter(torch.tensor(values, dtype=dtype, device=device))
    p.grad = None if grad is None else torch.tensor(grad, dtype=dtype, device=device)
    return p


def test_norms_ratios_and_slope_are_those_of_the_formulas(device):
    a, b = (
        parameter([[3.0, 0.0], [0.0, 4.0]], [[1.0, 2.0], [2.0, 0.0]], device=device),
        parameter([2.0], [6.0], device=device),
    )
    before = {a: a.detach() + 0.5, b: b.detach() - 1.0}
    found = measure_vitals({a: "a", b: "b"}, before, Alone)
    assert found.weight_norm == pytest.approx(math.sqrt(25 + 4))
    assert found.grad_norm == pytest.approx(math.sqrt(9 + 36))
    assert found.displacement == pytest.approx(math.sqrt(4 * 0.25 + 1))
    assert found.slope == pytest.approx(-0.5 * 5 + 6.0)
    assert found.grad_norms == pytest.approx({"a": 3.0, "b": 6.0})
    assert found.update_ratio == pytest.approx({"a": 1.0 / 5.0, "b": 0.5})
    assert found.nonfinite == ()


def test_without_the_values_before_there_is_no_displacement():
    a = parameter([1.0], [2.0])
    found = measure_vitals({a: "a"}, {}, Alone)
    assert math.isnan(found.displacement)
    assert math.isnan(found.slope)
    assert found.grad_norm == 2.0
    assert found.update_ratio == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad):
    a, b = parameter([1.0, bad], [0.0, 0.0]), parameter([1.0], [bad])
    buffer = torch.tensor([bad])
    found = measure_vitals({a: "a", b: "b"}, {}, Alone, {buffer: "mean"})
    assert found.nonfinite == ("grad:b", "param:a", "buffer:mean")


def test_finite_numbers_with_a_norm_that_overflows_are_finite():
    a = parameter([3e38, 3e38], [3e38, 0.0], torch.float32)
    assert measure_vitals({a: "a"}, {}, Alone).nonfinite == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    a = nn.Parameter(torch.ones(4096, dtype=dtype))
    a.grad = torch.ones(4096, dtype=dtype)
    found = measure_vitals({a: "a"}, {a: torch.zeros(4096, dtype=dtype)}, Alone)
    assert (found.weight_norm, found.grad_norm, found.slope) == (64.0, 64.0, 4096.0)


def test_complex_parameters_are_pairs_of_real_ones():
    a = nn.Parameter(torch.tensor([3 + 4j]))
    a.grad = torch.tensor([1 - 2j])
    found = measure_vitals({a: "a"}, {a: torch.tensor([2 + 3j])}, Alone)
    assert found.weight_norm == 5.0
    assert found.slope == pytest.approx(1 - 2)


def test_sparse_gradients_have_norms_and_no_slope():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    w = table.weight
    found = measure_vitals({w: "w"}, {w: w.detach() + 1}, Alone)
    assert found.grad_norm == pytest.approx(2.0)
    assert math.isnan(found.slope)


def test_empty_and_absent_things_do_no_harm():
    a, b = nn.Parameter(torch.ones(0)), parameter([0.0], None)
    found = measure_vitals({a: "a", b: "b"}, {a: torch.ones(0), b: torch.zeros(1)}, Alone)
    assert (found.weight_norm, found.displacement) == (0.0, 0.0)
    assert math.isnan(found.grad_norm)
    assert found.update_ratio == {}
    assert measure_vitals({}, {}, Alone).weight_norm == 0.0


def test_names_are_those_of_the_model_and_follow_new_groups():
    model, extra = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    names = Names(model, opt)
    assert list(names.parameters().values()) == ["weight", "bias"]
    opt.add_param_group({"params": [extra]})
    assert list(names.parameters().values()) == ["weight", "bias", "group 1, parameter 0"]


def test_buffers_are_the_floating_ones():
    norm = nn.BatchNorm1d(2)
    assert list(Names(norm, torch.optim.SGD(norm.parameters())).buffers().values()) == ["running_mean", "running_var"]


@pytest.mark.parametrize("curvature", [0.0, 0.5, 1.0, 1.999, 2.0, 2.001, 4.0])
def test_on_a_parabola_the_trust_ratio_is_one_minus_half_of_lr_times_curvature(curvature):
    w, lr = 3.0, 1.0
    g = curvature * w if curvature else 1.0
    loss = (lambda x: 0.5 * curvature * x * x) if curvature else (lambda x: x)
    d = -lr * g
    facts = trust_facts(loss(w), loss(w + d), g * d, [lr], 0.0)
    assert facts["trust"] == pytest.approx(1 - lr * curvature / 2, abs=1e-12)
    assert facts["batch_sharpness"] == pytest.approx(curvature, abs=1e-12)
    assert (facts["trust"] < 0) == (curvature > 2)  # the edge of gradient descent
    if curvature:
        assert facts["edge_distance"] == pytest.approx(2 / curvature)
    else:
        assert facts["edge_distance"] == math.inf


def test_trust_says_nothing_where_there_is_nothing_to_say():
    for args in [
        (math.nan, 1.0, -1.0, [0.1], 0.0),
        (1.0, math.inf, -1.0, [0.1], 0.0),
        (1.0, 0.5, 0.0, [0.1], 0.0),
        (1.0, 1.0, -1e-17, [0.1], 1e-16),
    ]:
        assert all(math.isnan(x) for x in trust_facts(*args).values())
    assert math.isnan(trust_facts(1.0, 0.5, -1.0, [0.1, 0.2], 0.0)["batch_sharpness"])
    assert trust_facts(1.0, 0.5, -1.0, [0.1, 0.1], 0.0)["batch_sharpness"] == pytest.approx(10.0)
    assert math.isnan(trust_facts(1.0, 1.5, 1.0, [0.1], 0.0)["edge_distance"])  # uphill
    assert math.isnan(trust_facts(1.0, 0.5, -1.0, [0.0], 0.0)["batch_sharpness"])
