"""Laws of the Lipschitz rules: valid on every input, tight as stated, closed to everything else."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn import GradientBlock, GroupSort, Scale, lipschitz, lipschitz_rule
from stableopt.nn.rules import GELU_SLOPE, GELU_TANH_SLOPE, SILU_SLOPE
from tests.nn.catalogue import AFFINE, CATALOGUE, ORDERS, Row, jacobian, operator_norm

EPS = torch.finfo(torch.float64).eps


def cases(rows: list[Row]) -> list[object]:
    return [pytest.param(row, norm, id=f"{row.name} {norm}") for row in rows for norm in row.norms]


@pytest.mark.parametrize(("row", "norm"), cases(CATALOGUE))
def test_no_pair_of_inputs_is_spread_by_more_than_the_bound(row: Row, norm: str) -> None:
    module = row.make().eval()
    bound = lipschitz(module, norm)
    p = ORDERS[norm]
    assert bound.proved
    for scale in (1e-3, 1.0, 30.0):
        for distance in (1e-2, 1.0, 10.0):
            x = scale * torch.randn(40, *row.shape[1:])
            y = x + distance * torch.randn_like(x)
            with torch.no_grad():
                fx, fy = module(x).flatten(1), module(y).flatten(1)
            spread = torch.linalg.vector_norm(fx - fy, p, dim=1)
            gap = torch.linalg.vector_norm((x - y).flatten(1), p, dim=1)
            rounding = (
                64 * EPS * max(1, x[0].numel()) * (fx.norm(dim=1) + fy.norm(dim=1) + x.flatten(1).norm(dim=1) + 1)
            )
            assert (spread <= bound.upper * gap + rounding).all()


@pytest.mark.parametrize(("row", "norm"), cases(CATALOGUE))
def test_no_jacobian_exceeds_the_bound(row: Row, norm: str) -> None:
    module = row.make().eval()
    bound = lipschitz(module, norm)
    for scale in (0.3, 3.0):
        J = jacobian(module, scale * torch.randn(row.shape))
        assert operator_norm(J, norm) <= bound.upper * (1 + 64 * EPS * max(J.shape))


@pytest.mark.parametrize("row", [row for row in AFFINE if row.tightness is not None], ids=lambda row: row.name)
def test_an_affine_bound_is_as_tight_as_stated(row: Row) -> None:
    module = row.make().eval()
    exact = operator_norm(jacobian(module, torch.randn(row.shape)), "l2")
    bound = lipschitz(module)
    assert bound.lower <= exact * (1 + 64 * EPS)
    assert row.tightness is not None
    assert bound.upper <= exact * row.tightness * (1 + 64 * EPS)


@pytest.mark.parametrize("row", AFFINE, ids=lambda row: row.name)
def test_the_linf_bound_of_an_affine_layer_is_attained(row: Row) -> None:
    if "linf" not in row.norms:
        return
    module = row.make().eval()
    exact = operator_norm(jacobian(module, torch.randn(row.shape)), "linf")
    interior_missing = {"conv1d stride 3 dilation 3", "conv2d wide zeros", "avg 2d mixed"}
    if row.name not in interior_missing:
        assert lipschitz(module, "linf").upper <= exact * (1 + 64 * EPS)


def test_a_linear_layer_gets_both_ends() -> None:
    layer = nn.Linear(6, 4)
    bound = lipschitz(layer)
    exact = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    assert bound.lower <= exact * (1 + 64 * EPS)
    assert exact <= bound.upper * (1 + 64 * EPS)
    assert bound.width < 1e-11 * exact


@pytest.mark.parametrize(
    ("module", "slope", "at"),
    [
        (nn.GELU(), GELU_SLOPE, math.sqrt(2)),
        (nn.GELU(approximate="tanh"), GELU_TANH_SLOPE, 1.418504008790828355548),
        (nn.SiLU(), SILU_SLOPE, 2.399357280515467667833),
        (nn.Sigmoid(), 0.25, 0.0),
        (nn.Tanh(), 1.0, 0.0),
        (nn.ELU(1.5), 1.5, -1e-12),
        (nn.LeakyReLU(-1.7), 1.7, -1.0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_the_constant_of_an_activation_is_its_largest_slope(module: nn.Module, slope: float, at: float) -> None:
    x = torch.tensor([at], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs()) == pytest.approx(slope, rel=1e-11)
    assert lipschitz(module).upper == slope
    grid = torch.linspace(-12, 12, 200_001, requires_grad=True)
    module(grid).sum().backward()
    assert grid.grad is not None
    assert float(grid.grad.abs().max()) <= slope * (1 + 8 * EPS)


def test_the_constants_are_rounded_up() -> None:
    with mpmath.workdps(50):
        gelu = (1 + mpmath.erf(1)) / 2 + mpmath.exp(-1) / mpmath.sqrt(mpmath.pi)
        silu = max_slope(lambda x: x / (1 + mpmath.exp(-x)), 2.4)
        k = mpmath.sqrt(2 / mpmath.pi)
        tanh = max_slope(lambda x: x / 2 * (1 + mpmath.tanh(k * (x + mpmath.mpf("0.044715") * x**3))), 1.4)
        for exact, constant in ((gelu, GELU_SLOPE), (silu, SILU_SLOPE), (tanh, GELU_TANH_SLOPE)):
            assert exact <= mpmath.mpf(constant) <= exact * (1 + mpmath.mpf(10) ** -15)


def max_slope(f: object, start: float) -> mpmath.mpf:
    x = mpmath.findroot(lambda t: mpmath.diff(f, t, 2), start)
    return mpmath.diff(f, x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_overlapping_maxima_attain_the_root_of_the_number_of_windows(norm: str) -> None:
    """One bright pixel is the maximum of every window that holds it."""
    pool = nn.MaxPool2d(3, stride=1)
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1.0
    y = 2 * x
    p = 2 if norm == "l2" else math.inf
    ratio = torch.linalg.vector_norm(pool(y) - pool(x), p) / torch.linalg.vector_norm(y - x, p)
    assert float(ratio) == pytest.approx(lipschitz(pool, norm).upper)
    assert lipschitz(pool, norm).upper == (3.0 if norm == "l2" else 1.0)


@given(k=st.integers(1, 6), s=st.integers(1, 6))
def test_the_norm_of_an_average_is_attained_by_long_signals(k: int, s: int) -> None:
    pool = nn.AvgPool1d(k, stride=s)
    n = 8 * k * s + k
    J = jacobian(pool, torch.zeros(1, 1, n))
    exact = operator_norm(J, "l2")
    assert exact <= lipschitz(pool).upper * (1 + 1e-13)
    assert lipschitz(pool).upper <= 1.06 * exact


@given(k=st.integers(1, 4), s=st.integers(1, 4), d=st.integers(1, 4))
def test_the_windows_that_share_a_pixel_are_counted_exactly(k: int, s: int, d: int) -> None:
    n = 60
    taps = [[w * s + j * d for j in range(k)] for w in range((n - (k - 1) * d - 1) // s + 1)]
    most = max(sum(pixel in window for window in taps) for pixel in range(n))
    assert lipschitz(nn.MaxPool1d(k, stride=s, dilation=d)).upper == pytest.approx(math.sqrt(most), rel=1e-15)


def test_a_chain_multiplies_and_repeats_count_twice() -> None:
    layer = nn.Linear(3, 3, bias=False)
    nn.init.eye_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    chain = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer, Scale(0.5)))
    assert lipschitz(chain).upper == pytest.approx(2.0, rel=1e-12)
    assert lipschitz(chain).lower == 0.0
    assert lipschitz(nn.Sequential()) == Bound.point(1.0)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.Conv2d(2, 3, 3), lambda: GradientBlock(3)])
def test_zero_weights_have_a_bound_and_nan_weights_have_none(make: object) -> None:
    module = make()  # type: ignore[operator]
    nn.init.zeros_(module.weight)
    assert lipschitz(module).upper == (1.0 if isinstance(module, GradientBlock) else 0.0)
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            module.weight.view(-1)[0] = bad
        for norm in ("l2", "linf", "l1"):
            with pytest.raises(ValueError, match="NaN or inf"):
                lipschitz(module, norm)


def test_the_bound_is_of_the_evaluation_map_and_leaves_the_mode_alone() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(20, 20)), nn.Dropout(0.9))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bound = lipschitz(model)
    assert [part.training for part in model] == [True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    exact = float(torch.linalg.matrix_norm(model[0].eval().weight.detach(), 2))
    assert exact <= bound.upper <= exact * (1 + 1e-10)


def test_float32_and_bfloat16_weights_are_read_exactly() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = nn.Linear(7, 5).to(dtype)
        exact = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
        assert exact / (1 + 1e-13) <= lipschitz(layer).upper <= exact * (1 + 1e-10)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Sneaky(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 3 * weight, bias)


class Called(nn.ReLU):
    def __call__(self, x):
        return 5 * super().__call__(x)


class LongStep(GradientBlock):
    def step_size(self):
        return 10 * super().step_size()


class Backwards(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


class Unknown(nn.Module):
    def forward(self, x):
        return x


class OnlyBuilt(nn.Linear):
    def __init__(self, n):
        super().__init__(n, n)

    def extra_repr(self):
        return "mine"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(self.inner(x))


def patched() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda x: 7 * x  # type: ignore[method-assign]
    return layer


def hooked(kind: str) -> nn.Module:
    layer = nn.Linear(2, 2)
    getattr(layer, kind)(lambda *args: None)
    return layer


REFUSED = [
    ("unknown class", lambda: Unknown(), "l2", r"Unknown.*lipschitz_rule\.register\(Unknown\)"),
    (
        "batch norm",
        lambda: nn.BatchNorm1d(2, track_running_stats=False),
        "linf",
        "no linf Lipschitz rule is known for BatchNorm1d",
    ),
    ("no eps", lambda: nn.RMSNorm(2), "l2", "pass eps"),
    ("zero eps", lambda: nn.LayerNorm(2, eps=0.0), "l2", "positive eps"),
    ("group norm linf", lambda: nn.GroupNorm(1, 2), "linf", "grows with the number of entries"),
    ("instance norm l1", lambda: nn.InstanceNorm1d(2), "l1", "grows with the number of entries"),
    ("bicubic", lambda: nn.Upsample(scale_factor=2, mode="bicubic"), "linf", "negative weights"),
    ("corners", lambda: nn.UpsamplingBilinear2d(scale_factor=2), "l2", "align_corners"),
    ("one factor", lambda: nn.Upsample(scale_factor=2), "l2", "scale_factor per axis"),
    ("unknown mode", lambda: nn.Upsample(scale_factor=2, mode="foo"), "l2", "mode 'foo', which is no mode with a rule"),
    (
        "meta",
        lambda: nn.Sequential(nn.Linear(2, 2, device="meta")),
        "l2",
        r"'0' \(Linear\) is on the meta device.*to_empty",
    ),
    ("one size", lambda: nn.Upsample(size=2), "l1", "size per axis"),
    ("odd power", lambda: nn.LPPool1d(3, 2), "l2", "even numbers"),
    ("ceil power", lambda: nn.LPPool1d(2, 2, ceil_mode=True), "l2", "ceil_mode=False"),
    ("adaptive indices", lambda: nn.AdaptiveMaxPool1d(2, return_indices=True), "l2", "indices"),
    ("lazy", lambda: nn.LazyLinear(2), "l2", "run it once"),
    ("container", lambda: Twice(), "l2", "runs its children"),
    ("path", lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.MSELoss())), "l2", r"'1\.0' \(MSELoss\)"),
    ("subclass forward", lambda: Doubled(2, 2), "l2", "overrides forward of Linear"),
    ("subclass _conv_forward", lambda: Sneaky(1, 1, 3), "l2", "overrides _conv_forward"),
    ("subclass __call__", lambda: Called(), "l2", "overrides __call__"),
    ("subclass step", lambda: LongStep(2), "l2", "overrides step_size"),
    ("subclass of Sequential", lambda: Backwards(nn.ReLU()), "l2", "overrides forward of Sequential"),
    ("patched instance", patched, "l2", "overrides forward"),
    ("forward hook", lambda: hooked("register_forward_hook"), "l2", "forward hook"),
    ("forward pre-hook", lambda: hooked("register_forward_pre_hook"), "linf", "forward hook"),
    ("indices", lambda: nn.MaxPool1d(2, return_indices=True), "l2", "indices"),
    ("jumping softplus", lambda: nn.Softplus(threshold=1.0), "l2", "jumps"),
    ("infinite softplus", lambda: nn.Softplus(beta=math.inf), "l2", "finite beta"),
    ("circular crop", lambda: nn.CircularPad2d((-1, 3, 0, 3)), "l2", "crops one side and wraps another"),
    ("circular crop 1d", lambda: nn.CircularPad1d((2, -1)), "linf", "crops one side and wraps another"),
    ("compiled", lambda: torch.compile(nn.ReLU(), backend="eager"), "l2", "OptimizedModule"),
]


@pytest.mark.parametrize(("make", "norm", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_has_no_rule_is_refused(make: object, norm: str, message: str) -> None:
    with pytest.raises(UncertifiableError, match=message):
        lipschitz(make(), norm)  # type: ignore[operator]


def test_what_is_refused_is_refused_for_a_reason() -> None:
    """Each of these computes something that the rule of its base class would under-estimate."""
    circular = nn.Conv1d(1, 1, 3, padding=2, padding_mode="circular", bias=False)
    nn.init.constant_(circular.weight, 1.0)
    from stableopt.linalg import conv_norm

    assert operator_norm(jacobian(circular, torch.zeros(1, 1, 4)), "l2") > conv_norm(circular.weight).upper
    replicate = nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate", bias=False)
    nn.init.constant_(replicate.weight, 1.0)
    assert operator_norm(jacobian(replicate, torch.zeros(1, 1, 2, 2)), "l2") <= conv_norm(replicate.weight).upper
    nn.init.zeros_(replicate.weight)
    with torch.no_grad():
        replicate.weight[0, 0, 0, 0] = 1.0
    assert operator_norm(jacobian(replicate, torch.zeros(1, 1, 3, 3)), "l2") > 1.5 * conv_norm(replicate.weight).upper


def test_a_subclass_that_only_constructs_inherits_the_rule() -> None:
    layer = OnlyBuilt(3)
    assert lipschitz(layer) == lipschitz_rule(layer, "l2")
    assert lipschitz(nn.ReLU6()).upper == 1.0


def test_a_parametrized_layer_is_bounded_by_what_it_computes() -> None:
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    assert lipschitz(layer).upper == pytest.approx(1.0, rel=1e-12)


def test_a_registered_container_is_one_layer() -> None:
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return x + self.inner(x)

    @lipschitz_rule.register(Residual)
    def _(module: Residual, norm: str) -> Bound:
        return 1.0 + lipschitz(module.inner, norm)

    module = Residual()
    assert lipschitz(nn.Sequential(module, nn.ReLU())).upper == pytest.approx(1 + lipschitz(module.inner).upper)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'l2', 'linf', 'l1' and 'token_max', got 'l3'"):
        lipschitz(nn.ReLU(), "l3")
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        lipschitz(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative_slope must be finite"):
        lipschitz(nn.LeakyReLU(math.nan))


def test_groupsort_of_images_acts_on_channels() -> None:
    assert lipschitz(nn.Sequential(nn.Conv2d(1, 4, 1), GroupSort(4))).proved


@pytest.mark.parametrize(
    "register",
    [torch.nn.modules.module.register_module_forward_hook, torch.nn.modules.module.register_module_forward_pre_hook],
)
def test_a_hook_for_all_modules_is_refused_while_it_is_there(register: object) -> None:
    handle = register(lambda *_: None)  # type: ignore[operator]
    try:
        with pytest.raises(UncertifiableError, match=r"registered for all modules.*Sequential.*remove\(\)"):
            lipschitz(nn.Sequential(nn.ReLU()))
    finally:
        handle.remove()
    assert lipschitz(nn.Sequential(nn.ReLU())).upper == 1.0


def test_a_hook_of_this_package_only_looks_on() -> None:
    from stableopt.optim.modules import buffers_put_back

    with buffers_put_back(lambda: None):
        assert lipschitz(nn.ReLU()).upper == 1.0


def test_options_may_be_integers_of_numpy() -> None:
    two = np.int64(2)
    for module, twin in (
        (nn.MaxPool2d(two, stride=np.int64(1)), nn.MaxPool2d(2, stride=1)),
        (nn.AvgPool2d((two, 3)), nn.AvgPool2d((2, 3))),
        (nn.Unfold(two), nn.Unfold(2)),
        (nn.Upsample(size=(two, two)), nn.Upsample(size=(2, 2))),
        (nn.Upsample(size=two, mode="bilinear"), nn.Upsample(size=2, mode="bilinear")),
    ):
        assert lipschitz(module) == lipschitz(twin)
    with pytest.raises(ValueError, match=r"expected an integer or 2 of them, got 1\.5"):
        lipschitz(nn.MaxPool2d(1.5))  # type: ignore[arg-type]


def test_a_nearest_upsampling_of_images_knows_its_axes() -> None:
    for layer, copies in ((nn.UpsamplingNearest2d(size=4), 16), (nn.UpsamplingNearest2d(scale_factor=2), 4)):
        assert [lipschitz(layer, norm).upper for norm in ("l2", "linf", "l1")] == [math.sqrt(copies), 1.0, copies]
    J = jacobian(nn.UpsamplingNearest2d(size=4), torch.zeros(1, 1, 1, 1))
    assert operator_norm(J, "l1") == 16


def test_a_prelu_without_channels_has_a_constant() -> None:
    assert lipschitz(nn.PReLU(0)).upper == 1.0
