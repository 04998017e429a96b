"""The plain Lion follows the formula of its paper and the manners of torch's optimizers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt.optim.lion_step import PlainLion

OPTIONS: list[dict[str, Any]] = [
    {}, {"lr": 0.01}, {"betas": (0.5, 0.8)}, {"betas": (0.95, 0.98), "weight_decay": 0.3}, {"maximize": True, "weight_decay": 0.1},
    {"betas": (0.0, 0.0)}, {"lr": torch.tensor(0.02, dtype=torch.float64)},
    {"lr": torch.tensor([0.02], dtype=torch.float64), "weight_decay": 0.1},
]  # fmt: skip


def literal(
    w: list[float], grads: list[list[float]], *, lr: float, betas: tuple[float, float], omega: float, sign: int
) -> list[float]:
    """Algorithm 2 of the paper, one number after the other."""
    beta1, beta2 = betas
    for i, x in enumerate(w):
        m = 0.0
        for gradient in grads:
            g = sign * gradient[i]
            c = beta1 * m + (1 - beta1) * g
            x = x - lr * ((c > 0) - (c < 0) + omega * x)
            m = beta2 * m + (1 - beta2) * g
        w[i] = x
    return w


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("foreach", [False, True])
def test_the_step_is_the_formula_of_the_paper(options: dict[str, Any], foreach: bool) -> None:
    w = nn.Parameter(torch.randn(6))
    optimizer = PlainLion([w], foreach=foreach, **options)
    group = optimizer.param_groups[0]
    grads = [torch.randn(6) for _ in range(30)]
    expected = literal(
        w.tolist(), [g.tolist() for g in grads], lr=float(group["lr"]), betas=group["betas"], omega=group["weight_decay"],
        sign=-1 if group["maximize"] else 1,
    )  # fmt: skip
    for g in grads:
        w.grad = g
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor(expected), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_all_at_once_is_one_by_one_to_the_last_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(3,), (2, 4), (), (5, 1), (0, 2)]
    starts = [torch.randn(s).to(dtype) if not dtype.is_complex else torch.randn(s, dtype=dtype) for s in shapes]
    results = []
    for capturable, foreach in ((False, False), (False, True), (True, False), (True, True)):
        if capturable and isinstance(options.get("lr"), Tensor) and dtype in {torch.bfloat16, torch.float16}:
            continue  # a tensor lr on its device is rounded to the dtype of the parameters, as in torch
        if isinstance(options.get("lr"), Tensor) and dtype not in {torch.bfloat16, torch.float16}:
            options = options | {"lr": options["lr"].to(dtype.to_real())}
        torch.manual_seed(0)
        params = [nn.Parameter(w.clone()) for w in starts]
        optimizer = PlainLion(params, foreach=foreach, capturable=capturable, **options)
        for _ in range(8):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=dtype)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["exp_avg"] for p in params)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_complex_parameter_is_two_real_ones() -> None:
    z = nn.Parameter(torch.randn(4, dtype=torch.complex128))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    optimizers = [PlainLion([p], lr=0.1, weight_decay=0.2) for p in (z, x)]
    for _ in range(5):
        z.grad = torch.randn(4, dtype=torch.complex128)
        x.grad = torch.view_as_real(z.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())


def test_nothing_moves_for_no_gradient_and_nothing_is_kept_for_it() -> None:
    used, unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = PlainLion([used, unused], lr=0.5, weight_decay=0.0)
    before = [used.detach().clone(), unused.detach().clone()]
    used.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(used, before[0])
    assert torch.equal(unused, before[1])
    assert unused not in optimizer.state
    assert not optimizer.state[used]["exp_avg"].any()
    still = PlainLion([used], lr=0.0, weight_decay=0.5)
    used.grad = torch.randn(3)
    still.step()
    assert torch.equal(used, before[0])


def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = PlainLion([w], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert w.item() == 2.5


def test_a_checkpoint_goes_on_where_it_was_and_old_ones_load() -> None:
    def run(optimizer: PlainLion, w: nn.Parameter, steps: range) -> None:
        for i in steps:
            w.grad = torch.sin(torch.arange(4.0) + i)
            optimizer.step()

    whole = nn.Parameter(torch.ones(4))
    straight = PlainLion([whole], lr=0.1, weight_decay=0.1)
    run(straight, whole, range(10))
    part = nn.Parameter(torch.ones(4))
    first = PlainLion([part], lr=0.1, weight_decay=0.1)
    run(first, part, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = PlainLion([part], lr=7.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, part, range(5, 10))
    assert torch.equal(part, whole)
    old = first.state_dict()
    for group in old["param_groups"]:
        for name in ("foreach", "maximize", "capturable", "differentiable"):
            del group[name]
    second.load_state_dict(old)
    run(second, part, range(1))
    assert second.param_groups[0]["maximize"] is False
    assert copy.deepcopy(second).state_dict()["param_groups"] == second.state_dict()["param_groups"]


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": -1.0}, "Invalid learning rate"), ({"lr": float("nan")}, "Invalid learning rate"),
    ({"lr": torch.ones(2)}, "1-element"), ({"betas": (1.0, 0.5)}, "index 0"), ({"betas": (0.5, -0.1)}, "index 1"),
    ({"weight_decay": -1.0}, "weight_decay"), ({"foreach": True, "differentiable": True}, "foreach"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainLion([nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused() -> None:
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.eye(3)[0].to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        PlainLion([w]).step()


def test_autograd_records_a_differentiable_step() -> None:
    """d w+ / d lr = -sign, d w+ / d w = 1 - lr omega."""
    start, lr = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor(0.1, requires_grad=True)
    w = start.clone()
    optimizer = PlainLion([nn.Parameter(torch.zeros(2))], lr=lr, weight_decay=0.5, differentiable=True)
    optimizer.param_groups[0]["params"] = [w]
    w.grad = torch.tensor([2.0, -3.0])
    optimizer.state[w]["exp_avg"] = torch.zeros(2)
    optimizer.step()
    d_start, d_lr = torch.autograd.grad(w.sum(), [start, lr])
    torch.testing.assert_close(d_start, torch.full((2,), 1 - 0.1 * 0.5))
    torch.testing.assert_close(d_lr, (-torch.tensor([1.0, -1.0]) - 0.5 * torch.tensor([1.0, -1.0])).sum())
