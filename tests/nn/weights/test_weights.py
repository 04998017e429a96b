"""Laws of every weight map, whatever its method: the catalogue takes the methods from ``METHODS``."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.nn.budget import Budgeted, LearnedBudget
from stableopt.nn.weights import METHODS, NORMS, Geometry
from stableopt.nn.weights.isometry import round_by_arithmetic
from tests.nn.weights.catalogue import (
    DTYPES,
    Case,
    cases,
    close,
    few,
    map_of,
    operator_norm,
    originals,
    proved,
    scale_originals,
    set_originals,
)

every_case = pytest.mark.parametrize("case", cases(), ids=str)
one_each = pytest.mark.parametrize("case", few(), ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
EXACT_INVERSES = {"power", "gram", "frobenius", "schur", "rowsum", "bro", "cholesky", "bjorck"}
ESTIMATED = 1.05
"""What a norm in training may be over the radius for a method that trains with an estimate, once it has settled."""


def weight(layer: nn.Module) -> Tensor:
    with torch.no_grad():
        return layer.weight.detach().clone()


def excused(case: Case, error: Exception) -> None:
    """Skip the rest for the Gram bound of larger kernels, which asks torch for the non-zero entries of a tensor without numbers."""
    if case.method == "gram" and "nonzero" in str(error):
        pytest.xfail("gram_conv_norm has no path for the meta device")
    raise error


def test_every_method_supports_something_and_says_which_norms() -> None:
    for method, kind in METHODS.items():
        norms = {case.norm for case in cases() if case.method == method}
        assert norms == kind.norms, method
        assert norms <= set(NORMS)
        assert kind.name == method


def test_what_a_method_cannot_limit_is_refused_with_a_sentence() -> None:
    for method, kind in METHODS.items():
        for norm in set(NORMS) - kind.norms:
            with pytest.raises(ValueError, match=norm):
                kind(Geometry("linear"), 1.0, norm)
        for radius in (0.0, -1.0, math.nan, math.inf, True):
            case = next(case for case in cases() if case.method == method)
            with pytest.raises(ValueError, match="radius"):
                kind(Geometry.of(case.plain()), radius, case.norm)
        with pytest.raises(TypeError):
            kind("linear")


# The limit.


@given(
    case=st.sampled_from(cases()),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 12),
    radius=st.sampled_from([0.3, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
)
def test_in_evaluation_the_stored_numbers_are_proved_within_the_radius(
    case: Case, dtype: torch.dtype, exponent: int, radius: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = case.limited(radius, dtype)
    for original in originals(layer):
        original.data.copy_(torch.randn(original.shape) * 2.0**exponent)
    layer.eval()
    assert proved(layer) <= radius
    assert layer.weight.dtype == dtype
    assert layer.weight.is_contiguous()
    assert layer.weight.shape == case.plain().weight.shape


@given(
    method=st.sampled_from(sorted({c.method for c in cases() if c.layer.startswith("linear") and c.norm == "l2"})),
    dtype=st.sampled_from(DTYPES),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_matrices_of_every_shape_and_rank_are_proved_within_the_radius(
    method: str, dtype: torch.dtype, m: int, n: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    limit = METHODS[method](Geometry("linear"), 1.0)
    W = torch.randn(m, n) if not rank else torch.randn(m, rank) @ torch.randn(rank, n)
    V = limit.right_inverse(W.to(dtype))
    limit.eval()
    assert limit.geometry.proved(limit(V)).upper <= 1.0


@every_case
def test_the_layer_applied_to_images_never_exceeds_the_radius_either(case: Case) -> None:
    layer = case.limited(0.7).eval()
    if case.norm == "l2":
        assert operator_norm(layer) <= 0.7 * (1 + 1e-12)
    else:
        assert proved(layer) <= 0.7


@every_case
def test_train_and_evaluation_agree_bit_for_bit_where_the_limit_holds_by_construction(case: Case) -> None:
    layer = case.limited()
    if case.by_construction:
        assert torch.equal(weight(layer.train()), weight(layer.eval()))
        assert proved(layer.train()) <= 1.0
    else:
        for _ in range(30):
            trained = weight(layer.train())
        assert proved(layer, trained) <= ESTIMATED
        assert close(trained / trained.norm(), weight(layer.eval()) / weight(layer.eval()).norm())


@every_case
def test_the_result_does_not_depend_on_what_was_computed_before(case: Case) -> None:
    layer = case.limited()
    expected = weight(layer.eval())
    start = [p.detach().clone() for p in originals(layer)]
    for mode in (True, False, True):
        layer.train(mode)
        scale_originals(layer, -7.0)
        layer.weight.sum().backward()
    with torch.no_grad():
        for original, value in zip(originals(layer), start, strict=True):
            original.data = value.clone()  # which no version counter sees
    assert torch.equal(weight(layer.eval()), expected)


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_jump_of_the_weight_is_followed_at_once(case: Case, training: bool) -> None:
    layer = case.limited(weight=0.1 * torch.randn(case.plain().weight.shape)).train(training)
    for _ in range(5):
        weight(layer)
    allowed = 1.0 if case.by_construction or not training else ESTIMATED
    scale_originals(layer, 1000.0)
    assert proved(layer) <= allowed
    for original in originals(layer):  # the jump that power iteration does not survive
        flat = original.data.flatten(1)
        flat.copy_(
            0.1 * torch.randn(flat.shape) + 5.0 * torch.outer(torch.randn(len(flat)), torch.randn(flat.shape[1]))
        )
        original.data = flat.view(original.shape)
    assert proved(layer) <= allowed


@every_case
@pytest.mark.parametrize("scale", [1e-4, 1e8])
def test_the_scale_of_the_original_loses_no_signal(case: Case, scale: float) -> None:
    """An original that is mapped to its limit whatever its size stays there; a limit that lets small weights be keeps them."""
    layer = case.limited().eval()
    before = weight(layer)
    W = torch.randn(before.shape) * scale
    layer.weight = W
    after = weight(layer)
    assert proved(layer) <= 1.0
    if scale < 1.0:
        kept = close(after / scale, W / scale)
        assert kept or proved(layer) >= 0.3 * proved(layer, before)
    else:
        assert proved(layer) >= 0.3 * proved(layer, before)


@one_each
@every_dtype
def test_a_zero_weight_gives_finite_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    layer = case.limited(dtype=dtype)
    set_originals(layer, 0.0)
    for mode in (True, False):
        layer.train(mode)
        layer.zero_grad()
        W = layer.weight
        assert bool(W.isfinite().all())
        assert proved(layer) <= 1.0
        (W * torch.randn(W.shape).to(dtype)).sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in originals(layer))
    layer.weight = torch.zeros_like(W)
    assert proved(layer.eval()) <= 1.0


@one_each
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_is_no_number_never_becomes_one(case: Case, bad: float, training: bool) -> None:
    layer = case.limited().train(training)
    for original in originals(layer):
        original.data.view(-1)[-1] = bad
    message = ""
    try:
        W = weight(layer)
    except (ValueError, torch.linalg.LinAlgError) as error:
        message = str(error)
    if message:
        assert "NaN" in message or "finite" in message or "converge" in message
    else:
        assert not bool(W.isfinite().all())


# Gradients.


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_original_gets_a_gradient_in_every_entry(case: Case, training: bool) -> None:
    layer = case.limited().train(training)
    W = layer.weight
    (W * torch.randn(W.shape)).sum().backward()
    assert originals(layer)
    for original in originals(layer):
        assert original.grad.shape == original.shape
        assert bool(original.grad.isfinite().all())
        assert original.grad.abs().amax() > 0.0
        if case.by_construction:
            continue
        assert bool((original.grad != 0.0).all())


@one_each
def test_gradients_are_the_derivatives(case: Case) -> None:
    """Along a random line, against central differences; an estimate is differentiated once its vectors have settled."""
    for training in (True, False):
        layer = case.limited(0.5).train(training)
        for _ in range(0 if case.by_construction else 60):
            weight(layer)
        W = layer.weight
        C, h = torch.randn(W.shape), 1e-6
        (W * C).sum().backward()
        lines = [torch.randn(p.shape) for p in originals(layer)]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(originals(layer), lines, strict=True))
        values = []
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(layer)
            with torch.no_grad():
                for original, d in zip(originals(moved), lines, strict=True):
                    original.add_(sign * h * d)
            for _ in range(1 if case.by_construction or not training else 60):
                value = float((weight(moved) * C).sum())
            values.append(value)
        numeric = (values[0] - values[1]) / (2.0 * h)
        # in evaluation an estimated norm is differentiated at its vectors, and the proved one has its own rounding
        tolerance = 1e-5 if case.by_construction else 2e-3
        assert abs(slope - numeric) <= tolerance * (
            1.0 + abs(slope) + sum(float(p.grad.norm()) for p in originals(layer))
        )


@one_each
def test_two_forward_maps_before_one_backward_pass(case: Case) -> None:
    layer = case.limited()
    size = 7 if layer.weight.ndim == 2 else 5
    x = torch.randn(2, layer.in_features) if isinstance(layer, nn.Linear) else None
    x = torch.randn(2, layer.in_channels, *(size,) * (layer.weight.ndim - 2)) if x is None else x
    (layer(x).sum() + layer(2.0 * x).square().sum()).backward()
    both = [p.grad.clone() for p in originals(layer)]
    layer.zero_grad()
    layer(x).sum().backward()
    layer(2.0 * x).square().sum().backward()
    for p, g in zip(originals(layer), both, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6 if case.by_construction else 1e-2, atol=1e-7)


# The inverse.


@every_case
def test_assigning_a_weight_within_reach_gives_it_back(case: Case) -> None:
    """What the map produces is in its range. Some inverses are approximate, as their docstrings say."""
    layer = case.limited(0.8).eval()
    W = weight(layer)
    layer.weight = W
    after = weight(layer)
    assert proved(layer) <= 0.8
    if case.method in EXACT_INVERSES:
        assert close(after, W, factor=1e6)
    assert float((after * W).sum()) >= 0.5 * float(after.norm() * W.norm())


@one_each
def test_a_small_weight_is_kept_where_the_set_is_a_ball(case: Case) -> None:
    layer = case.limited().eval()
    W = 1e-3 * torch.randn(layer.weight.shape)
    layer.weight = W
    after = weight(layer)
    if not torch.equal(after, W):  # then the method only reaches weights of norm close to the radius
        assert proved(layer) > 0.2
        assert not close(after, W)


@every_case
def test_far_weights_are_moved_within_the_radius(case: Case) -> None:
    layer = case.limited().eval()
    W = 30.0 * torch.randn(layer.weight.shape)
    layer.weight = W
    assert proved(layer) <= 1.0
    assert float((weight(layer) * W).sum()) > 0.0


# Mechanics.


@one_each
def test_copies_and_saved_states_compute_the_same_bits(case: Case) -> None:
    layer = case.limited()
    weight(layer)
    expected = weight(layer.eval())
    twin = copy.deepcopy(layer)
    assert torch.equal(weight(twin), expected)
    scale_originals(twin, -3.0)
    assert torch.equal(weight(layer), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = case.limited().eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(weight(fresh), expected)
    trained = weight(copy.deepcopy(layer).train())
    assert torch.equal(weight(fresh.train()), trained)  # the state of a training is saved as well


@one_each
def test_a_whole_map_can_be_pickled(case: Case) -> None:
    layer = case.limited().eval()
    weight(layer)
    buffer = io.BytesIO()
    torch.save(map_of(layer), buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    originals_ = [p.detach() for p in originals(layer)]
    assert torch.equal(twin(*originals_), weight(layer))


@one_each
@pytest.mark.parametrize("first", [True, False], ids=["empty first", "registered on meta"])
def test_the_meta_device_then_numbers(case: Case, first: bool) -> None:
    source = case.limited()
    if first:
        layer = copy.deepcopy(source).to("meta")
    else:
        layer = case.plain().to("meta")
        try:
            P.register_parametrization(layer, "weight", case.map())
        except NotImplementedError as error:
            excused(case, error)
    try:
        assert layer.weight.is_meta
    except NotImplementedError as error:
        excused(case, error)
    assert layer.weight.shape == source.weight.shape
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(math.nan)  # what to_empty leaves may be anything
    layer.load_state_dict(source.state_dict())
    assert torch.equal(weight(layer.eval()), weight(source.eval()))
    assert proved(layer.train()) <= (1.0 if case.by_construction else ESTIMATED)


@one_each
def test_memory_without_values_needs_only_new_originals(case: Case) -> None:
    layer = copy.deepcopy(case.limited()).to("meta").to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(math.nan)
    for original in originals(layer):
        original.data.copy_(torch.randn(original.shape))
    assert proved(layer) <= (1.0 if case.by_construction else ESTIMATED)
    assert proved(layer.eval()) <= 1.0


@one_each
@every_dtype
def test_a_cast_after_registration_keeps_the_limit(case: Case, dtype: torch.dtype) -> None:
    layer = case.limited(dtype=torch.float32)
    weight(layer)
    layer = layer.to(dtype)
    assert layer.weight.dtype == dtype
    for _ in range(2):
        trained = proved(layer.train())
    assert trained <= (1.0 if case.by_construction else ESTIMATED)
    assert proved(layer.eval()) <= 1.0
    layer.weight.sum().backward()
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in originals(layer))


@one_each
def test_a_functional_call_uses_the_given_originals_and_changes_nothing(case: Case) -> None:
    layer = case.limited().eval()
    other = case.limited().eval()
    x = torch.randn(2, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
    x = (
        x
        if isinstance(layer, nn.Linear)
        else x.view(2, -1, *(1,) * (layer.weight.ndim - 2)).expand(
            2, layer.in_channels, *(5,) * (layer.weight.ndim - 2)
        )
    )
    before = weight(layer)
    state = {k: v.detach().clone() for k, v in other.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(layer, state, (x,)), other(x), rtol=0, atol=0)
    assert torch.equal(weight(layer), before)


@one_each
def test_transforms_of_the_original(case: Case) -> None:
    """vmap over originals is a loop over them, and torch.func.grad is autograd; in training, where nothing is proved."""
    layer = case.limited()
    limit = map_of(layer).train()
    V = [p.detach().clone() for p in originals(layer)]
    for _ in range(0 if case.by_construction else 60):
        limit(*V)
    batch = [torch.stack([v, 2.0 * v, -v]) for v in V]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if case.by_construction else {"rtol": 1e-2, "atol": 1e-3}
    loop = torch.stack([limit(*(b[i] for b in batch)) + 0.0 for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(limit)(*batch), loop, **tolerance)
    C = torch.randn(loop[0].shape)
    expected = [v.clone().requires_grad_() for v in V]
    (limit(*expected) * C).sum().backward()
    gradients = torch.func.grad(lambda *v: (limit(*v) * C).sum(), argnums=tuple(range(len(V))))(*V)
    for g, v in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, v.grad, **tolerance)


@one_each
def test_training_compiles_in_one_piece(case: Case) -> None:
    torch._dynamo.reset()
    layer = case.limited()
    for _ in range(0 if case.by_construction else 60):
        weight(layer)
    twin = copy.deepcopy(layer)
    dims = layer.weight.ndim - 2
    x = torch.randn(2, layer.in_features) if dims == 0 else torch.randn(2, layer.in_channels, *(5,) * dims)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    y, z = compiled(x), twin(x)
    torch.testing.assert_close(y, z, rtol=1e-9 if case.by_construction else 1e-2, atol=1e-9)
    y.square().sum().backward()
    z.square().sum().backward()
    for p, q in zip(originals(layer), originals(twin), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-7 if case.by_construction else 2e-2, atol=1e-6 if case.by_construction else 1e-2
        )


@one_each
def test_autocast_does_not_loosen_the_limit(case: Case) -> None:
    layer = case.limited(dtype=torch.float32)
    expected = [weight(layer) for _ in range(30)][-1]
    with torch.autocast("cpu", torch.bfloat16):
        W = layer.weight
        assert W.dtype == torch.float32
        assert close(W.detach() + 0.0, expected, factor=1.0 if case.by_construction else 1e4)


@one_each
def test_the_map_prints_itself(case: Case) -> None:
    text = repr(case.map(0.5))
    assert text.startswith(METHODS[case.method].__name__ + "(")
    assert "radius=0.5" in text
    assert case.norm in text


# Rounding to what is stored, and the ends of the range.

CONV = Geometry("conv")
LINEAR = Geometry("linear")
HALF = (torch.float16, torch.bfloat16)


def stored_norm(method: str, geometry: Geometry, V: Tensor, radius: float = 1.0, norm: str = "l2") -> float:
    """The proved norm over the radius of what a method makes of an original."""
    return geometry.proved(METHODS[method](geometry, radius, norm)(V), norm).upper / radius


@pytest.mark.parametrize("method", ["frobenius", "schur", "gram", "aol"])
def test_kernels_of_one_sign_are_proved_within_the_radius(method: str) -> None:
    for shape in ((1, 1, 3, 3), (2, 3, 4), (8, 8, 2, 2)):
        for V in (torch.ones(shape), torch.rand(shape), torch.ones(shape).float()):
            assert stored_norm(method, CONV, 3.0 * V) <= 1.0
    if method in {"frobenius", "schur"}:
        assert stored_norm(method, CONV, torch.ones(1, 1, 3, 3)) > 1.0 - 1e-12


@pytest.mark.parametrize("turns", [1 / 12, 1 / 8, 0.07, 0.3])
def test_a_maximum_between_the_points_of_one_grid_is_no_excess_on_the_other(turns: float) -> None:
    """Training and the proof look at different frequencies; a rotation has its maximum at any given one."""
    c, s = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    V = torch.stack([torch.eye(2), torch.tensor([[c, -s], [s, c]])], dim=-1)
    assert 0.95 < stored_norm("gram", CONV, 3.0 * V) <= 1.0


@pytest.mark.parametrize("method", ["gram", "frobenius", "schur", "aol"])
@pytest.mark.parametrize("radius", [1e-3, 1e-4, 1e-5, 1e-7])
def test_a_radius_near_the_smallest_numbers_of_float16_is_kept(method: str, radius: float) -> None:
    for geometry, shape in ((LINEAR, (64, 64)), (LINEAR, (3, 500)), (CONV, (8, 8, 3, 3)), (CONV, (1, 1, 50))):
        for V in (torch.randn(shape), torch.ones(shape)):
            assert stored_norm(method, geometry, (V * max(radius, 1e-5)).half(), radius) <= 1.0


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("radius", [1e-2, 1e-3, 1e-4])
def test_sums_of_many_numbers_near_the_smallest_are_kept(norm: str, radius: float) -> None:
    repeats = Geometry("conv", padding=(1,), padding_mode="replicate")
    for geometry, shape in ((LINEAR, (1, 10000)), (LINEAR, (10000, 1)), (repeats, (3, 7, 300)), (repeats, (300, 7, 3))):
        V = torch.ones(shape, dtype=torch.float16)
        assert stored_norm("rowsum", geometry, V, radius, norm) <= 1.0
    assert stored_norm("rowsum", LINEAR, torch.ones(1, 10000).half(), 1e-2, "linf") > 0.9


@pytest.mark.parametrize("method", ["gram", "frobenius", "schur", "aol"])
@pytest.mark.parametrize("radius", [1.0, 1e-6, 1e-30, 1e-40, 1e30])
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e20, 5e37])
def test_originals_of_any_size_are_limited(method: str, radius: float, size: float) -> None:
    for geometry, shape in ((LINEAR, (6, 6)), (CONV, (3, 3, 3))):
        V = torch.rand(shape).float() * size
        W = METHODS[method](geometry, radius)(V)
        assert geometry.proved(W).upper <= radius
        if method != "aol" and geometry.proved(V).upper < 0.2 * radius:
            assert torch.equal(W, V)
        if size > 1e10 * radius and radius > 1e-36 and method != "aol":
            assert geometry.proved(W).upper > 0.5 * radius


@pytest.mark.parametrize("method", ["gram", "frobenius", "schur", "aol"])
def test_one_infinite_entry_leaves_no_finite_weight(method: str) -> None:
    for geometry, shape in ((LINEAR, (2, 3)), (CONV, (2, 2, 3))):
        V = torch.randn(shape)
        V.view(-1)[1] = math.inf
        assert not bool(METHODS[method](geometry)(V).isfinite().any())


def test_a_radius_that_no_number_holds_is_refused() -> None:
    for method, geometry, V in (
        ("gram", LINEAR, torch.ones(2, 2)),
        ("frobenius", CONV, torch.ones(2, 2, 3)),
        ("rowsum", LINEAR, torch.ones(2, 2)),
        ("aol", LINEAR, torch.ones(2, 2)),
        ("cholesky", LINEAR, torch.ones(2, 2)),
        ("bro", LINEAR, torch.ones(2, 1)),
    ):
        limit = METHODS[method](geometry, 1e300, "linf" if method == "rowsum" else "l2")
        if method == "bro":
            limit.shape = (2, 2)
        with pytest.raises(ValueError, match="above the largest number"):
            limit(V.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_reaches_its_radius(dtype: torch.dtype) -> None:
    """What is lost is a few roundings of one number, not their number times the root of the rank."""
    unit = torch.finfo(dtype).eps
    W = METHODS["gram"](LINEAR)(torch.randn(512, 512).to(dtype))
    gram = 512.0 ** (-1 / 2**7)  # the Gram bound of an isometry
    assert gram * (1.0 - 3.0 * unit) < float(torch.linalg.matrix_norm(W.double(), 2)) <= 1.0
    W = METHODS["frobenius"](LINEAR)(3.0 * torch.eye(300).to(dtype))
    assert 1.0 - 3.0 * unit < float(torch.linalg.matrix_norm(W.double())) <= 1.0
    W = METHODS["rowsum"](LINEAR, 1.0, "linf")(torch.randn(300, 300).to(dtype))
    assert 1.0 - 3.0 * unit < LINEAR.proved(W, "linf").upper <= 1.0
    Q = torch.linalg.qr(torch.randn(200, 200))[0].to(dtype)
    assert 1.0 - 3.0 * unit < stored_norm("aol", LINEAR, 5.0 * torch.eye(200).to(dtype)) <= 1.0
    assert stored_norm("gram", LINEAR, 7.0 * Q) > gram * (1.0 - 3.0 * unit)


def test_no_rank_turns_the_sign() -> None:
    huge = torch.Size((10**6, 10**8))
    for method in ("gram", "frobenius", "schur"):
        for dtype in (*HALF, torch.float32):
            assert METHODS[method](LINEAR).target(huge, dtype, torch.float32) >= 0.0


def test_rounding_by_arithmetic_is_the_cast() -> None:
    x = torch.cat([torch.randn(1000, dtype=torch.float32) * 2.0**e for e in range(-30, 9)] + [torch.zeros(3).float()])
    for dtype in HALF:
        y = torch.cat([x, (x.to(dtype).float() + x.to(dtype).float().roll(1)) / 2])  # ties as well
        torch.testing.assert_close(round_by_arithmetic(y, dtype), y.to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("method", ["gram", "aol", "frobenius", "cholesky", "bcop"])
def test_half_precision_compiles_to_the_same_bits(method: str, dtype: torch.dtype) -> None:
    geometry = LINEAR if method == "cholesky" else CONV
    limit = METHODS[method](geometry)
    V = limit.right_inverse(torch.randn((6, 6) if geometry is LINEAR else (4, 4, 3, 3)).to(dtype))
    expected = limit(V)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(limit, backend="eager", fullgraph=True)(V), expected)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("method", "norm"), [("gram", "l2"), ("aol", "l2"), ("bcop", "l2"), ("rowsum", "linf")])
@pytest.mark.parametrize("limit", [1.0, 1e-3, 1e-4, 1e-8])
def test_a_learned_budget_rounds_within_its_limit(method: str, norm: str, limit: float, dtype: torch.dtype) -> None:
    unit, V = METHODS[method](CONV, 1.0, norm), torch.randn(8, 8, 3, 3)
    V = unit.right_inverse(V).to(dtype)
    W = Budgeted(unit, LearnedBudget(limit, [1]), 0, owner=True)(V)
    assert W.dtype == dtype
    assert CONV.proved(W, norm).upper <= limit


def test_what_is_no_weight_of_the_layer_is_refused_in_every_norm() -> None:
    wrong: list[tuple[Geometry, tuple[int, ...], str]] = [
        (Geometry("conv", groups=3), (4, 1, 3), "divisor"),
        (CONV, (4, 4), "dimensions"),
        (LINEAR, (4, 4, 3), "dimensions"),
        (Geometry("conv", padding_mode="mirror"), (4, 4, 3), "padding_mode"),
        (Geometry("conv", padding=(-1,)), (4, 4, 3), "padding"),
        (Geometry("conv", output_padding=(1,)), (4, 4, 3), "output_padding"),
        (Geometry("conv_transpose", padding_mode="circular"), (4, 4, 3), "transposed"),
    ]
    for geometry, shape, message in wrong:
        for norm in NORMS:
            for ask in (geometry.proved, geometry.upper):
                with pytest.raises(ValueError, match=message):
                    ask(torch.ones(shape), norm)
        for method, norm in (("aol", "l2"), ("frobenius", "l2"), ("schur", "l2"), ("gram", "l2"), ("rowsum", "linf")):
            with pytest.raises(ValueError, match=message):
                METHODS[method](geometry, 1.0, norm)(torch.ones(shape))


def test_empty_weights_have_norm_zero() -> None:
    for geometry, shape in ((LINEAR, (0, 3)), (LINEAR, (3, 0)), (CONV, (0, 2, 3)), (CONV, (2, 0, 3))):
        for norm in NORMS:
            assert float(geometry.upper(torch.ones(shape), norm)) == 0.0
            assert geometry.proved(torch.ones(shape), norm).upper == 0.0
