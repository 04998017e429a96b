"""The set of derivatives at kinks: against all vertices by hand, exact rational arithmetic, and derivatives at points nearby."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.lyapunov.layers.kinks import KinkCounter
from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.layers.walk import Walk
from stableopt.lyapunov.profile.nonsmooth.clarke import ClarkeReading, clarke_bounds, update_reach
from stableopt.lyapunov.profile.nonsmooth.slopes import group_options
from stableopt.nn.activations import Abs, GroupSort, MaxMin

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "negative": lambda: nn.LeakyReLU(-0.7),
    "abs": Abs,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.2),
    "relu6": nn.ReLU6,
    "softshrink": lambda: nn.Softshrink(0.1),
    "threshold": lambda: nn.Threshold(0.1, 0.1),
    "prelu": lambda: nn.PReLU(1, 0.3),
    "in place": lambda: nn.ReLU(inplace=True),
}


def net(widths: tuple[int, ...], activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1]).double()


def inputs(samples: int, n: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrices(model: nn.Sequential) -> list[np.ndarray]:
    return [m.weight.detach().numpy() for m in model if isinstance(m, nn.Linear)]


def vertices(model: nn.Sequential, reading: ClarkeReading, sample: int) -> list[np.ndarray]:
    """All products of matrices and extreme slopes, one after the other."""
    W = matrices(model)
    sets = [
        [sorted({a, b}) for a, b in zip(low[sample], high[sample], strict=True)]
        for _, low, high in reading.slopes.values()
    ]
    products = []
    for choice in itertools.product(*[itertools.product(*s) for s in sets]):
        J = W[0]
        for d, A in zip(choice, W[1:], strict=True):
            J = A @ (np.array(d)[:, None] * J)
        products.append(J)
    return products


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_largest_norm_is_that_of_all_vertices_by_hand(name: str) -> None:
    model, x = net((4, 5, 4, 3), ACTIVATIONS[name]), inputs(3, 4)
    reading = clarke_bounds(model, x, reach=0.25)
    assert reading.proved
    assert reading.undecided.max() > 0
    for i in range(3):
        by_hand = max(np.linalg.norm(J, 2) for J in vertices(model, reading, i))
        assert reading.exact[i]
        assert by_hand in reading.largest[i]
        assert reading.largest[i].width < 1e-11 * by_hand


@settings(max_examples=12, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
    reach=st.floats(0.0, 1.0),
    exponent=st.integers(-180, 180),
)
def test_bounds_are_ordered(widths: list[int], seed: int, reach: float, exponent: int) -> None:
    """AD <= vertices <= both bounds by middle and radius; entrywise <= absolute values; all <= product where it is the larger."""
    model = net(tuple(widths), seed=seed)
    with torch.no_grad():
        model[0].weight.mul_(10.0**exponent)
        model[0].bias.mul_(10.0**exponent)
    reading = clarke_bounds(model, inputs(2, widths[0], seed), reach=reach, vertices=256)
    for i in range(2):
        chosen, largest = reading.chosen[i], reading.largest[i]
        assert chosen.lower <= largest.upper
        assert chosen.proved
        assert largest.proved
        for bound in (reading.interval[i], reading.entrywise[i], reading.absolute[i], reading.product[i]):
            assert largest.lower <= bound
            assert largest.upper <= bound or reading.exact[i]
        assert reading.entrywise[i] <= reading.absolute[i] * (1 + 1e-11) + 1e-300 * 10.0 ** max(
            0, exponent
        )  # what may underflow
        if not reading.undecided[i]:
            assert largest.upper == pytest.approx(chosen.upper, rel=1e-11)
            assert reading.interval[i] == pytest.approx(chosen.upper, rel=1e-11)


def test_enclosures_hold_in_exact_arithmetic() -> None:
    """One output: the squared norm of a product of stored numbers is a rational number."""
    for seed in range(10):
        model, x = net((3, 4, 3, 1), lambda: nn.LeakyReLU(0.1), seed), inputs(1, 3, seed)
        reading = clarke_bounds(model, x, reach=0.3)
        W = [[[Fraction(float(v)) for v in row] for row in A] for A in matrices(model)]
        sets = [
            [sorted({Fraction(float(a)), Fraction(float(b))}) for a, b in zip(low[0], high[0], strict=True)]
            for _, low, high in reading.slopes.values()
        ]
        largest = Fraction(0)
        for choice in itertools.product(*[itertools.product(*s) for s in sets]):
            row = W[2][0]
            for d, A in zip(reversed(choice), (W[1], W[0]), strict=True):
                row = [sum((row[k] * d[k] * A[k][j] for k in range(len(d))), Fraction(0)) for j in range(len(A[0]))]
            largest = max(largest, sum((v * v for v in row), Fraction(0)))
        bound = reading.largest[0]
        assert Fraction(bound.lower) ** 2 <= largest <= Fraction(bound.upper) ** 2
        for upper in (reading.interval[0], reading.entrywise[0], reading.absolute[0], reading.product[0]):
            assert largest <= Fraction(upper) ** 2


def test_rounding_is_counted_where_a_product_cancels() -> None:
    """The stored numbers give a derivative near 1e-17, of which the computed one has no digit right."""
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(20):
        a, w = draw.normal(size=9), draw.normal(size=9)
        w[-1] = -(a[:-1] @ w[:-1]) / a[-1]
        model = nn.Sequential(nn.Linear(1, 9), nn.LeakyReLU(1.0), nn.Linear(9, 1)).double()
        with torch.no_grad():
            model[0].weight.copy_(torch.from_numpy(w)[:, None])
            model[2].weight.copy_(torch.from_numpy(a)[None])
        exact = abs(sum((Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), w.tolist(), strict=True)), Fraction(0)))
        bound = clarke_bounds(model, torch.ones(1, 1, dtype=torch.float64)).worst
        assert Fraction(bound.lower) <= exact <= Fraction(bound.upper)
        wrong += abs(float(a @ w)) < float(exact) * 0.99
    assert wrong > 2


def test_no_choice_of_slopes_within_the_intervals_exceeds_the_vertices() -> None:
    model, x = net((4, 6, 5, 3)), inputs(1, 4)
    reading = clarke_bounds(model, x, reach=0.5)
    W, draw = matrices(model), np.random.default_rng(0)
    for _ in range(300):
        J = W[0]
        for (_, low, high), A in zip(reading.slopes.values(), W[1:], strict=True):
            J = A @ ((low[0] + draw.random(low[0].shape) * (high[0] - low[0]))[:, None] * J)
        assert np.linalg.norm(J, 2) <= reading.worst.upper


def test_derivatives_at_points_nearby_are_within_the_set_at_a_kink() -> None:
    """With independent rows of one layer every pattern is attained by a point nearby: the bound is the largest of their norms."""
    model = net((5, 4, 3))
    with torch.no_grad():
        model[0].bias.zero_()
    reading = clarke_bounds(model, torch.zeros(1, 5, dtype=torch.float64))
    assert reading.undecided.tolist() == [4]
    norms = []
    for x in 1e-3 * inputs(400, 5):
        J = torch.autograd.functional.jacobian(model, x)
        norms.append(float(torch.linalg.matrix_norm(J, 2)))
    assert max(norms) in reading.worst
    # one unit must be open for the bound to be reached: with all at slope 0 it is not
    assert reading.taken.upper < 1e-12


@pytest.mark.parametrize(("offset", "undecided"), [(0.0, 1), (1e-12, 0), (-1e-12, 1)])
def test_a_unit_is_undecided_up_to_the_reach_and_not_beyond(offset: float, undecided: int) -> None:
    """Pre-activations (1, 7): their root mean square is 5, and with the reach 0.2 the first is just at the distance 1."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [7.0]]))
        model[0].bias.zero_()
    reading = clarke_bounds(model, torch.ones(1, 1, dtype=torch.float64), reach=0.2 - offset)
    assert reading.undecided.tolist() == [undecided]
    assert reading.kinks["1"] == undecided / 2


def test_what_automatic_differentiation_takes_at_a_kink_is_known() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    for activation, slope in ((nn.ReLU(), 0.0), (nn.LeakyReLU(0.5), 0.5), (Abs(), 0.0), (nn.Hardtanh(0.0, 1.0), 0.0)):
        reading = clarke_bounds(nn.Sequential(activation), x)
        chosen, low, high = reading.slopes["0"]
        assert chosen.tolist() == [[slope, slope]]
        assert (low <= chosen).all()
        assert (chosen <= high).all()
        assert slope in reading.taken
    tie = clarke_bounds(nn.Sequential(nn.Linear(1, 2, bias=False), MaxMin(), nn.Linear(2, 1)).double(), x[:, :1])
    assert tie.undecided.tolist() == [1]


def test_the_share_of_kinks_is_that_of_the_counter_of_the_monitor() -> None:
    model, x = net((6, 20, 20, 2)), inputs(8, 6)
    reading = clarke_bounds(model, x, reach=0.1, vertices=1, samples=1)
    counter, readout = KinkCounter(0.1), Readout()
    with counter:
        Walk(model, lambda: model(x).sum(), counter).run()
    counter.report(readout)
    assert {name: share for (_, name), share in readout.fetch().items()} == pytest.approx(reading.kinks)


def test_groups_that_are_sorted_have_the_norm_of_the_worst_permutation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), GroupSort(3), nn.Linear(6, 2)).double()
    x = inputs(3, 4)
    reading = clarke_bounds(model, x, reach=0.4)
    assert reading.proved
    W = [m.weight.detach().numpy() for m in model if isinstance(m, nn.Linear)]
    z = model[0](x).detach()
    distance = 0.4 * float(z.norm()) / math.sqrt(z.numel())
    for i in range(3):
        groups = [group_options(tuple(z[i, a : a + 3].tolist()), distance) for a in (0, 3)]
        by_hand = 0.0
        for p, q in itertools.product(*groups):
            D = np.zeros((6, 6))
            D[:3, :3], D[3:, 3:] = np.eye(3)[list(p)], np.eye(3)[list(q)]
            by_hand = max(by_hand, float(np.linalg.norm(W[1] @ D @ W[0], 2)))
        assert by_hand in reading.largest[i]
        J = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x[i])
        assert float(torch.linalg.matrix_norm(J, 2)) in reading.chosen[i]


def test_float32_is_read_exactly() -> None:
    model, x = net((4, 5, 3), lambda: nn.LeakyReLU(0.1)).float(), inputs(2, 4).float()
    reading = clarke_bounds(model, x, reach=0.2)
    wide = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(float(torch.tensor(0.1, dtype=torch.float32))), nn.Linear(5, 3))
    wide = wide.double()
    wide.load_state_dict(model.state_dict())
    assert reading.proved
    other = clarke_bounds(wide, x.double(), reach=0.2)
    assert [b.upper for b in other.largest] == pytest.approx([b.upper for b in reading.largest], rel=1e-13)


@pytest.mark.parametrize("slope", [0.1, -1.5, 3.0])
def test_the_coarse_bounds_are_their_formulas(slope: float) -> None:
    model, x = net((4, 5, 4, 3), lambda: nn.LeakyReLU(slope)), inputs(2, 4)
    reading = clarke_bounds(model, x, reach=0.3)
    W = matrices(model)
    for i in range(2):
        product, moduli = np.linalg.norm(W[0], 2), np.abs(W[0])
        for (_, low, high), A in zip(reading.slopes.values(), W[1:], strict=True):
            most = np.maximum(np.abs(low[i]), np.abs(high[i]))
            product *= most.max() * np.linalg.norm(A, 2)
            moduli = np.abs(A) @ (most[:, None] * moduli)
        assert reading.product[i] == pytest.approx(product, rel=1e-10)
        assert reading.product[i] >= product * (1 - 1e-15)
        assert reading.absolute[i] == pytest.approx(np.linalg.norm(moduli, 2), rel=1e-10)
        assert reading.largest[i].upper <= reading.product[i]


# More units than can be enumerated.


def test_beyond_the_enumeration_the_largest_norm_is_enclosed() -> None:
    model, x = net((5, 7, 7, 3)), inputs(4, 5)
    exact = clarke_bounds(model, x, reach=0.6)
    coarse = clarke_bounds(model, x, reach=0.6, vertices=4, samples=4)
    assert exact.undecided.max() > 5
    for sharp, wide in zip(exact.largest, coarse.largest, strict=True):
        assert wide.proved
        assert wide.lower <= sharp.upper
        assert wide.upper >= sharp.lower
        assert wide.lower > 0.9 * sharp.lower  # the search finds what is near


# Any model.


class Plain(nn.Module):
    """The same function, but no chain."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1.0


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in {"in place", "negative", "relu6"}])
def test_a_model_that_is_opened_has_the_bounds_of_the_chain(name: str) -> None:
    model, x = net((4, 5, 4, 3), ACTIVATIONS[name]), inputs(2, 4)
    chain, other = clarke_bounds(model, x, reach=0.2), clarke_bounds(Plain(model), x, reach=0.2)
    assert not other.proved
    assert not any(b.proved for b in (*other.largest, *other.chosen))
    assert other.reason
    assert list(other.undecided) == list(chain.undecided)
    for a, b in zip(chain.largest, other.largest, strict=True):
        assert b.upper == pytest.approx(a.upper, rel=1e-11)
    assert other.interval == pytest.approx(chain.interval, rel=1e-11)
    assert {f"model.{k}": v for k, v in chain.kinks.items()} == other.kinks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.b(F.relu(self.a(x))))


def test_a_residual_block_with_a_function_has_all_its_vertices() -> None:
    torch.manual_seed(0)
    block, x = Block().double(), inputs(2, 3)
    reading = clarke_bounds(block, x, reach=0.5)
    A, B = block.a.weight.detach().numpy(), block.b.weight.detach().numpy()
    _, low, high = reading.slopes[""]
    for i in range(2):
        outer = 1 - block(x[i : i + 1]).detach().numpy()[0] ** 2
        sets = [sorted({a, b}) for a, b in zip(low[i], high[i], strict=True)]
        by_hand = max(
            np.linalg.norm(outer[:, None] * (np.eye(3) + B @ np.diag(d) @ A), 2) for d in itertools.product(*sets)
        )
        assert reading.largest[i].upper == pytest.approx(by_hand, rel=1e-11)
    assert reading.undecided.max() > 0


def test_kinks_that_are_not_opened_are_named() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.MaxPool1d(2), nn.ReLU(), nn.Flatten()).double()
    reading = clarke_bounds(model, torch.ones(1, 1, 5, dtype=torch.float64))
    assert "max_pool1d" in reading.left
    assert not reading.proved


def test_what_is_smooth_is_not_left() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ELU(), nn.Linear(2, 2), nn.ReLU(), nn.ELU(0.5)).double()
    reading = clarke_bounds(model, inputs(1, 2))
    assert reading.left == ("elu",)
    smooth = clarke_bounds(model[:4], inputs(1, 2))
    assert smooth.left == ()
    J = torch.autograd.functional.jacobian(lambda v: model[:4](v[None])[0], inputs(1, 2)[0])
    assert smooth.worst.upper == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-11)


def test_a_module_that_changes_what_another_returned_is_no_chain() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            z.mul_(2.0)
            return self.b(z)

    torch.manual_seed(0)
    model, x = Sneaky().double(), inputs(1, 3)
    reading = clarke_bounds(model, x)
    J = (2.0 * model.b.weight @ model.a.weight).detach()
    assert not reading.proved
    assert reading.worst.upper == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-11)


# What is refused.


def test_what_makes_no_sense_is_refused() -> None:
    model, x = net((2, 2)), inputs(1, 2)
    with pytest.raises(TypeError, match="floating"):
        clarke_bounds(model, torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch of samples"):
        clarke_bounds(model, x[0])
    for reach in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="reach"):
            clarke_bounds(model, x, reach=reach)
    with pytest.raises(ValueError, match="at least 1"):
        clarke_bounds(model, x, vertices=0)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        clarke_bounds(model, x)


def test_the_model_stays_as_it_is() -> None:
    model, x = net((3, 4, 2)), inputs(2, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    clarke_bounds(model, x, reach=0.3)
    clarke_bounds(Plain(model), x, reach=0.3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_reach_of_an_update_is_its_relative_size() -> None:
    w = torch.tensor([3.0, 4.0])
    assert update_reach([w], [w]) == 0.0
    assert update_reach([w, torch.zeros(1)], [2 * w, torch.zeros(1)]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="zero"):
        update_reach([torch.zeros(2)], [w])


def test_the_ends_are_bounds() -> None:
    reading = clarke_bounds(net((2, 3, 1)), inputs(3, 2), reach=0.3)
    assert isinstance(reading.worst, Bound)
    assert reading.worst.upper == max(b.upper for b in reading.largest)
    assert reading.taken.lower == max(b.lower for b in reading.chosen)
