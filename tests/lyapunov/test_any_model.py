"""Parameters and models of every kind: each trains with the monitor as without it, and its records say what happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import optim
from tests.lyapunov.training import batches, make_closure, picture
from tests.lyapunov.watched import Watch, loss_of, small, train, verdicts, watched

# --- parameters of every kind ---


def test_frozen_unused_and_shared_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.first.weight
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(torch.tanh(self.frozen(self.first(x)))).sum(1, keepdim=True) + self.empty.sum()

    def scenario(watch: Watch) -> Any:
        model = Odd()
        groups = [{"params": list(model.parameters())}, {"params": [], "lr": 7.0}]
        return train(watch, model, torch.optim.SGD(groups, lr=0.05, momentum=0.9))

    records = watched(scenario).records
    assert not verdicts(watched(scenario)) & {"unobserved", "nonfinite"}
    assert set(records[0].grad_norms) == {"first.weight", "first.bias", "tied.bias"}
    assert all(records[0].update_ratio[f"frozen.{name}"] == 0.0 for name in ("weight", "bias"))
    assert records[0].lr == (0.05, 7.0)


def test_parameters_that_the_model_does_not_have() -> None:
    def scenario(watch: Watch) -> Any:
        model, scale = small(), nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.05)
        return train(watch, model, optimizer, loss=lambda m, b: loss_of(m, b) * scale.exp()), scale.detach().clone()

    assert "group 0, parameter 4" in watched(scenario).records[0].grad_norms


def test_a_rate_of_zero_moves_nothing() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        return train(watch, model, torch.optim.AdamW(model.parameters(), lr=0.0))

    for record in watched(scenario).records:
        assert record.displacement == 0.0
        assert record.verdict == "undecided"
        assert math.isnan(record.trust)
        assert math.isnan(record.batch_sharpness)
        assert math.isnan(record.edge)
        assert "every learning rate is zero" in str(record.notes)


def test_groups_with_rates_of_their_own() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
        return train(watch, model, torch.optim.SGD(groups, momentum=0.9))

    for record in watched(scenario).records:
        assert record.lr == (0.1, 0.01)
        assert math.isfinite(record.trust)
        assert math.isnan(record.batch_sharpness)  # 2 (1 - rho) / lr has no one lr
        assert record.edge > 0.0


def test_a_group_and_a_dtype_that_change_on_the_way() -> None:
    def scenario(watch: Watch) -> Any:
        model = small()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.05)
        with watch(model, optimizer):
            for i, (x, y) in enumerate(batches(6)):
                if i == 2:
                    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
                if i == 4:
                    model.float()
                x, y = x.to(model[0].weight.dtype), y.to(model[0].weight.dtype)
                optimizer.step(make_closure(model, optimizer, x, y))
        return picture(model, optimizer)

    records = watched(scenario).records
    assert [len(record.update_ratio) for record in records] == [2, 2, 4, 4, 4, 4]
    assert {record.verdict for record in records} == {"decreased"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, optim.SGD], ids=["SGD", "AdamW", "ours"])
def test_parameters_of_coarse_types(dtype: torch.dtype, make: Any) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0].to(dtype)) - batch[1].to(dtype)).square().mean()

    def scenario(watch: Watch) -> Any:
        model = small().to(dtype)
        eps = {"eps": 1e-3} if make is torch.optim.AdamW else {}  # its default is zero in half precision
        return train(watch, model, make(model.parameters(), lr=0.01, **eps), loss=loss)

    for record in watched(scenario).records:
        assert record.verdict in {"decreased", "undecided", "increased"}
        assert math.isfinite(record.grad_norm)
        assert record.plain_sharpness > 0.0, record.notes


@pytest.mark.parametrize("closed", [True, False])
def test_complex_parameters(closed: bool) -> None:
    def scenario(watch: Watch) -> Any:
        model = nn.Sequential(nn.Linear(6, 4, dtype=torch.complex128), nn.Linear(4, 1, dtype=torch.complex128))

        def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
            return (m(b[0].to(torch.complex128)) - b[1]).abs().square().mean()

        return train(watch, model, torch.optim.SGD(model.parameters(), lr=0.01), loss=loss, closed=closed)

    records = watched(scenario).records
    assert all(math.isfinite(record.grad_norm) and record.slope < 0.0 for record in records)
    assert not closed or all(record.verdict == "decreased" and 0.5 < record.trust < 1.0 for record in records)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's own code
def test_sparse_gradients(make: Any, closed: bool) -> None:
    def scenario(watch: Watch) -> Any:
        table = nn.EmbeddingBag(20, 3, sparse=True, mode="sum")
        words = torch.randint(0, 20, (8, 4), generator=torch.Generator().manual_seed(1))

        def loss(m: nn.Module, _: Any) -> Tensor:
            return (m(words).sum(1) - 1.0).square().mean()

        return train(watch, table, make(table.parameters(), lr=0.01), loss=loss, closed=closed)

    records = watched(scenario).records
    assert all(record.grad_norm > 0.0 and record.displacement > 0.0 for record in records)
    assert not closed or {record.verdict for record in records} <= {"decreased", "increased"}


# --- models ---


class Reader(nn.Module):
    """Words through an embedding, a recurrent and an attending layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.cell(self.words(x))[0]).mean(1))


def seeing() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.LazyLinear(5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [Reader, seeing], ids=["reader", "seeing"])
@pytest.mark.parametrize("train_mode", [True, False])
def test_models_of_the_field(make: Callable[[], nn.Module], train_mode: bool) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = (3 * batch[0].abs()).long().clamp_max(8) if make is Reader else batch[0]
        return (model(x) - batch[1]).square().mean()

    def scenario(watch: Watch) -> Any:
        model = make().train(train_mode)
        loss(model, batches(1)[0])  # a lazy layer gets its shape
        return train(watch, model, torch.optim.AdamW(model.parameters(), lr=0.01), steps=3, loss=loss)

    for record in watched(scenario).records:
        assert record.verdict in {"decreased", "undecided", "increased"}, record.reason
        assert math.isfinite(record.plain_sharpness), record.notes
        assert math.isfinite(record.forward_exponent), record.notes
        assert record.norms
