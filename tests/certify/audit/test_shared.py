"""Parameters: ties that parametrizations break, DistributedDataParallel that does not know them, half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations as Q

from stableopt.certify.audit import audit
from tests.certify.audit.foreign import of_kind, only


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_a_tie_is_broken_where_one_of_the_layers_is_parametrized() -> None:
    model = tied()
    Q.spectral_norm(model[0])
    model.eval()
    found = only(model, "tied-apart")
    one, two = (model[i].weight.detach().numpy() for i in (0, 2))
    assert found.attained == pytest.approx(np.linalg.norm(one - two) / np.linalg.norm(two))
    assert found.numbers["norm of 2.weight"] == pytest.approx(np.linalg.norm(two, 2))
    assert found.severity == "serious"


def test_a_tie_that_holds_is_left_alone() -> None:
    assert len(audit(tied())) == 0
    layer = Q.spectral_norm(nn.Linear(4, 4))
    assert not of_kind(audit(nn.Sequential(layer, nn.ReLU(), layer)), "tied-apart")


def test_parameters_made_after_distributed_data_parallel_are_found(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        first = nn.Sequential(nn.Linear(4, 4))
        Q.weight_norm(first[0])
        assert not of_kind(audit(DistributedDataParallel(first)), "unsynchronised")
        wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        Q.weight_norm(wrapped.module[0])
        found = only(wrapped, "unsynchronised")
        assert (found.attained, found.numbers["parameters"]) == (2.0, 5.0)
        assert "original0" in found.what
        assert found.severity == "serious"
        outer = nn.Sequential(nn.Identity(), wrapped)
        assert only(outer, "unsynchronised").path == "1"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_against_the_same_numbers_in_float64(dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 16).to(dtype)
    found = only(nn.Sequential(layer), "low-precision", (16,))
    W, b = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double().numpy() @ W.T + b
    rounded = layer(x).detach().double().numpy()
    assert found.attained == pytest.approx(np.linalg.norm(rounded - exact) / np.linalg.norm(exact), rel=1e-9)
    assert found.numbers["unit roundoff"] == torch.finfo(dtype).eps / 2
    assert not of_kind(audit(nn.Linear(4, 4, dtype=torch.float32)), "low-precision")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found_first(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert [finding.kind for finding in audit(model.eval()) if finding.kind == "not-finite"] == []
    model[1].running_mean[1] = bad
    (finding,) = [finding for finding in audit(model.eval()) if finding.kind == "not-finite"]
    assert (finding.path, finding.severity, finding.numbers["entries"]) == ("1.running_mean", "serious", 1.0)


def test_inputs_are_a_tuple() -> None:
    with pytest.raises(TypeError, match="inputs must be the tuple of the arguments of the model, got Tensor"):
        audit(nn.Linear(3, 3), inputs=torch.ones(1, 3))  # pyright: ignore[reportArgumentType]
