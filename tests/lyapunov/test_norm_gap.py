"""The gap of methods that train with an estimate: proved, right beside the matrix itself, recorded, without a trace."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stableopt.lyapunov import Every, Monitor
from stableopt.lyapunov.layers import NormEstimator
from stableopt.nn import GroupSort, norm_gap, stabilize, table


def model_of(method: str = "power") -> nn.Sequential:
    torch.manual_seed(0)
    return stabilize(nn.Sequential(nn.Linear(6, 12), GroupSort(), nn.Linear(12, 3)), 2.0, method=method)  # type: ignore[return-value]


def norm_in_training(layer: nn.Linear) -> float:
    return float(torch.linalg.matrix_norm(copy.deepcopy(layer).train().weight.detach(), 2))


def run(model: nn.Module, steps: int, **options: object) -> Monitor:
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = (
        torch.randn(16, 6, generator=torch.Generator().manual_seed(3)),
        torch.randn(16, 3, generator=torch.Generator().manual_seed(4)),
    )
    with Monitor(model, opt, max_overhead=None, **options) as monitor:  # type: ignore[arg-type]
        for _ in range(steps):

            def closure() -> Tensor:
                opt.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
    return monitor


def test_the_gap_is_that_of_the_weight_in_training_and_bounds_it() -> None:
    model = model_of()
    run(model, 5)
    for mode in (True, False):
        model.train(mode)
        for i in (0, 2):
            true = norm_in_training(model[i]) / 2.0**0.5
            assert true <= norm_gap(model[i]) <= true * (1 + 1e-9)


def test_the_gap_sees_an_excess_and_that_there_is_none() -> None:
    model = model_of()
    layer, limit = model[0], model[0].parametrizations.weight[0]
    assert 0.999 < norm_gap(layer) < 1.001
    u, s, v = torch.linalg.svd(layer.parametrizations.weight.original.detach())
    low = s.clone()
    low[0], low[1:] = 3.0, 2.95 - torch.arange(5.0) * 0.01
    with torch.no_grad():  # vectors of the second direction, whose value is a bit smaller: the excess is the quotient
        layer.parametrizations.weight.original.copy_(u[:, :6] @ torch.diag(low) @ v)
        limit.vectors.copy_(u[:, 1])
        limit.share.copy_(low[1] / low.norm())
    assert 1.0 < norm_gap(layer) < 3.0 / 2.9
    assert norm_gap(layer) == pytest.approx(norm_in_training(layer) / 2.0**0.5)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(0.1)  # within the limit: nothing to estimate
    assert norm_gap(layer) == pytest.approx(0.3 / 2.0**0.5)


def test_a_weight_in_parts_and_one_below_another_parametrization() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recurrent = stabilize(nn.GRU(3, 4), radius=0.5, method="power")
    recurrent.weight_ih_l0 = torch.cat([torch.eye(4, 3), torch.eye(4, 3), 0.1 * torch.eye(4, 3)])
    assert 0.99 < norm_gap(recurrent, "weight_ih_l0") < 1.01
    foreign = stabilize(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), 0.5, method="power")
    assert norm_gap(foreign) == pytest.approx(norm_in_training(foreign) / 0.5)
    learned = stabilize(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 3.0, method="power", budget="learned"
    )
    assert 0.99 < norm_gap(learned[0]) < 1.01
    kernel = stabilize(nn.Conv2d(2, 3, 3), 1.0, method="power")
    assert 0.9 < norm_gap(kernel) < 1.1


def test_there_is_no_gap_without_an_estimate() -> None:
    assert norm_gap(nn.Linear(2, 2)) is None
    assert norm_gap(model_of("gram")[0]) is None
    with torch.device("meta"):
        assert norm_gap(stabilize(nn.Linear(2, 2), method="power")) is None
    assert NormEstimator(model_of("gram")).gaps() == {}


def test_the_gap_leaves_no_trace() -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    assert model.training
    norm_gap(model[0])
    NormEstimator(model).gaps()
    table(model)
    assert model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    watched, alone = model_of(), model_of()
    run(watched, 4, every=Every(gaps=1))
    run(alone, 4, every=Every(gaps=None, layers=None))
    for key, value in watched.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[key], rtol=0, atol=0)


@pytest.mark.parametrize(("gaps", "measured"), [(3, [1, 4, 7]), (100, [1]), (None, []), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_the_monitor_records_it_at_its_interval(gaps: int | None, measured: list[int]) -> None:
    monitor = run(model_of(), 7, every=Every(gaps=gaps))
    assert [record.step for record in monitor.records if record.norm_gap] == measured
    for record in monitor.records:
        assert set(record.norm_gap) in (set(), {"0.weight", "2.weight"})
        assert all(0.5 < gap < 1.1 for gap in record.norm_gap.values())


def test_the_recorded_gap_is_that_of_the_end_of_the_step() -> None:
    model = model_of()
    monitor = run(model, 1, every=Every(gaps=1))
    assert monitor.last is not None
    assert monitor.last.norm_gap == {"0.weight": norm_gap(model[0]), "2.weight": norm_gap(model[2])}


def test_nan_is_recorded_as_nan_and_stops_nothing() -> None:
    model = model_of()
    nn.init.constant_(model[0].parametrizations.weight.original, torch.nan)
    gaps = NormEstimator(model).gaps()
    assert gaps["0.weight"] != gaps["0.weight"]
    assert 0.9 < gaps["2.weight"] < 1.1


def test_the_file_has_it(tmp_path: Path) -> None:
    run(model_of(), 2, run_dir=tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / "energy.jsonl").read_text().splitlines())
    assert set(first["norm_gap"]) == {"0.weight", "2.weight"}
    assert second.get("norm_gap", {}) == {}


def test_the_table_shows_it() -> None:
    model = model_of()
    run(model, 3)
    found = table(model)
    assert [row.gap for row in found.rows] == [norm_gap(model[0]), norm_gap(model[2])]
    lines = str(found).splitlines()
    assert lines[0].endswith("gap in training")
    assert lines[1].endswith(f"{found.rows[0].gap:.4f}")
    assert found.rows[0].after.upper == pytest.approx(found.rows[0].gap * found.rows[0].limit)
    evaluated = table(model.eval())
    assert all(row.after.upper <= row.limit for row in evaluated.rows)
    assert [row.gap for row in evaluated.rows] == [row.gap for row in found.rows]
    assert "gap" not in str(table(model_of("gram")))
    assert all(row.gap is None for row in table(model_of("gram")).rows)
