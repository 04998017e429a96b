r"""A Lipschitz limit for a whole model, kept at every step of the training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.constraints import Orthogonal, SpectralBall, attached
from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, gram_conv_norm, gram_norm
from stableopt.nn.blocks import GradientBlock, full_precision
from stableopt.nn.constrain import check_parameter, constraint_of, parametrizations_of, projections
from stableopt.nn.dispatch import check_forward, named, registered_class
from stableopt.nn.layers import layers
from stableopt.nn.rules import conv_padding, rule_bound

__all__ = ["NormLimit", "layer_limit", "stabilize"]

_Limited: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d
_LIMITED = nn.Linear | nn.Conv1d | nn.Conv2d
_INITS = ("rescale", "orthogonal", "keep")


class NormLimit(nn.Module):
    r"""Parametrization of a weight by one whose operator norm stays within a radius.

    .. math:: V \mapsto V \min\Bigl(1, \frac{\text{radius}}{U(V)}\Bigr), \qquad U(V) \ge \|V\| .

    :math:`U` is the Gram bound of a matrix or of a convolution kernel (whose norm is that of the operator on images of any size).
    The result depends on :math:`V` only: there is no state, no history, no difference between training and evaluation, and a jump
    of the weight is followed at once.

    Args:
        radius: the limit, positive.
        groups: groups of a convolution.

    Raises:
        ValueError: if ``radius`` is not positive and finite.

    Note:
        The result is shrunk further by a small multiple of the machine precision, against rounding in :math:`U` and in the
        product. That makes it at most ``radius`` in practice, also in half precision; the proof is made by
        :func:`stableopt.nn.lipschitz` for the weight that is there.

    Examples:
        >>> limit = NormLimit(1.0)
        >>> bool(torch.linalg.matrix_norm(limit(10.0 * torch.ones(2, 3)), 2) <= 1.0)
        True
        >>> limit(0.1 * torch.eye(2)).equal(0.1 * torch.eye(2))
        True
    """

    def __init__(self, radius: float, groups: int = 1) -> None:
        super().__init__()
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"radius must be positive and finite, got {radius!r}.")
        self.radius = float(radius)
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, scaled down if its norm may exceed the radius."""
        wide = weight.float() if weight.dtype in {torch.float16, torch.bfloat16} else weight
        with full_precision(wide):
            norm = gram_norm(wide) if wide.ndim == 2 else gram_conv_norm(wide, groups=self.groups)
        target = self.radius * (1.0 - _slack(weight, wide))
        return (wide * (target / norm.clamp_min(target))).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return an original that is mapped to ``weight``, or to its rescaling if the norm exceeds the radius."""
        return weight

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"radius={self.radius}, groups={self.groups}"


def _slack(stored: Tensor, computed: Tensor) -> float:
    r"""Return the relative rounding to allow for: of the stored product, of the computed norm, and of the proof in float64.

    Rounding each entry by :math:`u` relative changes the norm by at most :math:`u\|W\|_F \le u\sqrt n\|W\|_2`.
    """
    if not stored.numel():
        return 0.0
    rank, terms = min(stored.shape[0], stored[0].numel()), stored.shape[0] + stored[0].numel()
    rounding = torch.finfo(stored.dtype).eps * math.sqrt(rank)
    return rounding + 2.0 * (terms + 8) * torch.finfo(computed.dtype).eps + 2.0**-52 * rank * terms


def stabilize(model: nn.Module, lipschitz: float = 1.0, *, init: str = "rescale") -> nn.Module:
    r"""Limit the l2 Lipschitz constant of a model, in place, for the whole training.

    Every Linear, Conv1d and Conv2d gets a :class:`NormLimit` on its weight, all with the same radius

    .. math:: r = (L / C)^{1/n},

    where :math:`L` is the limit, :math:`n` the number of these layers and :math:`C` the product of the constants of all the others
    (activations, pooling; a :class:`~stableopt.nn.GradientBlock` counts 1 and is left alone). So :math:`C r^n \le L`.

    Args:
        model: nested :class:`torch.nn.Sequential` of modules with a Lipschitz rule, or one layer.
        lipschitz: the limit :math:`L > 0` for the whole model.
        init: ``"rescale"`` scales every weight so that it starts at its limit, which keeps the signal alive; ``"orthogonal"``
            also replaces the weights by random orthogonal ones (for kernels, at the central tap), for training from scratch;
            ``"keep"`` leaves weights within the limit as they are, for a trained model.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``lipschitz`` is not positive and finite, the model has nothing to stabilize, is stabilized already, has a
            parametrized, projected, shared, lazy, NaN or infinite weight, or is wrapped for distributed training.
        UncertifiableError: if a module has no Lipschitz rule, or trainable parameters that would change its constant.

    Note:
        A refused model is left unchanged. Training needs no refresh of any kind. The limit holds up to rounding by construction;
        what is proved about the trained numbers is said by :func:`stableopt.nn.lipschitz` and by a certificate. For a convolution
        the proof may be looser than the construction, by at most 2 % per axis of the kernel.
        Beware that torch lets a ``deepcopy`` share the class of a parametrized layer: removing the parametrizations of the copy
        leaves the original without its weights.

    Examples:
        >>> from stableopt.nn import GroupSort, lipschitz
        >>> model = stabilize(nn.Sequential(nn.Linear(8, 16), GroupSort(), nn.Linear(16, 4)), lipschitz=2.0)
        >>> 1.5 < lipschitz(model).upper <= 2.0
        True
    """
    if not (math.isfinite(lipschitz) and lipschitz > 0):
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz!r}.")
    if init not in _INITS:
        raise ValueError(f"init must be one of {', '.join(_INITS)}, got {init!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"stabilize needs a torch.nn.Module, got {type(model).__name__}.")
    leaves = list(layers(model))
    limited = [(path, layer) for path, layer in leaves if isinstance(layer, _LIMITED)]
    if not limited:
        raise ValueError("stabilize found no Linear, Conv1d or Conv2d in the model, so there is no weight to limit.")
    for path, layer in limited:
        _check_layer(model, path, layer)
    radius = _radius(lipschitz, len(limited), _constant(leaves))
    limits = {layer: NormLimit(radius, _groups(layer)) for _, layer in limited}
    starts = {
        layer: _start(layer, limit, init) for layer, limit in limits.items()
    }  # what is refused is refused before here
    originals = {layer: layer.weight.detach().clone() for layer in limits}
    try:
        for layer, limit in limits.items():
            _assign(layer, starts[layer])
            P.register_parametrization(layer, "weight", limit)
    except BaseException:  # such as an interrupt: leave no half-limited model behind
        for layer, original in originals.items():
            if P.is_parametrized(layer, "weight"):
                P.remove_parametrizations(layer, "weight", leave_parametrized=False)
            _assign(layer, original)
        raise
    return model


@torch.no_grad()
def _assign(layer: _Limited, weight: Tensor) -> None:
    layer.weight.copy_(weight)


def layer_limit(module: nn.Module) -> float | None:
    r"""Return the limit that is enforced on the operator norm of a layer's weight, or None if there is none.

    Args:
        module: a layer; the limit comes from :func:`stabilize`, or from a SpectralBall or Orthogonal on ``"weight"``
            by :func:`stableopt.nn.constrain`, either as a parametrization or as a projection.

    Returns:
        The radius. It limits the weight after each forward map or optimizer step, up to rounding; nothing is proved.

    Examples:
        >>> layer_limit(nn.Linear(2, 2)) is None
        True
        >>> layer_limit(stabilize(nn.Linear(2, 2), 0.5))
        0.5
    """
    outermost = parametrizations_of(module, "weight")[-1:]
    if outermost:
        if isinstance(outermost[0], NormLimit):
            return outermost[0].radius
        constraint = constraint_of(outermost[0])
    else:
        weight = module._parameters.get("weight")  # noqa: SLF001 torch has no public accessor without inherited names
        constraint = projections(module).get("weight") or (None if weight is None else attached(weight))
    if isinstance(constraint, SpectralBall):
        return constraint.radius
    return 1.0 if isinstance(constraint, Orthogonal) else None


def _check_layer(model: nn.Module, path: str, layer: _Limited) -> None:
    if P.is_parametrized(layer, "weight"):
        kind = parametrizations_of(layer, "weight")[-1]
        what = (
            "is stabilized already"
            if isinstance(kind, NormLimit)
            else f"has the parametrization {type(kind).__name__} already"
        )
        raise ValueError(
            f"the weight of {named(layer, path)} {what}; remove it first: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
        )
    check_parameter(layer, "weight", path, root=model)
    if attached(layer.weight) is not None or "weight" in projections(layer):
        raise ValueError(
            f"the weight of {named(layer, path)} is constrained by projection already; choose one of the two."
        )
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        conv_padding(layer, path)


def _constant(leaves: Iterable[tuple[str, nn.Module]]) -> Bound:
    r"""Return a bound of the product of the constants of all layers whose weight is not going to be limited."""
    product = Bound.point(1.0)
    for path, layer in leaves:
        if isinstance(layer, _LIMITED | GradientBlock):  # a block is at most 1 for all parameter values, not only now
            kind = registered_class(layer)
            if kind is not None:
                check_forward(layer, kind, path)
            continue
        product = product * rule_bound(layer, "l2", path).upper
        if any(p.requires_grad for p in layer.parameters()):
            raise UncertifiableError(
                f"{named(layer, path)} has trainable parameters, so its Lipschitz constant may change while training; "
                "freeze them with requires_grad_(False), or replace it."
            )
    return product


def _radius(lipschitz: float, count: int, constant: Bound) -> float:
    r"""Return the largest float :math:`r` that is found with :math:`C r^n \le L` proved."""
    if constant.upper == 0.0 or not math.isfinite(constant.upper):
        raise ValueError(
            f"the layers without a weight have the constant {constant.upper}: no limit of the others can be set."
        )
    radius = (lipschitz / constant.upper) ** (1.0 / count)
    while (Bound.point(radius) ** count * constant).upper > lipschitz:
        radius = math.nextafter(radius, 0.0)
    return radius


def _start(layer: _Limited, limit: NormLimit, init: str) -> Tensor:
    """Return the weight to start from; for all inits but ``keep`` its norm is the limit, unless it is zero."""
    weight = layer.weight.detach().clone()
    if init == "orthogonal":
        weight = _orthogonal(weight, limit.groups)
    if init == "keep" or weight.is_meta or not bool(weight.any()):
        return weight
    wide = weight.double()
    norm = gram_norm(wide) if wide.ndim == 2 else gram_conv_norm(wide, groups=limit.groups)
    return (wide * (limit.radius / norm)).to(weight.dtype)


def _orthogonal(weight: Tensor, groups: int) -> Tensor:
    """Return a random weight with orthonormal rows or columns; of a kernel, the central tap of each group is that."""
    fresh = torch.zeros(weight.shape, dtype=torch.float64, device="cpu")
    center = tuple((k - 1) // 2 for k in weight.shape[2:])
    for part in fresh[(..., *center)].chunk(groups):
        part.copy_(nn.init.orthogonal_(torch.empty(part.shape, dtype=torch.float64)))
    return fresh.to(weight)


def _groups(layer: _Limited) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups
