"""Parameters: tied ones that are parametrized apart, ones that DistributedDataParallel does not know, and ones of low precision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stableopt.certify.audit.findings import Finding
from stableopt.certify.audit.scene import Scene, called

__all__ = ["low_precision", "not_finite", "tied_apart", "unsynchronised"]


def tied_apart(scene: Scene) -> Iterator[Finding]:
    """Find a tensor that two layers share and of which they make different weights, since they are parametrized separately.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> _ = torch.nn.utils.parametrizations.spectral_norm(model[0])
        >>> [found.path for found in tied_apart(scene(model, ()))]
        ['0.weight and 1.weight']
    """
    users: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for path, module in scene.modules():
        for name, key, value in _used(module):
            users[key].append((f"{path}.{name}".lstrip("."), value))
    for found in users.values():
        first, one = found[0]
        for other, two in found[1:]:
            if one.shape != two.shape or not torch.equal(one, two):
                same = one.shape == two.shape
                distance = float((one.double() - two.double()).norm() / two.double().norm()) if same else 1.0
                yield Finding(
                    f"{first} and {other}",
                    "tied-apart",
                    "Two layers share a parameter but make different weights of it, since they are parametrized separately: the "
                    "tie is broken in the forward map, and the limit of one does not hold for the other.",
                    "serious",
                    "Use the same module twice instead, or give each layer a parameter of its own.",
                    claimed=0.0,
                    attained=distance,
                    numbers={f"norm of {first}": _norm(one), f"norm of {other}": _norm(two)},
                )


def _used(module: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the tensors that a module uses: name, identity of the parameter behind it, value."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            yield name, id(parameter), parameter.detach()
    if P.is_parametrized(module):
        chains: Any = module.get_submodule("parametrizations")
        for name, chain in chains.items():
            value = getattr(module, name).detach()
            for parameter in chain.parameters(recurse=False):
                if parameter.ndim >= 2:
                    yield name, id(parameter), value


def _norm(W: Tensor) -> float:
    return float(torch.linalg.matrix_norm(W.to("cpu").double().flatten(1), 2))


def unsynchronised(scene: Scene) -> Iterator[Finding]:
    """Find parameters that were made after DistributedDataParallel was built around the model: their gradients stay apart.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> list(unsynchronised(scene(nn.Linear(1, 1), ())))
        []
    """
    for path, module in scene.original.named_modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        known = {id(p) for p in vars(module).get("_module_parameters", [])}
        ignored = set(vars(module).get("parameters_to_ignore", ()))
        lost = [
            n
            for n, p in module.module.named_parameters()
            if p.requires_grad and id(p) not in known and n not in ignored
        ]
        if known and lost:
            total = sum(p.requires_grad for p in module.module.parameters())
            yield Finding(
                path,
                "unsynchronised",
                f"{', '.join(lost[:3])}{' and others' if len(lost) > 3 else ''}: registered after DistributedDataParallel was "
                "built, so their gradients are not averaged and the processes train different models, without an error.",
                "serious",
                "Register parametrizations first, then build DistributedDataParallel, then the optimizer.",
                claimed=0.0,
                attained=float(len(lost)),
                numbers={"parameters": float(total)},
            )


def not_finite(scene: Scene) -> Iterator[Finding]:
    """Find parameters and buffers that hold NaN or infinity.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.constant_(layer.bias, float("nan"))
        >>> [(found.path, found.numbers["entries"]) for found in not_finite(scene(layer, ()))]
        [('bias', 2.0)]
    """
    for path, module in scene.modules():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            bad = int((~value.detach().isfinite()).sum())
            if bad:
                yield Finding(
                    f"{path}.{name}".lstrip("."),
                    "not-finite",
                    f"{bad} of {value.numel()} numbers are NaN or infinite: nothing holds for this model.",
                    "serious",
                    "Go back to a checkpoint with finite numbers.",
                    numbers={"entries": float(bad)},
                )


def low_precision(scene: Scene) -> Iterator[Finding]:
    """Find weights in half precision, and measure how far the output of their layer is from that of the same weights in float64.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> [found.severity for found in low_precision(scene(nn.Linear(4, 4, dtype=torch.bfloat16), ()))]
        ['weak']
    """
    for path, module in scene.modules():
        dtypes = {p.dtype for p in module.parameters(recurse=False)} & {torch.bfloat16, torch.float16}
        if not dtypes:
            continue
        dtype = dtypes.pop()
        yield Finding(
            path,
            "low-precision",
            f"The weights of this {called(module)} are stored in {dtype}: no bound of the exact map counts their rounding.",
            "weak",
            "Certify the numbers as stored, and use radii with the rounding of the runtime folded in.",
            claimed=0.0,
            attained=_deviation(scene, path, module, dtype),
            numbers={"unit roundoff": torch.finfo(dtype).eps / 2},
        )


def _deviation(scene: Scene, path: str, module: nn.Module, dtype: torch.dtype) -> float:
    """Return the relative error of the output of a layer on an input that its dtype holds; NaN if that cannot be run."""
    call = scene.calls.get(path)
    width = getattr(module, "in_features", None)
    x = (
        call.single
        if call is not None
        else torch.ones(1, width, dtype=torch.float64) / 3
        if isinstance(width, int)
        else None
    )
    if x is None:
        return float("nan")
    x = x.to(dtype)
    try:
        with torch.no_grad():
            rounded, exact = module(x.to(next(module.parameters()).device)), scene.run(path)(x.double())
            return float((rounded.cpu().double() - exact).norm() / exact.norm())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return float("nan")
