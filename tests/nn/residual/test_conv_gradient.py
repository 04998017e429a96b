"""Laws of the convolutional gradient block: its adjoint is the adjoint, it never expands, the limit is sharp for large images."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.linalg import Bound, conv_norm
from stableopt.nn import ConvGradientBlock, GradientBlock, lipschitz, stabilize, token_rule, uniform_bound, unit_slopes
from stableopt.nn.residual import conv_gradient
from stableopt.nn.residual.gradient_step import BOUNDS
from stableopt.nn.residual.per_unit import row_curvature, row_factor, row_sums, scaled_rows
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.module_laws import check_copies, check_devices_and_dtypes, check_gradients
from tests.nn.training import digits

EPS = torch.finfo(torch.float64).eps
IMAGES = {1: (7,), 2: (5, 4), 3: (3, 4, 3)}
"""Small images, smaller than some kernels."""


def drawn(block: ConvGradientBlock, *, scale: float = 1.0, raw: float = 3.0) -> ConvGradientBlock:
    """Random parameters and steps near their limits."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        block.weight.mul_(scale)
        block.raw_step.fill_(raw)
    return block


@st.composite
def blocks(draw: st.DrawFn) -> tuple[ConvGradientBlock, tuple[int, ...]]:
    """A block with any options, and the shape of an input."""
    dims, groups, mode = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from(["zeros", "circular"]))
    odd = (1, 3, 5) if dims < 3 else (1, 3)
    taps = tuple(draw(st.sampled_from(odd if mode == "circular" else (*odd, 2))) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    spans = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    even = all(span % 2 == 0 for span in spans)
    padding: Any = (
        "same" if mode == "circular" or (even and draw(st.booleans())) else tuple((s + 1) // 2 for s in spans)
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    block = ConvGradientBlock(
        2, draw(st.sampled_from([2, 4])), taps, dims=dims, dilation=dilation, groups=groups, padding=padding,
        padding_mode=mode, strong=draw(st.sampled_from([0.0, 0.3, 5.0])), bound=draw(st.sampled_from(BOUNDS)),
        activation=draw(st.sampled_from(["relu", "leaky_relu", "tanh", "softplus", "hardtanh"])),
    )  # fmt: skip
    block = drawn(block, scale=10.0 ** draw(st.integers(-5, 5)), raw=draw(st.floats(-50, 50)))
    return block, (2, *[max(n, s // 2) for n, s in zip(IMAGES[dims], spans, strict=True)])


@settings(max_examples=40)
@given(blocks())
def test_it_never_expands_whatever_the_parameters_and_the_options(drawn_block: Any) -> None:
    block, shape = drawn_block
    bounds = {norm: lipschitz(block, norm).upper for norm in ("l2", "linf", "l1")}
    assert bounds["l2"] <= 1.0  # proved, not 1 + eps
    assert bounds["linf"] == bounds["l1"]
    J = jacobian(block, torch.randn(1, *shape))
    size = 1e3 * EPS * (1.0 + float(J.abs().max()))
    torch.testing.assert_close(J, J.mT, rtol=0, atol=size)
    for norm, bound in bounds.items():
        assert operator_norm(J, norm) <= bound * (1.0 + 1e-12) + size
    kappa = float(block.damping().detach())
    assert bounds["l2"] == pytest.approx(1.0 - kappa, abs=1e-9)
    assert float(torch.linalg.eigvalsh(J)[-1]) <= 1.0 - kappa + size


@settings(max_examples=20)
@given(blocks(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_it_never_expands_in_the_stored_numbers_of_any_dtype(drawn_block: Any, dtype: torch.dtype) -> None:
    block, _ = drawn_block
    with torch.no_grad():
        block.weight.clamp_(-6e4, 6e4)  # what half precision can hold
    assert lipschitz(block.to(dtype)).upper <= 1.0


@settings(max_examples=30)
@given(blocks())
def test_the_adjoint_is_the_adjoint(drawn_block: Any) -> None:
    block, shape = drawn_block
    nn.init.zeros_(block.bias)
    x = torch.randn(1, *shape)
    with torch.no_grad():
        image = block._linear(x)
        y = torch.randn_like(image)
        back = block._adjoint(y)
    torch.testing.assert_close((image * y).sum(), (x * back).sum(), rtol=1e-9, atol=1e-9 * float(image.abs().sum()))
    assert back.shape == x.shape  # <Ax, y> = <x, A' y>


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_map_is_the_formula(dims: int, mode: str) -> None:
    """Against torch's own layer with the same padding, whose vector-Jacobian product is the adjoint."""
    block = drawn(ConvGradientBlock(2, 4, dims=dims, groups=2, padding_mode=mode, strong=0.4, activation="tanh"))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(2, 4, 3, padding=1, groups=2, padding_mode=mode)
    layer.load_state_dict({"weight": block.weight, "bias": block.bias})
    x = torch.randn(2, 2, *[4] * dims)
    z, adjoint = torch.func.vjp(layer, x)[:2]
    expected = x - block.step_size() * (0.4 * x + adjoint(torch.tanh(z))[0])
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block(x[0]), block(x)[0])
    rows = ConvGradientBlock(2, 4, dims=dims, groups=2, padding_mode=mode, strong=0.4, activation="tanh", bound="rows")
    rows = drawn(rows)
    layer.load_state_dict({"weight": rows.weight, "bias": rows.bias})
    z, adjoint = torch.func.vjp(layer, x)[:2]
    steps = rows.step_sizes().view(-1, *[1] * dims)
    expected = (1 - rows.damping()) * x - adjoint(steps * torch.tanh(z))[0]
    torch.testing.assert_close(rows(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("size", "mode"), [(400, "zeros"), (64, "circular")])
def test_the_limit_is_attained_by_large_images_and_sharp(size: int, mode: str) -> None:
    kernel = torch.randn(2, 2, 3)
    block = ConvGradientBlock(2, dims=1, padding_mode=mode)
    with torch.no_grad():
        block.weight.copy_(kernel)
        block.bias.fill_(30.0)  # every unit is active
    U = conv_norm(kernel).upper
    for over, expands in ((1.0, False), (1.05, True)):  # the bound of the norm is up to 2 % above it
        block.step_size = lambda over=over: torch.tensor(over * 2 / U**2)  # type: ignore[method-assign]
        J = jacobian(block, torch.randn(1, 2, size))
        smallest = float(torch.linalg.eigvalsh(J)[0])
        assert smallest == pytest.approx(1 - 2 * over, abs=0.08)
        assert (smallest < -1) is expands


def test_another_padding_in_the_adjoint_would_expand() -> None:
    """The trap: a convolution and a transposed one with other pixels around the image are no gradient."""
    block = ConvGradientBlock(1, dims=1, bound="gram")
    with torch.no_grad():
        block.weight.copy_(torch.tensor([[[1.0, -1.0, 0.5]]]))
        block.bias.fill_(30.0)
        block.raw_step.fill_(30.0)

    def mismatched(x: Tensor) -> Tensor:
        hidden = F.conv1d(F.pad(x, (1, 1), mode="circular"), block.weight, block.bias)
        return x - block.step_size() * F.conv_transpose1d(hidden, block.weight, padding=1)

    found = {}
    for name, f in (("ours", block), ("mismatched", mismatched)):
        J = torch.autograd.functional.jacobian(lambda v, f=f: f(v.view(1, 1, 6)).flatten(), torch.randn(6))
        found[name] = float(torch.linalg.matrix_norm(J, 2))
    assert found["ours"] <= 1.0 + 1e-12
    assert found["mismatched"] > 1.01


def test_negative_slopes_are_refused_and_would_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the bound of a ConvGradientBlock needs slopes in \[0, 1\]"):
        ConvGradientBlock(2, activation="gelu")
    monkeypatch.setitem(unit_slopes.UNIT_SLOPES, "bad", F.gelu)
    block = ConvGradientBlock(1, dims=1, kernel_size=1, activation="bad", step=0.9)
    nn.init.constant_(block.bias, -1.6)
    assert operator_norm(jacobian(block, torch.zeros(1, 1, 3)), "l2") > 1.01


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_pair_of_images_is_spread(bound: str) -> None:
    block = drawn(ConvGradientBlock(2, 3, bound=bound, activation="softplus"), raw=30.0)
    assert worst_ratio(block, (2, 4, 4), starts=8, steps=20) <= lipschitz(block).upper + 1e-9
    linf = worst_ratio(block, (2, 4, 4), "linf", starts=8, steps=20)
    assert 1.0 < linf <= lipschitz(block, "linf").upper


def test_the_maximum_norm_is_attained_where_the_products_have_one_sign() -> None:
    """A kernel of one tap per channel: at each pixel the matrix of the dense block, whose row sums are attained."""
    block = ConvGradientBlock(3, 1, kernel_size=1, dims=1, step=0.25)
    nn.init.constant_(block.weight, 2.0)
    nn.init.constant_(block.bias, 30.0)
    exact = operator_norm(jacobian(block, torch.zeros(1, 3, 2)), "linf")
    assert exact > 1.1
    assert lipschitz(block, "linf").upper == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("over", [0.5, 4.0])
def test_the_bound_in_the_maximum_norm_is_that_of_the_matrix_of_the_operator(over: float) -> None:
    """On a torus larger than the kernel, where each pixel sees all taps; also beyond the limit of the step."""
    block = drawn(ConvGradientBlock(4, 6, dims=1, groups=2, padding_mode="circular", bound="rows"))
    nn.init.zeros_(block.bias)
    A = block._linear(torch.eye(4 * 9).view(-1, 4, 9)).flatten(1).mT.detach()
    steps = over * block.step_sizes().detach()
    dense = row_factor(scaled_rows(A, steps.repeat_interleave(9))[None, ..., None], Bound.point(0.1))
    kernel = row_factor(scaled_rows(block.weight, steps).unflatten(0, (2, -1)), Bound.point(0.1))
    assert kernel.upper == pytest.approx(dense.upper, rel=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_one_tap_is_the_dense_block_at_every_pixel(bound: str) -> None:
    conv = ConvGradientBlock(3, 5, kernel_size=1, dims=1, strong=0.2, bound=bound, step=0.7)
    dense = GradientBlock(3, 5, strong=0.2, bound=bound, step=0.7)
    for name in ("weight", "bias"):
        nn.init.normal_(dense.get_parameter(name))
    state = dense.state_dict()
    conv.load_state_dict({k: v.unsqueeze(-1) if k == "weight" else v for k, v in state.items()})
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(conv(x), dense(x.mT).mT, rtol=1e-3 if bound == "gram" else 1e-9, atol=1e-3)


@pytest.mark.parametrize("bound", ["gram", "rows"])
def test_the_bounds_from_cheap_to_tight_are_ordered(bound: str) -> None:
    torch.manual_seed(0)
    block = ConvGradientBlock(8, 8, step=0.5)
    cheap = [ConvGradientBlock(8, 8, step=0.5, bound=b) for b in ("frobenius", "schur")]
    for other in cheap:
        other.load_state_dict(block.state_dict())
        assert float(other.step_size().detach()) <= float(block.step_size().detach()) * 1.05
    exact = 1.0 / conv_norm(block.weight).upper ** 2
    if bound == "gram":
        assert 0.9 * exact <= float(block.step_size().detach()) <= exact
    rows = ConvGradientBlock(8, 8, bound="rows")
    nn.init.zeros_(rows.weight)
    with torch.no_grad():
        rows.weight[range(8), range(8), 1, 1] = 2.0  # channels that are orthogonal at every lag: the sums are exact
    torch.testing.assert_close(rows.step_sizes(), torch.full((8,), 0.25), rtol=1e-9, atol=0)


def test_the_row_sums_of_a_kernel_are_those_of_the_operator() -> None:
    """Against the matrix of the operator on an image that is large enough for all lags."""
    block = drawn(ConvGradientBlock(4, 6, (3, 2), groups=2, dilation=(2, 1), padding=(2, 1), bound="rows"), raw=40.0)
    nn.init.zeros_(block.get_parameter("raw_q"))
    nn.init.zeros_(block.bias)
    basis = torch.eye(4 * 15 * 9).view(-1, 4, 15, 9)
    A = block._linear(basis).flatten(1).mT
    sums = (A @ A.mT).abs().sum(1).view(6, 15, 10).amax((1, 2))
    torch.testing.assert_close(block.step_sizes(), 2.0 / sums, rtol=1e-9, atol=0)


def test_the_row_sums_prove_what_they_promise_whatever_the_weights() -> None:
    """For every q the sums bound the square of the norm; with the q of the steps they are at most 2."""
    block = drawn(ConvGradientBlock(4, 6, dims=1, groups=2, bound="rows"), raw=40.0)
    with torch.no_grad():
        block.weight.mul_(10.0 ** torch.arange(-2.0, 4.0).view(6, 1, 1))
    q, steps = block.get_parameter("raw_q").detach().div(15).tanh().mul(15).exp(), block.step_sizes().detach()
    scaled = scaled_rows(block.weight, steps)
    proved = row_curvature(scaled, steps, q, 2).upper
    assert proved == pytest.approx(float((steps * row_sums(block.weight.detach(), q, 2)).max()), rel=1e-9)
    assert 1.9 < proved <= 2.0
    other = row_curvature(scaled, steps, torch.rand(6) + 0.1, 2).upper
    assert conv_norm(scaled, groups=2).upper ** 2 / 1.05 <= min(proved, other)
    assert other > proved


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_kernel_of_zeros_is_the_identity_with_finite_gradients(bound: str) -> None:
    block = ConvGradientBlock(2, bound=bound)
    nn.init.zeros_(block.weight)
    x = torch.randn(1, 2, 4, 4)
    y = block(x)
    assert y.equal(x)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in block.parameters())


@pytest.mark.parametrize("bound", BOUNDS)
def test_extreme_kernels_have_finite_steps_and_a_bound_of_one(bound: str) -> None:
    for dtype, scales in ((torch.float32, (1e-35, 1e-20, 1e17)), (torch.float64, (1e-200, 1e100, 1e150))):
        for scale in scales:  # larger ones overflow in the branch
            block = ConvGradientBlock(2, dims=1, bound=bound, strong=0.5).to(dtype)
            with torch.no_grad():
                block.weight.mul_(scale)
                block.raw_step.fill_(40.0)
            assert lipschitz(block).upper <= 1.0, (dtype, scale)
            block(torch.randn(1, 2, 5, dtype=dtype)).sum().backward()
            assert all(p.grad is not None and not bool(p.grad.isnan().any()) for p in block.parameters()), (
                dtype,
                scale,
            )


def test_nothing_is_proved_about_nan() -> None:
    for bound in BOUNDS:
        for name, _ in ConvGradientBlock(2, strong=0.5, bound=bound).named_parameters():
            block = ConvGradientBlock(2, strong=0.5, bound=bound)
            with torch.no_grad():
                block.get_parameter(name).view(-1)[0] = math.nan
            with pytest.raises(ValueError, match=r"NaN|finite"):
                lipschitz(block)


@pytest.mark.parametrize(
    ("bound", "mode"),
    [pytest.param(*p, marks=pytest.mark.slow) for p in (("rows", "circular"), ("gram", "zeros"), ("gram", "circular"))],
)
def test_the_ecosystem(bound: str, mode: str) -> None:
    block = drawn(ConvGradientBlock(2, 3, strong=0.3, bound=bound, padding_mode=mode), raw=0.5)
    check_copies(block, (2, 4, 4))
    check_devices_and_dtypes(block, (2, 4, 4))
    torch.testing.assert_close(pickle.loads(pickle.dumps(block))(torch.ones(1, 2, 4, 4)), block(torch.ones(1, 2, 4, 4)))
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(torch.func.vmap(block)(x), block(x))
    assert all(p.ndim >= 1 and p.is_contiguous() for p in block.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_gradients_are_right(bound: str) -> None:
    check_gradients(drawn(ConvGradientBlock(2, 3, dims=1, strong=0.3, bound=bound, activation="tanh"), raw=0.5), (2, 5))
    block = drawn(ConvGradientBlock(1, 2, dims=1, bound=bound, activation="tanh", strong=0.1), raw=0.5)
    parameters, x = dict(block.named_parameters()), torch.randn(2, 1, 4)

    def f(*values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))


def test_a_limit_without_gradient_is_the_same_map_with_the_step_as_a_constant() -> None:
    block = drawn(ConvGradientBlock(2), raw=0.5)
    constant = ConvGradientBlock(2, limit_gradient=False)
    constant.load_state_dict(block.state_dict())
    x = torch.randn(1, 2, 4, 4)
    assert constant(x).equal(block(x))
    fixed = copy.deepcopy(block)
    step = block.step_size().detach() / block.raw_step.detach()[0].sigmoid()
    fixed.step_size = lambda: step * fixed.raw_step[0].sigmoid()  # type: ignore[method-assign]
    for module in (constant, fixed):
        module(x).square().sum().backward()
    for p, q in zip(constant.parameters(), fixed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.slow
def test_it_is_exported_and_compiled() -> None:
    block = drawn(ConvGradientBlock(2, 3, bound="rows", padding_mode="circular", strong=0.1))
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
    gram = drawn(ConvGradientBlock(2, 3))
    torch.testing.assert_close(torch.export.export(gram, (x,)).module()(x), gram(x))
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


def test_the_bound_for_all_parameters_is_one_in_l2_only() -> None:
    block = ConvGradientBlock(2)
    bound = uniform_bound(block)
    assert bound is not None
    assert bound.upper == 1.0
    assert uniform_bound(block, "linf") is None
    model = stabilize(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), block, nn.Flatten(), nn.Linear(32, 2)), 1.0)
    assert lipschitz(model).upper <= 1.0
    with pytest.raises(Exception, match="no token_max"):
        token_rule(block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be an integer"),
        ({"channels": 2, "hidden": 0}, "hidden must be"),
        ({"channels": 2, "dims": 4}, "dims must be 1, 2 or 3"),
        ({"channels": 2, "groups": 3}, "groups must divide channels and hidden, got 3, 2 and 2"),
        ({"channels": 2, "hidden": 3, "groups": 2}, "groups must divide"),
        ({"channels": 2, "kernel_size": (3, 3, 3)}, "kernel_size needs one number or 2"),
        ({"channels": 2, "kernel_size": 0}, "kernel_size must be an integer"),
        ({"channels": 2, "dilation": 0}, "dilation must be an integer"),
        ({"channels": 2, "kernel_size": 2}, "padding='same' needs an even dilation"),
        (
            {"channels": 2, "padding": 3},
            r"padding must be 'same' or an integer per axis from 0 .* here \[2, 2\], got 3",
        ),
        ({"channels": 2, "padding": "valid"}, "padding must be 'same'"),
        ({"channels": 2, "padding": ((0, 1), (0, 1))}, "both sides and the adjoint have the same"),
        ({"channels": 2, "padding": -1}, "padding must be"),
        ({"channels": 2, "padding_mode": "reflect"}, "padding_mode must be one of zeros, circular"),
        ({"channels": 2, "padding_mode": "circular", "padding": 1}, "use padding='same'"),
        ({"channels": 2, "bound": "power"}, "bound must be one of gram, frobenius, schur, rows"),
        ({"channels": 2, "strong": -1.0}, "strong must be finite"),
        ({"channels": 2, "step": 1.0}, "step is a fraction"),
        ({"channels": 2, "depth": 0}, "depth must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvGradientBlock(**arguments)


def test_a_wrong_input_is_refused() -> None:
    for shape in ((1, 3, 4, 4), (4, 4), (2, 1, 2, 4, 4)):
        with pytest.raises(ValueError, match=r"needs an input of shape \(batch, 2, height, width\), got"):
            ConvGradientBlock(2)(torch.zeros(shape))


def test_it_prints_its_options() -> None:
    text = str(ConvGradientBlock(2, 4, (3, 1), dilation=(2, 1), groups=2, bound="schur", limit_gradient=False))
    assert text == (
        "ConvGradientBlock(2, 4, kernel_size=(3, 1), dims=2, dilation=(2, 1), groups=2, padding=(2, 0), padding_mode='zeros', "
        "activation='relu', strong=0.0, bound='schur', limit_gradient=False)"
    )
    assert conv_gradient.__all__ == ["ConvGradientBlock"]


@pytest.mark.slow
def test_training_never_breaks_the_promise() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x, y, _, _ = digits()
    blocks = [
        ConvGradientBlock(4, depth=4, bound=bound, padding_mode=mode)
        for bound, mode in (("gram", "zeros"), ("rows", "zeros"), ("gram", "circular"), ("rows", "circular"))
    ]
    first = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, padding=1))
    model = nn.Sequential(first, *blocks, nn.Flatten(), nn.Linear(256, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(math.inf)
    for batch in torch.randperm(len(x)).split(64):
        opt.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        assert all(lipschitz(block).upper <= 1.0 for block in blocks)
    assert float(loss.detach()) < 1.5
