r"""Weights: what a parametrization claims of a norm, and the proved norm of the operator that the layer makes of the weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.certify.audit.findings import Finding, Witness
from stableopt.certify.audit.scene import Scene, called
from stableopt.certify.audit.search import linear_gain, quotient
from stableopt.linalg import Bound, conv_norm, spectral_norm
from stableopt.nn import Geometry

__all__ = ["claims", "claimed_norms", "grade", "padded_convolutions"]

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_ORTHOGONAL = ("Orthogonal", "Stiefel", "SO", "Grassmannian", "Unitary")
_SIDE = 16
_WORDS = {
    "spectral norm": "divides by the estimate of a power iteration, which is below the true norm",
    "orthogonal": "is orthogonal only up to rounding",
    "weight norm": "limits the length of the rows, not the norm of the operator",
}
_CONV = "acts on the kernel as a matrix, which is not the operator that the convolution makes of it"


def claims(module: nn.Module) -> list[tuple[str, str, float]]:
    """Return what is claimed of the weights of a layer: name of the tensor, name of the claim, and the norm.

    Read from the parametrizations of torch and geotorch and from the hooks of the old ``spectral_norm`` and ``weight_norm``. A
    parametrization of somebody else is called by its class, with the norm NaN; those of this package are not listed, nor any
    tensor of which one of them is the last word.

    Examples:
        >>> claims(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
        [('weight', 'spectral norm', 1.0)]
    """
    found: list[tuple[str, str, float]] = []
    if P.is_parametrized(module):
        chains: Any = module.get_submodule("parametrizations")
        for name, chain in chains.items():
            last = chain[len(chain) - 1]
            if not type(last).__module__.startswith("stableopt."):
                found.append((name, *_claim(last)))
    for hook in module._forward_pre_hooks.values():  # noqa: SLF001 torch has no public accessor
        kind = f"{type(hook).__module__}.{type(hook).__name__}"
        if kind == "torch.nn.utils.spectral_norm.SpectralNorm":
            found.append((str(vars(hook)["name"]), "spectral norm", 1.0))
        elif kind == "torch.nn.utils.weight_norm.WeightNorm":
            found.append((str(vars(hook)["name"]), "weight norm", math.nan))
    return found


def _claim(parametrization: nn.Module) -> tuple[str, float]:
    kind = type(parametrization)
    if kind.__module__ == "torch.nn.utils.parametrizations":
        known = {
            "_SpectralNorm": ("spectral norm", 1.0),
            "_Orthogonal": ("orthogonal", 1.0),
            "_WeightNorm": ("weight norm", math.nan),
        }
        if kind.__name__ in known:
            return known[kind.__name__]
    if kind.__module__.startswith("geotorch") and kind.__name__.startswith(_ORTHOGONAL):
        return "orthogonal", 1.0
    return kind.__name__, math.nan


def claimed_norms(scene: Scene) -> Iterator[Finding]:
    """Find weights whose operator norm is above what their parametrization claims, by how much, and with which input.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> layer = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1))
        >>> found = next(claimed_norms(scene(layer, ())))
        >>> found.kind, found.attained > 1
        ('kernel-norm', True)
    """
    for path, module in scene.modules():
        for name, claim, norm in claims(module):
            for hook in module._forward_pre_hooks.values():  # noqa: SLF001 the old kind computes the weight where it runs
                if type(hook).__module__.startswith("torch.nn.utils."):
                    hook(module, ())
            W = getattr(module, name).detach()
            if name != "weight" or not isinstance(module, _LAYERS):
                if W.ndim == 2:
                    yield from _matrix(path, module, name, claim, norm, W)
            elif isinstance(module, nn.Linear):
                yield from _matrix(path, module, name, claim, norm, W)
            else:
                yield from _kernel(scene, path, module, claim, norm, W)


def grade(excess: float) -> str:
    """Return the severity of a norm that is above its claim by the share ``excess``: 1e-3 is serious, 1e-5 weak.

    Examples:
        >>> grade(0.3), grade(1e-4), grade(1e-7)
        ('serious', 'weak', 'note')
    """
    return "serious" if excess >= 1e-3 else "weak" if excess >= 1e-5 else "note"


def _matrix(path: str, module: nn.Module, name: str, claim: str, norm: float, W: Tensor) -> Iterator[Finding]:
    W, bound = W.to("cpu"), spectral_norm(W)
    v = torch.linalg.svd(W.double(), full_matrices=False)[2][0]
    pair = quotient(lambda x: x @ W.double().T, v[None], torch.zeros_like(v)[None])
    claimed = norm if math.isfinite(norm) else _stated(W, claim)
    if not bound.lower > claimed:
        return
    cast = spectral_norm(W.bfloat16())
    known = claim in _WORDS
    why = _WORDS.get(claim, "is of a class that states no norm which an audit can read")
    yield Finding(
        f"{path}.{name}".lstrip("."),
        claim.replace(" ", "-") if known else "unknown-parametrization",
        f"The parametrization of this {called(module)} ({claim}) {why}: its norm is {bound.lower:.9g} or more.",
        grade(bound.lower / claimed - 1) if math.isfinite(norm) else "note",
        _advice(claim),
        claimed=claimed,
        attained=max(bound.lower, 0.0),
        bound=bound.upper,
        witness=pair,
        numbers={"excess": bound.lower - claimed, "norm in bfloat16": cast.lower},
    )


def _stated(W: Tensor, claim: str) -> float:
    """Return the longest row for a weight norm, which is all that it limits, and 0 for a parametrization that states nothing."""
    return float(W.double().flatten(1).norm(dim=1).max()) * (1 + 1e-6) if claim == "weight norm" else 0.0


def _kernel(scene: Scene, path: str, module: Any, claim: str, norm: float, W: Tensor) -> Iterator[Finding]:
    found, image = operator_witness(scene, path, module)
    bound = _conv_bound(module, W, image)
    reshaped = float(torch.linalg.matrix_norm(W.double().flatten(1), 2))
    claimed = norm if math.isfinite(norm) else _stated(W, claim)
    if found.gain <= claimed * (1 + 1e-12):
        return
    yield Finding(
        f"{path}.weight".lstrip("."),
        "kernel-norm",
        f"The parametrization of this {called(module)} ({claim}) {_CONV}: on images of {'x'.join(map(str, image))} "
        f"it has the norm {found.gain:.6g} or more.",
        grade(found.gain / claimed - 1) if math.isfinite(norm) else "note",
        "Limit the operator: stableopt.stabilize(model) or stableopt.constrain(layer, 'weight', ...) bound it for the image.",
        claimed=claimed,
        attained=found.gain,
        bound=bound.upper,
        witness=found,
        numbers={"norm of the reshaped kernel": reshaped},
    )


def operator_witness(scene: Scene, path: str, module: Any) -> tuple[Witness, tuple[int, ...]]:
    """Return the pair that a convolution moves apart most, and the image on which: that of the run, or one of 16 pixels per axis.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> layer = nn.Conv1d(1, 1, 1, bias=False, dtype=torch.float64)
        >>> pair, image = operator_witness(scene(layer, ()), "", layer)
        >>> image, abs(pair.gain - abs(layer.weight.item())) < 1e-12
        ((16,), True)
    """
    call = scene.calls.get(path)
    x = call.single if call is not None else None
    if x is None:
        need = max(d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        x = torch.zeros(1, module.in_channels, *[max(_SIDE, need)] * len(module.kernel_size), dtype=torch.float64)
    x = torch.zeros_like(x[:1] if x.ndim > len(module.kernel_size) + 1 else x[None])
    return linear_gain(scene.run(path), x), tuple(x.shape[2:])


def _conv_bound(module: Any, W: Tensor, image: tuple[int, ...]) -> Bound:
    options = Geometry.of(module).options(len(image))
    return conv_norm(W.detach().to("cpu"), image_size=image, **options)


def padded_convolutions(scene: Scene) -> Iterator[Finding]:
    """Find convolutions that pad by copies of pixels, and compare their operator with the one that pads by zeros.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False, dtype=torch.float64)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> [found.kind for found in padded_convolutions(scene(layer, ()))]
        ['copying-padding']
    """
    for path, module in scene.modules():
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.padding_mode not in {
            "reflect",
            "replicate",
        }:
            continue
        found, image = operator_witness(scene, path, module)
        layer: Any = copy.deepcopy(scene.exact.get_submodule(path))
        layer.padding_mode = "zeros"
        zeros = linear_gain(layer, torch.zeros_like(found.x))
        if found.gain > zeros.gain * (1 + 1e-9):
            yield Finding(
                path,
                "copying-padding",
                f"padding_mode={module.padding_mode!r} shows pixels at the edge several times, so the operator is larger than "
                f"that of the same kernel with zeros on images of {'x'.join(map(str, image))}.",
                "weak",
                "Use padding_mode='zeros' or 'circular', or a bound that counts the copies (stableopt.nn.lipschitz does).",
                claimed=zeros.gain,
                attained=found.gain,
                bound=_conv_bound(module, module.weight, image).upper,
                witness=found,
            )


def _advice(claim: str) -> str:
    if claim == "orthogonal":
        return (
            "Shrink the exported weight by its proved norm (stableopt.export does), and certify the numbers that are deployed, "
            "after every cast."
        )
    if claim == "spectral norm":
        return "Use stableopt.stabilize(model), whose export divides by a proved bound, or run many power iterations and certify."
    if claim == "weight norm":
        return "Do not count it as a limit of the norm; use stableopt.stabilize(model)."
    return "Ask for the proved norm: stableopt.nn.lipschitz(layer), or certify the model with its folded weights."
