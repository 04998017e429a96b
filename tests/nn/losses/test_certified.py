"""Laws of the losses with proved constants: the formula, what a small loss certifies, the worst case, scales, gradients."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    CertificateRegularizer,
    CertifiedMarginLoss,
    GloRoLoss,
    GroupSort,
    HKRLoss,
    KRLoss,
    MarginBounds,
    stabilize,
)

MAKE: dict[str, Callable[..., nn.Module]] = {
    "certified": CertifiedMarginLoss,
    "adaptive": lambda *a, **k: CertifiedMarginLoss(*a, adaptive=True, **k),
    "gloro": GloRoLoss,
    "regularizer": CertificateRegularizer,
    "correct only": lambda *a, **k: CertificateRegularizer(*a, correct_only=True, **k),
}
LOSSES = pytest.mark.parametrize("name", MAKE)
CROSS_ENTROPIES = pytest.mark.parametrize("name", ["certified", "adaptive", "gloro"])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), GroupSort(2), nn.Linear(6, 3))


def literal(name: str, z: list[float], y: int, K: list[float], eps: float, t: float) -> float:
    """The formulas, one logit at a time."""
    others = [j for j in range(len(z)) if j != y]
    if name in {"regularizer", "correct only"}:
        r = min((z[y] - z[j]) / K[j] for j in others)
        return max(0.0, 1.0 - (max(0.0, r) if name == "correct only" else r) / eps)
    if name == "gloro":
        logits = [*z, max(z[j] + eps * K[j] for j in others)]
    elif name == "certified":
        logits = [v if j == y else v + eps * K[j] for j, v in enumerate(z)]
    else:
        logits = [v if j == y else v + min(eps * K[j], max(0.0, z[y] - v)) for j, v in enumerate(z)]
    top = max(logits)
    return (math.log(sum(math.exp(t * (v - top)) for v in logits)) - t * (z[y] - top)) / t


@settings(max_examples=20)
@given(
    name=st.sampled_from(list(MAKE)),
    norm=st.sampled_from(["l2", "linf", "l1"]),
    eps=st.floats(0.01, 2),
    seed=st.integers(0, 99),
)
def test_they_are_the_formulas(name: str, norm: str, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, z, y = net(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    K = MarginBounds(model, norm)(3).tolist()
    more = {} if name in {"regularizer", "correct only"} else {"temperature": 3.0}
    found = MAKE[name](model, eps, norm, reduction="none", **more)(z, y)
    expected = [
        literal(name, row, label, K[label], eps, 3.0) for row, label in zip(z.tolist(), y.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("limited", [False, True])
@CROSS_ENTROPIES
def test_a_loss_below_the_logarithm_of_two_certifies(name: str, norm: str, limited: bool) -> None:
    model = net()
    if limited:
        stabilize(model, 1.0, norm=norm)  # type: ignore[arg-type]
    model.eval()
    x = 4.0 * torch.randn(300, 5)
    z, eps = model(x), 0.05
    y = z.argmax(1)
    loss = MAKE[name](model, eps, norm, temperature=2.0, reduction="none")
    small = loss(z, y) < math.log(2) / 2.0
    radii = loss.bounds.radii(z, y)  # type: ignore[union-attr]
    assert 20 < int(small.sum()) < 290
    assert bool((radii[small] > eps).all())
    assert torch.equal(loss.certified(z, y), radii > eps)  # type: ignore[operator]
    if name == "gloro":  # the converse fails by the other logits alone: z_y > z_bot gives at least 1/(C + 1)
        assert bool((loss(z, y)[radii > eps] < math.log(4) / 2.0).all())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_perturbation_exceeds_the_certified_loss(norm: str) -> None:
    model, eps, t = net(), 0.3, 5.0
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    bound = CertifiedMarginLoss(model, eps, norm, temperature=t, reduction="none")(model(x), y)
    d = torch.zeros_like(x, requires_grad=True)
    worst = F.cross_entropy(t * model(x), y, reduction="none") / t
    for _ in range(30):  # projected gradient ascent
        (g,) = torch.autograd.grad(F.cross_entropy(t * model(x + d), y, reduction="sum"), d)
        step = g.sign() if norm == "linf" else F.normalize(g)
        moved = d.detach() + 0.1 * eps * step
        size = moved.abs().amax(1, keepdim=True) if norm == "linf" else moved.norm(dim=1, keepdim=True)
        d = (moved * (eps / size.clamp_min(eps))).requires_grad_(True)
        worst = torch.maximum(worst, F.cross_entropy(t * model(x + d), y, reduction="none").detach() / t)
    assert bool((worst <= bound).all())
    head = nn.Linear(5, 2)  # two classes and a linear map: the worst point is on the normal, and attains it
    w = (head.weight[1] - head.weight[0]).detach()
    away = eps * (w.sign() if norm == "linf" else w / w.norm())
    y = torch.zeros(20, dtype=torch.int64)
    bound = CertifiedMarginLoss(head, eps, norm, temperature=t)(head(x), y)
    torch.testing.assert_close(bound, F.cross_entropy(t * head(x + away), y) / t)


@CROSS_ENTROPIES
def test_a_tie_is_never_certified(name: str) -> None:
    head = nn.Linear(2, 3, bias=False)
    z, y = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -9.0]]), torch.tensor([0, 0])
    loss = MAKE[name](head, 0.0, reduction="none")
    assert not loss.certified(z, y).any()  # type: ignore[operator]
    assert bool((loss(z, y) >= math.log(2) * (1 - 1e-15)).all())
    with torch.no_grad():
        head.weight[1] = head.weight[0]  # a constant of 0 does not help
    assert not loss.certified(z, y).any()  # type: ignore[operator]
    assert bool((loss(z, y) >= math.log(2) * (1 - 1e-15)).all())


def test_exactly_at_the_radius_nothing_is_certified() -> None:
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    loss, y = GloRoLoss(head, 1.0, reduction="none"), torch.tensor([0])
    for x, holds in ((1.0, False), (1.0 - 1e-9, False), (1.0 + 1e-9, True)):
        z = head(torch.tensor([[x]]))
        assert loss.certified(z, y).tolist() == [holds]
    z, head = head(torch.tensor([[1.0]])).detach(), head.requires_grad_(False)
    assert float(CertificateRegularizer(head, 1.0)(z, y)) == pytest.approx(0.0, abs=1e-12)
    assert float(CertificateRegularizer(head, 1.0)(0.99 * z, y)) == pytest.approx(0.01)


@pytest.mark.parametrize("k", [-40, 7, 40])
def test_scaling_the_weights_scales_the_loss(k: int) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), GroupSort(2), nn.Linear(6, 3)).float()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[2].weight.mul_(2.0**k)
        scaled[2].bias.mul_(2.0**k)
    x, y = torch.randn(8, 5, dtype=torch.float32), torch.randint(0, 3, (8,))
    for name in ("certified", "adaptive", "gloro"):
        small = MAKE[name](model, 0.2, temperature=2.0)(model(x), y)
        large = MAKE[name](scaled, 0.2, temperature=2.0 * 2.0**-k)(scaled(x), y)
        torch.testing.assert_close(large, small * 2.0**k, rtol=1e-6, atol=0.0)
    penalty = CertificateRegularizer(model, 0.2)(model(x), y)
    assert torch.equal(CertificateRegularizer(scaled, 0.2)(scaled(x), y), penalty)
    inputs = nn.Sequential(nn.Linear(5, 6, bias=False).float(), *model[1:])
    with torch.no_grad():
        inputs[0].weight.copy_(model[0].weight * 2.0**k)  # type: ignore[operator]
    shrunk = CertifiedMarginLoss(inputs, 0.2 * 2.0**-k, temperature=2.0)(inputs(x * 2.0**-k), y)
    torch.testing.assert_close(
        shrunk, CertifiedMarginLoss(model, 0.2, temperature=2.0)(model(x), y), rtol=1e-5, atol=1e-6
    )


def test_without_a_radius_they_are_cross_entropy() -> None:
    model, z, y = net().requires_grad_(False), torch.randn(6, 3), torch.randint(0, 3, (6,))
    torch.testing.assert_close(CertifiedMarginLoss(model, 0.0)(z, y), F.cross_entropy(z, y))
    rising = [float(CertifiedMarginLoss(model, eps)(z, y)) for eps in (0.0, 0.1, 0.2, 0.4)]
    assert rising == sorted(rising)


class Wrapped(nn.Module):
    """The loss of a model as a function of the weights of the model."""

    def __init__(self, model: nn.Module, make: Callable[..., nn.Module], norm: str) -> None:
        super().__init__()
        self.model, self.loss = model, make(model, 0.4, norm)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model(x), y)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["certified", "gloro", "regularizer", "correct only"])
def test_the_gradients_reach_the_weights_and_are_right(name: str, norm: str) -> None:
    torch.manual_seed(1)
    wrapped = Wrapped(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), MAKE[name], norm)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 1])
    names = ("model.0.weight", "model.2.weight")
    weights = tuple(wrapped.get_parameter(n).detach().requires_grad_(True) for n in names)
    assert torch.autograd.gradcheck(
        lambda *w: torch.func.functional_call(wrapped, dict(zip(names, w, strict=True)), (x, y)), weights
    )


def test_the_adaptive_shift_is_a_constant_times_the_bound() -> None:
    head, y = nn.Linear(1, 2, bias=False), torch.tensor([0])
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    z = head(torch.tensor([[0.5]])).detach()  # margin 1, constant 2: at radius 2 the shift is cut to a quarter
    loss = CertifiedMarginLoss(head, 2.0, adaptive=True)
    (g,) = torch.autograd.grad(loss(z, y), head.weight)
    K = MarginBounds(head)(2)[0, 1]
    (expected,) = torch.autograd.grad(K, head.weight)
    torch.testing.assert_close(g, 0.5 * 0.5 * expected)  # softmax 1/2 times the radius 1/2
    torch.testing.assert_close(loss(z, y), torch.tensor(math.log(2)))


@CROSS_ENTROPIES
def test_the_gradient_is_bounded_for_huge_logits(name: str) -> None:
    model = net().requires_grad_(False)
    for dtype, size in ((torch.float32, 1e38), (torch.float64, 1e307), (torch.float16, 6e4)):
        z = torch.tensor([[size, -size, 0.0], [-size, size, 1.0]], dtype=dtype, requires_grad=True)
        MAKE[name](model, 0.1, temperature=16.0, reduction="sum")(z, torch.tensor([0, 0])).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert float(z.grad.abs().sum()) <= 4 + 1e-3


@LOSSES
def test_a_head_of_zeros_has_finite_gradients(name: str) -> None:
    model = net()
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[2].bias)  # type: ignore[arg-type]
    loss = MAKE[name](model, 0.5)(model(torch.randn(4, 5)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@LOSSES
def test_reductions_half_precision_and_compilation(name: str) -> None:
    model, z, y = (
        stabilize(net(), 1.0, method="gram").float(),
        torch.randn(4, 3, dtype=torch.float32),
        torch.tensor([0, 1, 2, 0]),
    )
    make = MAKE[name]
    each = make(model, 0.3, reduction="none")(z, y)
    assert each.shape == (4,)
    torch.testing.assert_close(make(model, 0.3)(z, y), each.mean())
    torch.testing.assert_close(make(model, 0.3, reduction="sum")(z, y), each.sum())
    for half in (torch.float16, torch.bfloat16):
        found = make(copy.deepcopy(model).to(half), 0.3)(z.to(half), y)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, each.mean(), rtol=0.05, atol=0.05)
    loss = make(model, 0.3)
    torch.testing.assert_close(loss(z, y.int()), each.mean())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(z, y), each.mean())
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(z, y), each.mean())


@LOSSES
def test_the_loss_owns_no_parameters_and_survives_copies(name: str) -> None:
    model, z, y = net(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = MAKE[name](model, 0.3)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    torch.testing.assert_close(copy.deepcopy(loss)(z, y), loss(z, y))
    torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(z, y), loss(z, y))
    assert "eps=0.3, norm=l2" in str(loss)


def test_a_radius_can_be_given_for_each_call_and_for_each_sample() -> None:
    model, z, y = net(), torch.randn(3, 3), torch.tensor([0, 1, 2])
    for make in (CertifiedMarginLoss, GloRoLoss):
        loss = make(model, 0.3, reduction="none")
        radii = torch.tensor([0.0, 0.1, 0.7])
        expected = torch.stack([make(model, float(r), reduction="none")(z, y)[i] for i, r in enumerate(radii)])
        torch.testing.assert_close(loss(z, y, radii), expected)
        torch.testing.assert_close(loss(z, y, eps=0.7)[2], expected[2])
        torch.testing.assert_close(loss(z, y, torch.tensor(0.7))[2], expected[2])
        with pytest.raises(ValueError, match=r"eps must be a number or have the shape \(3,\), got \(2,\)"):
            loss(z, y, torch.zeros(2))
        with pytest.raises(ValueError, match=r"eps must be at least 0 and finite, got -1\.0"):
            loss(z, y, -1.0)
    torch.testing.assert_close(CertificateRegularizer(model, 0.3)(z, y, 0.5), CertificateRegularizer(model, 0.5)(z, y))
    with pytest.raises(ValueError, match=r"eps must be positive and finite, got 0\.0"):
        CertificateRegularizer(model, 0.3)(z, y, 0.0)


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    model, z, y = net(), torch.randn(3, 3), torch.tensor([0, 1, 2])
    for bad in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps must be at least 0 and finite"):
            GloRoLoss(model, bad)
        with pytest.raises(ValueError, match="eps must be positive and finite"):
            CertificateRegularizer(model, bad)
    with pytest.raises(ValueError, match="eps must be positive"):
        CertificateRegularizer(model, 0.0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            CertifiedMarginLoss(model, 0.1, temperature=bad)
    with pytest.raises(ValueError, match="reduction must be"):
        GloRoLoss(model, 0.1, reduction="some")
    with pytest.raises(UncertifiableError, match="Threshold"):
        GloRoLoss(nn.Sequential(nn.Threshold(0.0, 5.0)), 0.1)
    loss = GloRoLoss(model, 0.1)
    with pytest.raises(ValueError, match="GloRoLoss needs logits of shape"):
        loss(z[0], y)
    with pytest.raises(TypeError, match="integer class labels"):
        loss(z, y.double())
    with pytest.raises(ValueError, match="labels from 0 to 7"):
        loss(z, torch.tensor([0, 7, 1]))


@LOSSES
def test_training_with_them_enlarges_the_radii(name: str) -> None:
    torch.manual_seed(0)
    centers = 2.0 * torch.eye(3, 5)
    y = torch.arange(90) % 3
    x = centers[y] + 0.2 * torch.randn(90, 5)
    model = stabilize(net(), 1.0, method="gram")
    loss = MAKE[name](model, 0.8, **({} if "r" in name[:1] or name == "correct only" else {"temperature": 8.0}))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.04)
    medians = []
    for _ in range(40):
        z = model(x)
        medians.append(float(loss.bounds.radii(z.detach(), y).median()))  # type: ignore[union-attr]
        optimizer.zero_grad()
        value = loss(z, y)
        (value if name != "correct only" else value + F.cross_entropy(8.0 * z, y) / 8.0).backward()
        optimizer.step()
    assert medians[-1] > max(0.6, medians[0])


@pytest.mark.parametrize(
    "make",
    [
        HKRLoss,
        KRLoss,
        lambda: GloRoLoss(nn.Linear(2, 3), 0.1),
        lambda: CertifiedMarginLoss(nn.Linear(2, 3), 0.1),
    ],
)
def test_what_is_no_batch_of_numbers_is_a_type_error(make) -> None:
    for logits, target, words in (
        (torch.zeros(2, 3), [0, 1], "needs labels in a tensor, got list"),
        ([[0.0]], torch.tensor([0]), "needs logits in a tensor, got list"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), "logits of a floating dtype, got torch.int64"),
    ):
        with pytest.raises(TypeError, match=words):
            make()(logits, target)


@pytest.mark.parametrize("eps", ["0.1", None, True, [0.1]], ids=repr)
def test_a_radius_that_is_no_number_is_a_type_error(eps) -> None:
    with pytest.raises(TypeError, match="eps must be a number, got"):
        GloRoLoss(nn.Linear(2, 3), eps)
    with pytest.raises(TypeError, match="alpha must be a number, got"):
        HKRLoss(eps)
