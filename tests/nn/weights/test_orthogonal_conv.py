"""Laws of orthogonal convolution kernels, against the dense operator that torch's own layer makes of unit images."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.linalg import conv_norm
from stableopt.nn import GroupSort, export, lipschitz, stabilize
from stableopt.nn.weights import METHODS, Geometry, OrthogonalConv
from stableopt.nn.weights.conv_factors import Factors, factorize, orthonormal_rows, product
from stableopt.nn.weights.conv_layout import Layout
from tests.linalg.conv_oracle import LAYERS

EXACT = 1e-11
"""What float64 loses: the map aims a few hundred units in the last place below the radius, and singular values come from a matrix
of up to a few hundred rows."""


@dataclass(frozen=True)
class Net:
    """One layer and one image size."""

    inside: int
    outside: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    size: tuple[int, ...]
    seed: int
    transposed: bool = False

    def layer(
        self, padding: tuple[int, ...], mode: str = "zeros", divides: bool = True, radius: float = 1.0
    ) -> nn.Module:
        """The layer with an orthogonal kernel from a random original, no bias."""
        torch.manual_seed(self.seed)
        layer = LAYERS[len(self.kernel), self.transposed](
            self.groups * self.inside,
            self.groups * self.outside,
            self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            padding=padding,
            padding_mode=mode,
            bias=False,
        )
        limit = OrthogonalConv(Geometry.of(layer), radius, divides=divides)
        P.register_parametrization(layer, "weight", limit)
        original = layer.parametrizations.weight.original
        original.data = torch.randn(original.shape)
        return layer

    @property
    def reach(self) -> list[int]:
        return [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]


def singular_values(layer: nn.Module, size: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """All singular values of the layer on images of one size, its number of outputs and of inputs."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    channels = layer.in_channels
    basis = torch.eye(channels * math.prod(size)).reshape(-1, channels, *size)
    columns = layer(basis).flatten(1)
    return torch.linalg.svdvals(columns), columns.shape[1], columns.shape[0]


def limit_of(layer: nn.Module) -> OrthogonalConv:
    return layer.parametrizations.weight[0]


def keeps_norms(layer: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether the operator itself is an isometry."""
    values, outputs, inputs = singular_values(layer, size)
    return outputs >= inputs and bool((values - 1.0).abs().max() < EXACT)


def adjoint_keeps_norms(layer: nn.Module, size: tuple[int, ...]) -> bool:
    values, outputs, inputs = singular_values(layer, size)
    return outputs <= inputs and bool((values - 1.0).abs().max() < EXACT)


@st.composite
def nets(draw: st.DrawFn, transposed: bool = False, around: bool = False) -> Net:
    """Draw a layer; ``around``: with 2 * padding = dilation * (kernel - 1) possible, and the stride divides the image."""
    dims = draw(st.sampled_from((1, 1, 2, 2, 3)))
    taps = {1: (1, 2, 3, 4, 5, 6), 2: (1, 2, 3, 4), 3: (1, 2, 3)}[dims]
    kernel = tuple(draw(st.sampled_from(taps)) for _ in range(dims))
    stride = tuple(draw(st.sampled_from((1, 1, 2, 3) if dims < 3 else (1, 2))) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from((1, 1, 2, 3) if dims < 3 else (1, 2))) for _ in range(dims))
    if around:
        assume(all(d * (k - 1) % 2 == 0 for k, d in zip(kernel, dilation, strict=True)))
    groups = draw(st.sampled_from((1, 1, 2)))
    inside, outside = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    size = []
    for k, s, d in zip(kernel, stride, dilation, strict=True):
        least = (d * (k - 1) + 1) if not around else max(d * (k - 1) // 2, 1)
        size.append(s * -(-least // s) + s * draw(st.integers(0, 1)))
    assume(groups * inside * math.prod(size) <= 300)
    net = Net(inside, outside, kernel, stride, dilation, groups, tuple(size), draw(st.integers(0, 2**31)), transposed)
    phases = [min(k, s // math.gcd(s, d)) for k, s, d in zip(kernel, stride, dilation, strict=True)]
    assume(
        (outside if not transposed else inside) > 1 or (inside if not transposed else outside) * math.prod(phases) > 1
    )
    return net


# What is orthogonal.


@given(net=nets(around=True))
@settings(max_examples=60)
def test_on_a_torus_the_kernel_keeps_every_norm_or_its_adjoint_does(net: Net) -> None:
    layer = net.layer(tuple(r // 2 for r in net.reach), "circular")
    limit = limit_of(layer)
    values, outputs, inputs = singular_values(layer, net.size)
    assert float(values.max()) <= 1.0 + 1e-13
    assert limit.is_isometry == keeps_norms(layer, net.size)
    assert limit.is_co_isometry == (adjoint_keeps_norms(layer, net.size))
    phases = math.prod(
        min(k, s // math.gcd(s, d)) for k, s, d in zip(net.kernel, net.stride, net.dilation, strict=True)
    )
    assert limit.is_co_isometry == (net.outside <= net.inside * phases)
    reads_all = all(
        k >= s and math.gcd(s, d) == 1 for k, s, d in zip(net.kernel, net.stride, net.dilation, strict=True)
    )
    assert limit.is_isometry == (net.outside >= net.inside * phases and reads_all)
    if not (limit.is_isometry or limit.is_co_isometry):  # pixels that no tap reads are lost, all others kept
        assert bool(((values < EXACT) | (values > 1.0 - EXACT)).all())
    assert outputs * inputs > 0


@given(net=nets())
@settings(max_examples=60)
def test_zero_padding_keeps_the_norm_below_and_what_the_module_says(net: Net) -> None:
    """Nothing around: whole rows of the grid's operator. All outputs seen: whole columns of it. In between only a bound."""
    bare = net.layer((0,) * len(net.kernel))
    if limit_of(bare).is_co_isometry:
        assert adjoint_keeps_norms(bare, net.size)
    seen = net.layer(tuple(net.reach))
    if limit_of(seen).is_isometry and max(net.stride) == 1:
        assert keeps_norms(seen, net.size)
    same = net.layer(tuple((r + 1) // 2 for r in net.reach))
    for layer in (bare, seen, same):
        assert float(singular_values(layer, net.size)[0].max()) <= 1.0 + 1e-13


def test_zero_padding_of_the_same_size_is_no_isometry() -> None:
    layer = Net(3, 3, (3,), (1,), (1,), 1, (8,), 0).layer((1,))
    assert limit_of(layer).is_isometry
    assert not keeps_norms(layer, (8,))
    assert float(singular_values(layer, (8,))[0].min()) < 0.95


@given(net=nets(transposed=True))
@settings(max_examples=60)
def test_a_transposed_convolution_exchanges_the_two_words(net: Net) -> None:
    layer = net.layer((0,) * len(net.kernel))
    values, *_ = singular_values(layer, net.size)
    assert float(values.max()) <= 1.0 + 1e-13
    if limit_of(layer).is_co_isometry:  # without cropping the layer is the whole adjoint
        assert keeps_norms(layer, net.size)


def test_a_deformed_kernel_fails_the_law() -> None:
    """The law sees a change of one part in a million, of any kind."""
    net = Net(2, 4, (3,), (2,), (1,), 1, (8,), 3)
    layer = net.layer((1,), "circular")
    W = layer.weight.detach().clone()
    limit = limit_of(layer)
    assert limit.is_isometry
    assert limit.is_co_isometry
    plain = nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="circular", bias=False)
    for change in (
        W,
        W * (1 - 1e-6),
        W + 1e-6 * torch.randn(W.shape),
        W.roll(1, -1),
        W.flip(-1),
        W.flip(0),
        W[:, :, [0, 1, 1]],
    ):
        plain.weight.data.copy_(change)
        still = torch.equal(change, W) or torch.equal(change, W.flip(0))
        if torch.equal(change, W.flip(-1)):  # read backwards the phases still have the same taps: k = 3 and s = 2
            still = True
        assert keeps_norms(plain, (8,)) == still


@given(
    dims=st.sampled_from((1, 2)),
    k=st.sampled_from((3, 5)),
    s=st.integers(2, 4),
    n=st.integers(3, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_stride_that_does_not_divide_the_image_needs_no_promise(dims: int, k: int, s: int, n: int, seed: int) -> None:
    assume(n >= k // 2)
    n = n if dims == 1 else min(n, 6)
    net = Net(2, 3, (k,) * dims, (s,) * dims, (1,) * dims, 1, (n,) * dims, seed)
    layer = net.layer((k // 2,) * dims, "circular", divides=False)
    assert float(singular_values(layer, net.size)[0].max()) <= 1.0 + 1e-13
    limit = limit_of(layer)
    assert not limit.is_isometry
    assert limit.geometry.proved(layer.weight.detach()).upper <= 1.0


def test_the_promise_that_the_stride_divides_is_needed() -> None:
    net = Net(2, 4, (3,), (2,), (1,), 1, (8,), 0)
    layer = net.layer((1,), "circular", divides=True)
    assert keeps_norms(layer, (8,))
    assert float(singular_values(layer, (7,))[0].max()) > 1.05
    assert conv_norm(layer.weight.detach(), stride=2, padding=1, padding_mode="circular", image_size=8).upper <= 1.0
    assert limit_of(layer).geometry.proved(layer.weight.detach()).upper > 1.05  # of every size


def test_with_the_promise_and_without_it_a_co_isometry_stays_one() -> None:
    net = Net(4, 3, (3,), (2,), (1,), 1, (8,), 0)
    for divides in (True, False):
        layer = net.layer((1,), "circular", divides=divides)
        assert limit_of(layer).is_co_isometry
        assert adjoint_keeps_norms(layer, (8,))
    assert adjoint_keeps_norms(layer, (7,))


def test_narrow_circular_padding_keeps_only_the_adjoint() -> None:
    layer = Net(3, 3, (5,), (1,), (1,), 1, (9,), 0).layer((1,), "circular")
    assert adjoint_keeps_norms(layer, (9,))
    assert not keeps_norms(layer, (9,))


# The bound, whatever the original is.


def _hard(shape: tuple[int, int]) -> dict[str, Tensor]:
    m, n = shape
    return {
        "zero": torch.zeros(m, n),
        "ones": torch.ones(m, n),
        "rank one": torch.outer(torch.randn(m), torch.randn(n)),
        "huge": 1e30 * torch.randn(m, n),
        "tiny": 1e-30 * torch.randn(m, n),
        "uneven": torch.randn(m, n) * 10.0 ** torch.linspace(0, -12, m)[:, None],
        "nearly dependent": torch.randn(1, n) + 1e-7 * torch.randn(m, n),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (6, 2, 3), (3, 6, 2, 3), (4, 3, 4, 4)], ids=str)
def test_no_original_makes_the_kernel_expand(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    dims = len(shape) - 2
    for stride in (1, 2):
        limit = OrthogonalConv(Geometry("conv", (stride,) * dims), 1.0, shape=shape)
        for kind, V in _hard(limit.layout.shape).items():
            top = 6e4 if dtype == torch.float16 else 1e30
            W = limit(V.clamp(-top, top).to(dtype).requires_grad_())
            assert limit.geometry.proved(W.detach()).upper <= 1.0, kind
            assert W.dtype == dtype
            W.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "loss"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_little_is_lost_to_rounding(dtype: torch.dtype, loss: float) -> None:
    limit = OrthogonalConv(Geometry("conv"), 2.0, shape=(16, 16, 3, 3))
    W = limit(torch.randn(limit.layout.shape).to(dtype)).double()
    spectrum = torch.fft.fft2(W, s=(7, 7)).permute(2, 3, 0, 1)
    values = torch.linalg.svdvals(spectrum) / 2.0
    assert float(values.max()) <= 1.0
    assert float(values.min()) >= 1.0 - loss


def test_the_size_of_a_row_space_does_not_matter() -> None:
    limit = OrthogonalConv(Geometry("conv"), shape=(4, 3, 3))
    V = torch.randn(limit.layout.shape)
    torch.testing.assert_close(limit(3e5 * V), limit(V), rtol=0, atol=1e-13)
    torch.testing.assert_close(limit(-V), -limit(V), rtol=0, atol=1e-13)  # the projectors stay, H changes its sign


@given(
    dtype=st.sampled_from((torch.float64, torch.float32)),
    seed=st.integers(0, 10**6),
    r=st.integers(1, 6),
    n=st.integers(6, 9),
)
@settings(max_examples=40)
def test_rows_become_orthonormal_and_span_the_same(dtype: torch.dtype, seed: int, r: int, n: int) -> None:
    torch.manual_seed(seed)
    A = torch.randn(2, r, n, dtype=dtype)
    Q = orthonormal_rows(A, passes=2)
    eps = torch.finfo(dtype).eps
    assert float((Q @ Q.mT - torch.eye(r, dtype=dtype)).abs().max()) < 100 * eps
    condition = float(torch.linalg.cond(A).max())
    assert float((A - (A @ Q.mT) @ Q).abs().max()) < 100 * eps * condition * float(A.abs().max())


# The factorization.


@given(net=nets())
@settings(max_examples=60)
def test_a_product_is_taken_apart_exactly(net: Net) -> None:
    torch.manual_seed(net.seed)
    shape = (net.groups * net.outside, net.inside, *net.kernel)
    limit = OrthogonalConv(Geometry("conv", net.stride, net.dilation, net.groups), 0.7, shape=shape)
    W = limit(torch.randn(limit.layout.shape))
    assert W.shape == shape
    again = limit(limit.right_inverse(W))
    if limit.layout.swapped or limit.is_co_isometry:
        assert float((again - W).abs().max()) < 1e-9
    # else the cropped channels are lost, and the sweeps find the others
    assert float((again * W).sum()) >= 0.99 * float(again.norm() * W.norm())


def test_a_layout_folds_and_unfolds_without_loss() -> None:
    for kernel, stride, dilation in itertools.product(((3, 3), (4, 2), (1, 5)), ((1, 1), (2, 3)), ((1, 1), (2, 1))):
        for out, channels in ((5, 2), (2, 5), (1, 2)):
            layout = Layout(2, out, channels, kernel, stride, dilation)
            W = torch.randn(2 * out, channels, *kernel)
            assert torch.equal(layout.unfold(layout.fold(W)), W)


def test_a_layout_splits_and_joins_without_loss() -> None:
    layout = Layout(2, 4, 3, (3, 4), (2, 3), (1, 1))
    V = torch.randn(layout.shape)
    H, free, bound = layout.split(V)
    used = torch.cat([part.flatten() for part in (H, free, *bound) if part is not None])
    again = layout.join([part for part in (H, free, *bound) if part is not None])
    assert torch.equal(again.flatten()[: used.numel()], used)
    assert not again.flatten()[used.numel() :].any()
    assert V.numel() - used.numel() < layout.columns


def test_the_product_is_the_polynomial() -> None:
    """Against the definition, with polynomials in two variables multiplied term by term."""
    layout = Layout(1, 3, 4, (3, 2), (1, 1), (1, 1))
    Z = [torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), *(torch.zeros(4, 4) for _ in range(2))]
    for j in (1, 2):
        q = torch.linalg.qr(torch.randn(4, 4))[0][:, :2]
        Z[j] = q @ q.T
    H = torch.linalg.qr(torch.randn(4, 4))[0][:3]
    K = product(layout, Factors(H[None], torch.stack(Z)[None], ()))[0]
    for x, y in itertools.product((0.3, -1.7), (0.9, 2.0)):
        value = sum(K[:, a, b] * x**a * y**b for a in range(3) for b in range(2))
        eye = torch.eye(4)
        expected = H @ (eye - Z[0] + x * Z[0]) @ (eye - Z[1] + x * Z[1]) @ (eye - Z[2] + y * Z[2])
        torch.testing.assert_close(value, expected)


def test_a_kernel_near_an_orthogonal_one_comes_back_near_it() -> None:
    limit = OrthogonalConv(Geometry("conv"), shape=(6, 6, 3, 3))
    W = limit(torch.randn(limit.layout.shape))
    for noise in (1e-6, 1e-3):
        step = noise * torch.randn(W.shape)
        found = limit(limit.right_inverse(W + step))
        assert float((found - W - step).norm()) <= 1.01 * float(step.norm())  # W itself is that near


def test_sweeps_bring_the_factors_nearer() -> None:
    W = torch.randn(6, 4, 3, 3)
    layout = Layout(1, 6, 4, (3, 3), (1, 1), (1, 1))
    reached = []
    for sweeps in (0, 1, 5):
        K = layout.unfold(product(layout, factorize(layout, W, sweeps)))
        unit = W / W.flatten(1).norm(dim=1).amax()
        reached.append(float((K * unit).sum()))
    assert reached[0] < reached[1] < reached[2]


# One kernel, in a model.


def test_the_result_is_one_plain_kernel() -> None:
    layer = Net(4, 6, (3, 3), (2, 2), (1, 1), 1, (8, 8), 0).layer((1, 1))
    x = torch.randn(2, 4, 8, 8)
    y = layer(x)
    P.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert type(layer) is nn.Conv2d
    assert sorted(layer.state_dict()) == ["weight"]
    assert layer.weight.shape == (6, 4, 3, 3)
    assert torch.equal(layer(x), y)


def test_a_model_of_orthogonal_layers_is_stabilized_trained_and_exported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        GroupSort(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        GroupSort(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    stabilize(model, lipschitz=2.0, method={"conv": "bcop", "linear": "bro"})
    x = torch.randn(16, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    labels = torch.arange(16) % 10
    first = nn.functional.cross_entropy(model(x), labels)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.95 * first.item()
    assert 1.99 < lipschitz(model).upper <= 2.0
    plain = export(model)
    assert [type(m) for m in plain][::2] == [nn.Conv2d, nn.Conv2d, nn.Flatten]
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=0, atol=0)
    assert lipschitz(plain).upper <= 2.0


# Refusals.


def test_what_has_no_orthogonal_kernel_is_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="'bro'"):
        OrthogonalConv(Geometry("linear"))
    with pytest.raises(ValueError, match="l2"):
        OrthogonalConv(Geometry("conv"), 1.0, "linf")
    for mode in ("reflect", "replicate"):
        with pytest.raises(ValueError, match="copies"):
            OrthogonalConv(Geometry("conv", padding=(1,), padding_mode=mode), shape=(2, 2, 3))
        OrthogonalConv(Geometry("conv", padding=(0,), padding_mode=mode), shape=(2, 2, 3))
    with pytest.raises(ValueError, match="twice"):
        OrthogonalConv(Geometry("conv", padding=(2,), padding_mode="circular"), shape=(2, 2, 3))
    OrthogonalConv(Geometry("conv", padding=(2,), padding_mode="circular"), shape=(2, 2, 5))
    for shape in ((1, 1, 3), (4, 1, 3, 3)):
        with pytest.raises(ValueError, match="one input and one output"):
            OrthogonalConv(Geometry("conv", groups=shape[0]), shape=shape)
    OrthogonalConv(Geometry("conv", (2,), groups=4), shape=(4, 1, 3))  # with a stride there are two phases
    with pytest.raises(ValueError, match="groups"):
        OrthogonalConv(Geometry("conv", groups=3), shape=(4, 2, 3))
    with pytest.raises(ValueError, match="dimensions"):
        OrthogonalConv(Geometry("conv"), shape=(4, 2))


def test_depthwise_layers_have_only_shifts() -> None:
    """Why one channel is refused: a unimodular polynomial on the circle is a monomial, so a second tap breaks the law."""
    plain = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    for kernel, keeps in (([0.0, 0.0, 1.0], True), ([0.6, 0.0, 0.8], False), ([0.5, 0.5, -0.5], False)):
        plain.weight.data.copy_(torch.tensor([[kernel]]))
        assert keeps_norms(plain, (8,)) == keeps


def test_wrong_arguments_and_kernels_are_refused() -> None:
    for sweeps in (-1, 1.5, True):
        with pytest.raises(ValueError, match="sweeps"):
            OrthogonalConv(Geometry("conv"), sweeps=sweeps)
    limit = METHODS["bcop"](Geometry("conv"))
    with pytest.raises(RuntimeError, match="shape"):
        limit(torch.randn(3, 3))
    with pytest.raises(TypeError, match="floating"):
        limit.right_inverse(torch.ones(2, 2, 3, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN"):
            limit.right_inverse(torch.full((2, 2, 3), bad))
    limit.right_inverse(torch.randn(2, 2, 3))
    with pytest.raises(ValueError, match="got one of shape"):
        limit.right_inverse(torch.randn(2, 2, 5))
    assert "shape=(2, 2, 3)" in repr(limit)
    assert "divides=True" in repr(OrthogonalConv(Geometry("conv"), divides=True))


def test_no_number_in_an_entry_without_a_use_is_loud() -> None:
    layout = Layout(1, 4, 4, (3,), (2,), (1,))
    used = sum(
        part.numel()
        for part in (lambda s: [s[0], *([] if s[1] is None else [s[1]]), *s[2]])(
            layout.split(torch.zeros(layout.shape))
        )
    )
    limit = OrthogonalConv(Geometry("conv", (2,)), shape=(4, 4, 3))
    V = torch.randn(limit.layout.shape)
    for index in range(V.numel()) if used < V.numel() else range(3):
        broken = V.clone()
        broken.view(-1)[index] = math.nan
        assert not bool(limit(broken).isfinite().any())


# Rounding to what is stored.


def conference(q: int) -> Tensor:
    """The squares modulo q: two values per row, of which rounding one up and one down adds up in a single direction."""
    squares = {x * x % q for x in range(1, q)}
    return torch.tensor([[(j - i) % q in squares for j in range(q)] for i in range(q)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("up", "down"), [(182.0, 229.0), (229.0, 182.0), (137.0, 171.0)])
def test_rounding_that_adds_up_stays_within_the_radius(dtype: torch.dtype, up: float, down: float) -> None:
    V = torch.where(conference(59), up, -down).to(dtype)
    W = OrthogonalConv(Geometry("conv"), shape=(59, 59, 1))(V)
    assert float(torch.linalg.matrix_norm(W[..., 0].double(), 2)) <= 1.0


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (16, 16, 5, 5), (16, 32, 9)])
def test_ordinary_kernels_lose_little_to_rounding(dtype: torch.dtype, lost: float, shape: tuple[int, ...]) -> None:
    limit = OrthogonalConv(Geometry("conv"), shape=shape)
    W = limit(torch.randn(limit.layout.shape).to(dtype))
    assert 1.0 - lost < Geometry("conv").proved(W).upper <= 1.0


@pytest.mark.parametrize("radius", [1e-3, 3e-5])
def test_a_radius_at_the_end_of_float16_is_kept(radius: float) -> None:
    limit = OrthogonalConv(Geometry("conv"), radius, shape=(32, 32, 3, 3))
    W = limit(torch.randn(limit.layout.shape).half())
    assert Geometry("conv").proved(W).upper <= radius
