"""Laws of the constants of margins in training: above what is proved, tight, differentiable, equivariant, refused where unknown."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    SLL,
    AveragedResidual,
    GroupSort,
    MarginBounds,
    Scale,
    UnitRowLinear,
    lipschitz,
    margin_constants,
    stabilize,
)
from stableopt.nn.losses import bounds as module
from stableopt.nn.losses.bounds import pair_norms

DUALS = {"l2": 2.0, "linf": 1.0, "l1": math.inf}


def plain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), GroupSort(2), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


@settings(max_examples=30)
@given(
    C=st.integers(1, 5), n=st.integers(1, 9), p=st.sampled_from([1.0, 2.0, math.inf]), log=st.integers(-6, 6), close=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pair_norms_are_above_the_exact_ones_and_tight(
    C: int, n: int, p: float, log: int, close: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    W = torch.randn(1, n) + 1e-5 * torch.randn(C, n) if close else torch.randn(C, n)
    for dtype in (torch.float64, torch.float32):
        rows = (10.0**log * W).to(dtype)
        exact = torch.linalg.vector_norm(rows.double()[:, None] - rows.double()[None], ord=p, dim=2)
        found = pair_norms(rows, p)
        assert found.dtype == dtype
        assert bool((found.double() >= exact * (1 - 1e-15 * (dtype is torch.float64))).all())
        eps, size = torch.finfo(dtype).eps, float(exact.max())
        assert bool((found.double() <= exact * (1 + 3 * (n + 8) * eps) + 1e-17 * size).all())
        assert not found.diagonal().any()


def test_many_rows_take_another_way_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, p in itertools.product((torch.float64, torch.float32), DUALS.values()):
        rows = torch.randn(6, 4, dtype=dtype)
        rows[3] = rows[1]
        direct = pair_norms(rows, p)
        monkeypatch.setattr(module, "_DIRECT", 1)
        other = pair_norms(rows, p)
        monkeypatch.undo()
        torch.testing.assert_close(other, direct, rtol=1e-4 if dtype is torch.float32 else 1e-12, atol=0.0)
        exact = torch.linalg.vector_norm(rows.double()[:, None] - rows.double()[None], ord=p, dim=2)
        assert bool((other.double() >= exact * (1 - 1e-15)).all())
        assert float(other[1, 3]) == float(direct[1, 3]) == 0.0


@pytest.mark.parametrize("k", [-60, 10, 60])
def test_pair_norms_scale_exactly_and_do_not_vanish_for_small_weights(k: int) -> None:
    rows = torch.randn(4, 3, dtype=torch.float32)
    for p in DUALS.values():
        assert torch.equal(pair_norms(rows * 2.0**k, p), pair_norms(rows, p) * 2.0**k)
        assert bool((pair_norms(rows * 1e-30, p) + torch.eye(4) > 0).all())  # squares of these are 0 in float32


def test_rows_that_are_almost_equal_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1e-30, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float32)
    close = (
        1.0 + 2.0**-23 * torch.randint(0, 4, (5, 3)).float()
    )  # dividing by the largest would round these differences away
    for p, W, direct in itertools.product(DUALS.values(), (rows, close, 1.0 / 3.0 * close), (module._DIRECT, 1)):
        monkeypatch.setattr(module, "_DIRECT", direct)
        exact = torch.linalg.vector_norm(W.double()[:, None] - W.double()[None], ord=p, dim=2)
        found = pair_norms(W, p).double()
        assert bool((found >= exact).all())
        assert not found[exact == 0].any()


def test_equal_rows_have_no_gradient_and_the_others_have_theirs() -> None:
    W = torch.randn(4, 3)
    W[2] = W[0]
    W.requires_grad_(True)
    for p in (1.0, 2.0):
        K = pair_norms(W, p)
        (g,) = torch.autograd.grad(K[0, 2] + K[1, 1], W, retain_graph=True)
        assert not g.any()
        (g,) = torch.autograd.grad(K.sum(), W, create_graph=True)
        assert g.isfinite().all()
        (h,) = torch.autograd.grad(g.square().sum(), W, allow_unused=True)
        assert h is None or h.isfinite().all()


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_they_are_above_what_is_proved_and_not_by_much(norm: str, dtype: torch.dtype) -> None:
    model = plain(dtype)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    proved = margin_constants(head.weight, norm) * lipschitz(model[:-1], norm).upper
    found = MarginBounds(model, norm)(3)
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert bool((found.double() >= proved * (1 - 1e-13)).all())
    assert bool((found.double() <= proved * 1.06).all())


def test_they_bound_what_margins_do() -> None:
    for norm in DUALS:
        model = plain()
        K = MarginBounds(model, norm)(3)
        x, y = torch.randn(200, 5), torch.randn(200, 5)
        moved = torch.linalg.vector_norm(x - y, ord={"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm], dim=1)
        dz = model(x) - model(y)
        steepest = (dz[:, :, None] - dz[:, None]).abs().amax(2) / moved[:, None]
        assert bool((steepest <= K.amax(1)).all())


def test_a_linear_model_attains_them() -> None:
    head = nn.Linear(4, 3, bias=False)
    for norm, best in (("l2", lambda w: w / w.norm()), ("linf", torch.sign)):
        K, rows = MarginBounds(head, norm)(3).detach(), head.weight.detach()
        w = rows[0] - rows[2]
        assert float(w @ best(w)) == pytest.approx(float(K[0, 2]), rel=1e-12)


def test_heads_that_are_not_dense_have_the_constant_of_the_model() -> None:
    body = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    for norm, factor in (("l2", math.sqrt(2)), ("linf", 2.0), ("l1", 1.0)):
        K = MarginBounds(body, norm)(3).detach()
        L = float(MarginBounds(nn.Sequential(body, nn.Identity(), nn.Flatten()), norm)(3).detach()[0, 1]) / factor
        assert not K.diagonal().any()
        assert lipschitz(body, norm).upper <= L
        torch.testing.assert_close(K[0, 1], torch.tensor(factor * L))
    head = UnitRowLinear(4, 3)
    K = MarginBounds(nn.Sequential(head, Scale(-0.5), nn.Identity()))(3)
    torch.testing.assert_close(K, 0.5 * margin_constants(head.unit_weight()))


def test_a_limited_model_has_its_limits_and_a_branch_the_constant_of_its_parts() -> None:
    model = stabilize(plain(), 2.0, method="gram")
    K = MarginBounds(model)(3)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(K, 2.0 ** (2 / 3) * margin_constants(head.weight))
    residual = AveragedResidual(nn.Sequential(nn.Linear(6, 6), GroupSort()))
    branched = stabilize(nn.Sequential(nn.Linear(5, 6), residual, nn.Linear(6, 3)), 1.0, method="gram")
    head = branched[-1]
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(MarginBounds(branched)(3), margin_constants(head.weight))


def test_layers_that_are_proved_anew_follow_their_weights() -> None:
    model = nn.Sequential(nn.PReLU(), SLL(4), nn.Linear(4, 3))
    bounds = MarginBounds(model)
    K = bounds(3)
    with torch.no_grad():
        next(model[0].parameters()).fill_(3.0)
    torch.testing.assert_close(bounds(3), 3.0 * K)


def test_a_learned_budget_is_trained_through_them() -> None:
    model = stabilize(plain(), 2.0, budget="learned", method="gram")
    MarginBounds(model)(3).sum().backward()
    assert any("shares" in name and p.grad is not None for name, p in model.named_parameters())


def test_a_replaced_layer_is_noticed() -> None:
    model = plain()
    bounds = MarginBounds(model)
    before = bounds(3)
    model[1] = Scale(2.0)
    torch.testing.assert_close(bounds(3), 2.0 * before)
    model[1] = nn.Threshold(0.0, 5.0)
    with pytest.raises(UncertifiableError, match="at '1'"):
        bounds(3)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, norm: str) -> None:
        super().__init__()
        self.model, self.bounds = model, MarginBounds(model, norm)

    def forward(self) -> Tensor:
        return self.bounds(3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_gradients_are_right(norm: str) -> None:
    wrapped = Wrapped(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), norm)
    names = ("model.0.weight", "model.2.weight")
    weights = tuple(wrapped.get_parameter(name).detach().requires_grad_(True) for name in names)
    assert torch.autograd.gradcheck(
        lambda *w: torch.func.functional_call(wrapped, dict(zip(names, w, strict=True)), ()), weights
    )


def test_radii_are_zero_at_ties_and_for_wrong_labels() -> None:
    head = nn.Linear(2, 3)
    bounds = MarginBounds(head)
    z = torch.tensor([[2.0, 2.0, 0.0], [2.0, 1.0, 0.0], [math.nan, 1.0, 0.0]])
    r = bounds.radii(z)
    assert float(r[0]) == float(r[2]) == 0.0
    assert float(r[1]) > 0.0
    assert float(bounds.radii(z, torch.tensor([1, 1, 1])).sum()) == 0.0


def test_what_has_no_constant_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got int"):
        MarginBounds(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm must be 'l2', 'linf', 'l1' or 'token_max', got 'l3'"):
        MarginBounds(plain(), "l3")
    with pytest.raises(UncertifiableError, match=r"at '1': .*Threshold"):
        MarginBounds(nn.Sequential(nn.Linear(2, 2), nn.Threshold(0.0, 5.0)))
    with pytest.raises(UncertifiableError, match="in an order that only its forward knows"):
        MarginBounds(nn.TransformerEncoderLayer(4, 2))
    hooked = plain()
    hooked[4].register_forward_hook(lambda *_: None)
    with pytest.raises(UncertifiableError, match="forward hook"):
        MarginBounds(hooked)
    with pytest.raises(ValueError, match="the head of the model has 3 outputs, got logits of 4 classes"):
        MarginBounds(plain())(4)
