"""Cut into pieces and joined from small ones, the energies of a step are those of the plain sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.constraints import L1
from stableopt.optim import SGD, AdamW, rule_for, sums
from stableopt.optim.rules import step_sums
from stableopt.optim.sums import Moved, energy_sums

CPU = torch.device("cpu")
SHAPES = {
    "one large": [(40000,)], "larger than a piece": [(300, 250), (3,)], "exactly one piece": [(1 << 15,), (1 << 14,)],
    "one more than a piece": [((1 << 15) + 1,)], "many small": [(3, 5)] * 40 + [(7,)] * 40,
    "numbers": [(), (1,), (1, 1), (2,), ()], "empty": [(0, 3), (4,), (0,)], "only empty": [(0,)],
    "mixed": [(100, 200), (), (33000,), (5,), (0,), (1,), (16384,), (17000,)],
}  # fmt: skip
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.0}), (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5}),
    (torch.optim.AdamW, {"weight_decay": 0.3}), (torch.optim.Adam, {"weight_decay": 0.3, "amsgrad": True}),
    (torch.optim.NAdam, {}), (torch.optim.RAdam, {}), (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
]  # fmt: skip


def stepped(cls: Any, options: dict[str, Any], ps: list[nn.Parameter], steps: list[int]) -> tuple[Any, list[Moved]]:
    """Step each parameter its own number of times, and give the last step of all together."""
    half = len(ps) // 2
    groups = [{"params": g} | extra for g, extra in ((ps[:half], {"lr": 0.03}), (ps[half:], {})) if g]
    optimizer = cls(groups, lr=0.1, **options)
    for t in range(max(steps)):
        for p, count in zip(ps, steps, strict=True):
            p.grad = torch.randn_like(p) if t < count else None
        optimizer.step()
    for p in ps:
        p.grad = torch.randn_like(p)
    rule = rule_for(optimizer)
    starts = {p: (p.detach().clone(), rule.buffer(optimizer.state.get(p, {}))) for p in ps}
    starts = {p: (x, None if b is None else b.clone()) for p, (x, b) in starts.items()}
    optimizer.step()
    moved = [
        Moved(group, *starts[p], p.detach(), optimizer.state.get(p, {}))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return rule, moved


def plain(rule: Any, moved: list[Moved]) -> list[float]:
    rows = [torch.stack(step_sums(rule, m.group, m.start, m.buffer, m.end, m.state)) * m.share for m in moved]
    return [math.fsum(column) for column in zip(*(row.tolist() for row in rows), strict=True)]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sum_in_pieces_is_the_plain_sum(shapes: list, cls: Any, options: dict, dtype: torch.dtype) -> None:
    ps = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    steps = [i % 3 for i in range(len(ps))]
    rule, moved = stepped(cls, options, ps, steps)
    found, expected = energy_sums(rule, moved, CPU), plain(rule, moved)
    assert found.dtype == torch.float64
    tolerance = (
        1e-11 if dtype == torch.float64 else 2.0**-20
    )  # below float64 the products are summed in float32, in pieces
    assert found.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-300)
    assert sum(map(abs, expected)) > 0 or all(p.numel() == 0 for p in ps)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", ""))
def test_dtypes_and_layouts_may_be_mixed(cls: Any, options: dict) -> None:
    wide = torch.randn(60, 60)
    ps = [
        nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5).float()), nn.Parameter(torch.randn(4).bfloat16()),
        nn.Parameter(torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)), nn.Parameter(wide[::2, 1::3]),
        nn.Parameter(torch.randn(200, 300).t()), nn.Parameter(torch.randn(2, 0, 3)), nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(()).float()), nn.Parameter(torch.randn((1,)).bfloat16()),
    ]  # fmt: skip
    rule, moved = stepped(cls, options, ps, [i % 2 for i in range(len(ps))])
    assert energy_sums(rule, moved, CPU).tolist() == pytest.approx(plain(rule, moved), rel=2.0**-20)


def test_complex_parameters() -> None:
    ps = [nn.Parameter(torch.randn(shape, dtype=torch.complex128)) for shape in [(40000,), (3,), (), (3, 4)]]
    rule, moved = stepped(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, ps, [1, 2, 0, 1])
    assert energy_sums(rule, moved, CPU).tolist() == pytest.approx(plain(rule, moved), rel=1e-11)


def test_a_penalty_is_left_out_and_a_share_weighs() -> None:
    group = {"lr": 0.5, "momentum": 0.0, "prox": L1(3.0)}
    rule = rule_for(SGD([nn.Parameter(torch.ones(1))]))
    one = Moved(group, torch.ones(3), None, 2 * torch.ones(3), {}, 0.25)
    other = Moved(group, torch.zeros(2), None, torch.ones(2), {}, 1.0)
    assert energy_sums(rule, [one, other], CPU).tolist() == [0.0, 0.0, 5.5, 5.5, 2.75]


def test_nothing_at_all_is_zero() -> None:
    rule = rule_for(SGD([nn.Parameter(torch.ones(1))]))
    assert energy_sums(rule, [], CPU).tolist() == [0.0] * 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [3, 70000])
def test_what_is_not_finite_anywhere_is_seen(bad: float, size: int) -> None:
    rule = rule_for(SGD([nn.Parameter(torch.ones(1))]))
    end = torch.ones(size)
    end[-1] = bad
    group = {"lr": 0.5, "momentum": 0.0}
    quiet = Moved(group, torch.ones(5), None, torch.ones(5), {})
    assert not math.isfinite(energy_sums(rule, [quiet, Moved(group, torch.ones(size), None, end, {})], CPU)[4])


def test_small_tensors_are_joined_and_large_ones_cut() -> None:
    """The number of pieces is the number of times that the rule is evaluated."""
    ps = [nn.Parameter(torch.randn(10)) for _ in range(300)] + [nn.Parameter(torch.randn(300_000))]
    _, moved = stepped(torch.optim.AdamW, {}, ps, [1] * 301)
    pieces = list(sums._pieces(moved))
    counts = [piece.start.numel() for piece in pieces]
    assert sum(counts) == 303_000
    assert max(counts) <= sums._PIECE
    assert len(counts) <= 300_000 // sums._PIECE + 4
    for piece in pieces:
        assert piece.end.numel() == piece.buffer.numel() == piece.state["exp_avg_sq"].numel() == piece.start.numel()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("value", [0.1, 1.0 / 3.0, 7.77, 1e-3])
def test_the_rounding_of_float32_sums_is_within_what_the_tolerance_allows(cls: Any, value: float) -> None:
    """Equal entries: every addition rounds the same way, which is the worst for a sum."""
    ps = [nn.Parameter(torch.full((200_000,), value, dtype=torch.float32))]
    options = {"momentum": 0.9, "weight_decay": 0.1} if cls is torch.optim.SGD else {"weight_decay": 0.1}
    optimizer = cls(ps, lr=0.1, **options)
    rule, p = rule_for(optimizer), ps[0]
    p.grad = torch.full_like(p, value)
    optimizer.step()
    start, buffer = p.detach().clone(), rule.buffer(optimizer.state[p]).clone()
    optimizer.step()
    state, group = optimizer.state[p], optimizer.param_groups[0]
    found = energy_sums(rule, [Moved(group, start, buffer, p.detach(), state)], CPU).tolist()
    exact = Moved(
        group, start.double(), buffer.double(), p.detach().double(), {k: v.double() for k, v in state.items()}
    )
    for mine, expected in zip(found, plain(rule, [exact]), strict=True):
        assert abs(mine - expected) <= 8 * 2.0**-23 * abs(expected)


def test_sums_of_a_guarded_step_are_those_of_the_rule() -> None:
    ps = [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (), (50000,)]]
    optimizer = AdamW(ps, lr=0.01, guard="monitor", armijo=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().mean() for p in ps), torch.zeros(()))
        loss.backward()
        return loss

    for _ in range(3):
        starts = [p.detach().clone() for p in ps]
        buffers = [None if not optimizer.state[p] else optimizer.state[p]["exp_avg"].clone() for p in ps]
        loss = float(optimizer.step(closure).detach())
        group = optimizer.param_groups[0]
        moved = [
            Moved(group, s, b, p.detach(), optimizer.state[p]) for s, b, p in zip(starts, buffers, ps, strict=True)
        ]
        before, after, _, predicted, square = plain(optimizer.rule, moved)
        report = optimizer.last_step
        assert report.energy_before == pytest.approx(loss + before, rel=1e-12)
        assert report.energy_after == pytest.approx(float(closure().detach()) + after, rel=1e-12)
        assert report.predicted == pytest.approx(predicted, rel=1e-12)
        assert report.displacement == pytest.approx(math.sqrt(square), rel=1e-12)


def test_a_sparse_momentum_counts_like_a_dense_one() -> None:
    """torch's SGD keeps the momentum of sparse gradients sparse."""
    rule = rule_for(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9))
    assert rule is not None
    start, end, buffer = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4, 3)
    buffer[1] = 2.0
    group, later = {"lr": 0.1, "momentum": 0.9}, (start - end) / 0.1
    device = torch.device("cpu")
    dense = energy_sums(rule, [Moved(group, start, buffer, end, {"momentum_buffer": later})], device)
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        moved = Moved(group, start, buffer.to_sparse(1), end, {"momentum_buffer": later.to_sparse(1)})
        assert torch.equal(energy_sums(rule, [moved], device), dense)


def test_a_share_weighs_every_piece_of_a_large_parameter() -> None:
    rule = rule_for(SGD([nn.Parameter(torch.ones(1))]))
    count = 2 * sums._PIECE + 3
    large = Moved({"lr": 0.5, "momentum": 0.0}, torch.zeros(count), None, torch.ones(count), {}, 0.25)
    assert energy_sums(rule, [large], CPU)[4].item() == pytest.approx(0.25 * count)
