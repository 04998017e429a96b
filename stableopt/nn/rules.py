r"""The Lipschitz rules of torch's layers and of ours, and the bound of a whole model.

Each rule bounds the smallest :math:`L` with :math:`\|f(x) - f(y)\| \le L\|x - y\|` for all inputs, for the stored numbers and in
real arithmetic. A module that has no rule is refused, and so is an option of a layer that a rule does not cover.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, conv_norm, inf_norm, one_norm, spectral_norm
from stableopt.nn.activations import GroupSort, Scale
from stableopt.nn.blocks import GradientBlock
from stableopt.nn.dispatch import check_forward, lipschitz_rule, named, registered_class, require_l2_or_linf
from stableopt.nn.layers import layers

__all__ = ["conv_padding", "lipschitz", "rule_bound"]

GELU_SLOPE = 1.1289041451851549
r"""Largest slope of :math:`x\Phi(x)`, at :math:`x = \sqrt2`: :math:`(1 + \operatorname{erf} 1)/2 + e^{-1}/\sqrt\pi`, rounded up."""
GELU_TANH_SLOPE = 1.1289930686587719
"""Largest slope of the tanh approximation of GELU, at 1.4185040088, rounded up."""
SILU_SLOPE = 1.0998393201288670
r"""Largest slope of :math:`x/(1 + e^{-x})`, at 2.3993572805, rounded up."""


def lipschitz(module: nn.Module, norm: str = "l2") -> Bound:
    r"""Bound the Lipschitz constant of the map that ``module`` computes in evaluation mode.

    .. math:: \|f(x) - f(y)\| \le L \|x - y\| \quad\text{for all } x, y .

    Args:
        module: a layer with a rule, or nested :class:`torch.nn.Sequential` of such layers. It is left as it is, in its mode.
        norm: ``"l2"``, or ``"linf"`` for the largest absolute value, both at the input and at the output.

    Returns:
        An enclosure of the smallest :math:`L`; its upper end is proved for the numbers stored now and counts the rounding in its
        own computation. For a chain it is the product of the layers' bounds and the lower end is 0.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if the norm is unknown, or a weight holds NaN or infinity.
        UncertifiableError: if no rule is known for a module or for an option of it.

    Note:
        It is a statement about the map in real arithmetic. The rounding of a forward pass itself is not covered.

    References:
        Szegedy et al., *Intriguing Properties of Neural Networks*, 2014, section 4.3 (the product of layer bounds).

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].weight, 1.0)
        >>> bool(2.0 <= lipschitz(model).upper < 2.0 + 1e-12)
        True
        >>> lipschitz(nn.LayerNorm(2))
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: no l2 Lipschitz rule is known for LayerNorm. ...
    """
    require_l2_or_linf(norm)
    if not isinstance(module, nn.Module):
        raise TypeError(f"lipschitz needs a torch.nn.Module, got {type(module).__name__}.")
    with _evaluated(module), torch.no_grad():
        bounds = [rule_bound(layer, norm, path) for path, layer in layers(module)]
    if len(bounds) == 1:
        return bounds[0]
    product = Bound.point(1.0)
    for bound in bounds:
        product = product * Bound(0.0, bound.upper, bound.proved)
    return product


def rule_bound(layer: nn.Module, norm: str, path: str = "") -> Bound:
    """Return the bound of one layer by the rule of its class, after checking that the rule applies.

    Args:
        layer: a layer as yielded by :func:`stableopt.nn.layers`.
        norm: ``"l2"`` or ``"linf"``.
        path: dotted name for messages.

    Raises:
        UncertifiableError: if there is no rule, or it does not apply.
        ValueError: if a weight holds NaN or infinity.

    Examples:
        >>> rule_bound(nn.Sigmoid(), "l2")
        Bound(lower=0.25, upper=0.25, proved=True)
    """
    kind = registered_class(layer)
    if kind is not None:
        check_forward(layer, kind, path)
    try:
        return lipschitz_rule(layer, norm)
    except UncertifiableError as error:
        if not path:
            raise
        raise UncertifiableError(f"in {named(layer, path)}: {error}") from error


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Put every part of ``module`` into evaluation mode for the duration."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


# Affine layers.


@lipschitz_rule.register(nn.Linear)
def _linear(module: nn.Linear, norm: str) -> Bound:
    return spectral_norm(module.weight) if norm == "l2" else inf_norm(module.weight)


@lipschitz_rule.register(nn.Conv1d)
@lipschitz_rule.register(nn.Conv2d)
def _conv(module: nn.Conv1d | nn.Conv2d, norm: str) -> Bound:
    weight = module.weight
    if norm == "linf":  # every padding mode puts zeros or copies of pixels around the image: no linf expansion
        return Bound(0.0, inf_norm(weight.flatten(1)).upper)
    conv_padding(module)
    return conv_norm(weight, groups=module.groups)


def conv_padding(module: nn.Conv1d | nn.Conv2d, path: str = "") -> None:
    """Refuse a convolution whose padding can make it larger than the operator that ``conv_norm`` bounds.

    Args:
        module: the convolution.
        path: dotted name for the message.

    Raises:
        UncertifiableError: unless the padding is zeros, or circular of total width at most ``dilation * (kernel - 1)`` per axis.

    Examples:
        >>> conv_padding(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"))
        >>> conv_padding(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"))
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: the module (Conv1d) has padding_mode='reflect' ...
    """
    mode, padding = module.padding_mode, module.padding
    if mode == "zeros" or padding in {"same", "valid"}:
        if mode in {"zeros", "circular"} or padding == "valid":
            return
    elif mode == "circular":
        fits = [2 * int(p) <= d * (k - 1) for p, d, k in zip(padding, module.dilation, module.kernel_size, strict=True)]
        if all(fits):
            return
        raise UncertifiableError(
            f"{named(module, path)} has circular padding {padding}, wider than the kernel reaches: it repeats outputs. "
            f"An l2 bound is known for padding up to dilation * (kernel_size - 1) / 2 per axis."
        )
    raise UncertifiableError(
        f"{named(module, path)} has padding_mode={mode!r}, which copies pixels and can exceed the norm of the kernel. "
        "An l2 bound is known for padding_mode='zeros' and 'circular' (a linf bound for all)."
    )


@lipschitz_rule.register(Scale)
def _scale(module: Scale, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(abs(module.factor))


# Activations: the largest slope, the same in every norm.


def _constant(value: float) -> Bound:
    return Bound(0.0, value)


@lipschitz_rule.register(nn.Identity)
@lipschitz_rule.register(nn.Flatten)
@lipschitz_rule.register(nn.Unflatten)
@lipschitz_rule.register(nn.Dropout)
@lipschitz_rule.register(nn.Dropout1d)
@lipschitz_rule.register(nn.Dropout2d)
@lipschitz_rule.register(nn.ReLU)
@lipschitz_rule.register(nn.Tanh)
@lipschitz_rule.register(GroupSort)
def _one(module: nn.Module, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(1.0)


@lipschitz_rule.register(nn.Sigmoid)
def _sigmoid(module: nn.Sigmoid, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(0.25)


@lipschitz_rule.register(nn.Hardtanh)
def _hardtanh(module: nn.Hardtanh, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(1.0)


@lipschitz_rule.register(nn.Softplus)
def _softplus(module: nn.Softplus, norm: str) -> Bound:  # noqa: ARG001
    if not (module.beta > 0 and module.threshold >= 20):
        raise UncertifiableError(
            f"Softplus(beta={module.beta}, threshold={module.threshold}) jumps where it switches to the identity; "
            "a bound is known for beta > 0 and threshold >= 20, where the jump is 2e-9 / beta and counts as rounding."
        )
    return Bound.point(1.0)


@lipschitz_rule.register(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(max(1.0, _finite(module.negative_slope, "negative_slope")))


@lipschitz_rule.register(nn.ELU)
def _elu(module: nn.ELU, norm: str) -> Bound:  # noqa: ARG001
    return Bound.point(max(1.0, _finite(module.alpha, "alpha")))


@lipschitz_rule.register(nn.GELU)
def _gelu(module: nn.GELU, norm: str) -> Bound:  # noqa: ARG001
    return _constant(GELU_SLOPE if module.approximate == "none" else GELU_TANH_SLOPE)


@lipschitz_rule.register(nn.SiLU)
def _silu(module: nn.SiLU, norm: str) -> Bound:  # noqa: ARG001
    return _constant(SILU_SLOPE)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    return abs(float(value))


# Pooling.


def _axes(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


@lipschitz_rule.register(nn.AvgPool1d)
@lipschitz_rule.register(nn.AvgPool2d)
def _avg_pool(module: nn.AvgPool1d | nn.AvgPool2d, norm: str) -> Bound:
    r"""Bound an average over windows of k pixels at distance s, per axis.

    In linf it is 1. In l2, split the taps by their place modulo s: with k = qs + r, r classes have q + 1 taps and s - r have q. An
    output reads one pixel of each class, so its symbol is a row of s polynomials with coefficients 1/k, whose length is largest at
    frequency 0: :math:`\sqrt{r(q+1)^2 + (s-r)q^2}\,/\,k`, which large images attain.
    """
    dims = 1 if isinstance(module, nn.AvgPool1d) else 2
    padding = _axes(module.padding, dims)
    if module.ceil_mode or (any(padding) and not module.count_include_pad) or getattr(module, "divisor_override", None):
        raise UncertifiableError(
            f"{module} divides by a number of pixels that varies or is overridden; a bound is known for ceil_mode=False, "
            "count_include_pad=True and no divisor_override."
        )
    if norm == "linf":
        return _constant(1.0)
    product = Bound.point(1.0)
    for k, s in zip(_axes(module.kernel_size, dims), _axes(module.stride, dims), strict=True):
        q, r = divmod(k, s)
        product = product * (Bound.point(r * (q + 1) ** 2 + (s - r) * q**2).sqrt() / k)
    return _constant(product.upper)


@lipschitz_rule.register(nn.MaxPool1d)
@lipschitz_rule.register(nn.MaxPool2d)
def _max_pool(module: nn.MaxPool1d | nn.MaxPool2d, norm: str) -> Bound:
    r"""Bound a maximum over windows by the root of the number of windows that share a pixel.

    The taps that read one pixel are those with the same jd modulo s, at most :math:`\lceil k \gcd(d, s) / s \rceil` per axis.
    """
    if module.return_indices:
        raise UncertifiableError(f"{module} also returns indices; a bound is known for return_indices=False.")
    if norm == "linf":
        return _constant(1.0)
    dims = 1 if isinstance(module, nn.MaxPool1d) else 2
    sizes = zip(_axes(module.kernel_size, dims), _axes(module.stride, dims), _axes(module.dilation, dims), strict=True)
    windows = math.prod(-(-k * math.gcd(d, s) // s) for k, s, d in sizes)
    return _constant(Bound.point(windows).sqrt().upper)


# Blocks.


@lipschitz_rule.register(GradientBlock)
def _gradient_block(module: GradientBlock, norm: str) -> Bound:
    r"""Bound :math:`I - \tau(mI + A^\top D A)`, :math:`0 \preceq D \preceq I`.

    In l2 by the ends of its spectrum, in linf by :math:`|1 - \tau m| + \tau\|A^\top\|_\infty\|A\|_\infty` (loose, above 1).
    """
    tau = float(module.step_size())
    if not math.isfinite(tau) or not bool(module.bias.isfinite().all()):
        raise ValueError(f"no bound holds for a GradientBlock with NaN or infinite parameters (step {tau}).")
    smallest = abs(1.0 - Bound.point(tau) * module.strong)
    if norm == "linf":
        return _constant((smallest + tau * one_norm(module.weight) * inf_norm(module.weight)).upper)
    U = spectral_norm(module.weight).upper
    largest = abs(1.0 - Bound.point(tau) * (Bound.point(module.strong) + Bound.point(U) ** 2))
    return _constant(smallest.join(largest).upper)


@lipschitz_rule.register(nn.Sequential)
def _sequential(module: nn.Sequential, norm: str) -> Bound:
    return lipschitz(module, norm)
