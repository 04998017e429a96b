r"""Modules with a forward map of their own: gradient-type blocks with negative slopes, residual sums, and what cannot be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.audit.findings import Finding, Witness
from stableopt.certify.audit.scene import Call, Scene, called, is_foreign
from stableopt.certify.audit.search import Map, generator, quotient, steepest, symmetry_defect
from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz
from stableopt.nn.dispatch import check_forward, registered_class

__all__ = ["foreign_blocks", "functional_layers", "unread"]

_LOWEST = {"gelu": -1.4142135623730951, "silu": -2.3993572805, "mish": -2.2563763964, "hardswish": -2.9999}
"""Where the slope is smallest, or close to it: -0.1289, -0.0998, -0.1125 and -0.5."""
_SMALL = 256
_SYMMETRIC = 1e-7
_CLEAR = 1 + 1e-6


def foreign_blocks(scene: Scene) -> Iterator[Finding]:
    r"""Find residual sums of foreign modules that are not non-expansive.

    Where all Jacobians are symmetric the block is of the gradient type, :math:`x-\tau A^\top\sigma(Ax+b)`, with eigenvalues
    :math:`1-\tau\lambda`: one above 1 shows a negative slope of :math:`\sigma`, one below -1 a step beyond :math:`2/\|A\|^2`. Any
    other sum has the constant :math:`1+L` unless its step is limited.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> class Residual(nn.Module):
        ...     __module__ = "mine"
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Linear(2, 2, dtype=torch.float64)
        ...
        ...     def forward(self, x):
        ...         return x + torch.tanh(self.branch(x))
        >>> [found.kind for found in foreign_blocks(scene(Residual(), (torch.ones(1, 2),)))]
        ['residual-sum']
    """
    for path, module in scene.modules():
        call = scene.calls.get(path)
        if call is None or not is_foreign(module) or not call.residual or not _keeps_shape(call):
            continue
        f, x = scene.run(path), _sample(call)
        defect = max(symmetry_defect(f, x), symmetry_defect(f, torch.zeros_like(x), seed=1))
        if call.products and defect < _SYMMETRIC and not _is_affine(f, x):
            yield from _gradient_type(scene, path, call, defect)
            continue
        found = _best(f, x)
        if found.gain > _CLEAR:
            yield Finding(
                path,
                "residual-sum",
                f"{called(module)} adds its input to a branch without a limit on the step: its constant is up to 1 + L of "
                "the branch, once per block.",
                "weak",
                "Use stableopt.nn.CFLBlock or GradientBlock, whose step is capped by a proved bound.",
                claimed=1.0,
                attained=found.gain,
                bound=_sum_bound(scene, path, f, x),
                witness=found,
            )


def _gradient_type(scene: Scene, path: str, call: Call, defect: float) -> Iterator[Finding]:
    """Measure both ends of the spectrum of a block with symmetric Jacobians."""
    f, name = scene.run(path), type(scene.exact.get_submodule(path)).__name__
    activation = next((op for op in call.ops if op in _LOWEST), "")
    starts = [
        *_lowest_points(scene, path, call, _LOWEST.get(activation, 0.0)),
        _sample(call),
        torch.zeros_like(_sample(call)),
    ]
    c = max(1.0, *(steepest(f, x, iterations=5).gain for x in starts))
    ends = {
        "negative-slope": _extreme(f, lambda x: f(x) + c * x, starts),
        "step-limit": _extreme(f, lambda x: f(x) - c * x, starts),
    }
    what = {
        "negative-slope": f"has {activation or 'an activation'} with slopes below 0 in it: it is not non-expansive for any step",
        "step-limit": "takes steps beyond 2/||A||^2, so it is not non-expansive",
    }
    advice = {
        "negative-slope": "Use relu, leaky_relu, tanh or softplus in it, whose slopes lie in [0, 1].",
        "step-limit": "Use stableopt.nn.GradientBlock, whose step is capped by a proved bound.",
    }
    for kind, (pair, eigenvalue) in ends.items():
        if pair.gain > _CLEAR and (eigenvalue > 1) == (kind == "negative-slope"):
            yield Finding(
                path,
                kind,
                f"{name} is a block of the gradient type, x - h A^T s(Ax + b) (its Jacobians are symmetric), and {what[kind]}.",
                "serious",
                advice[kind],
                claimed=1.0,
                attained=pair.gain,
                witness=pair,
                numbers={"eigenvalue of the Jacobian": eigenvalue, "symmetry defect": defect},
            )


def _extreme(f: Map, shifted: Map, starts: list[Tensor]) -> tuple[Witness, float]:
    """Return the pair along the eigenvector that the shift makes the largest, and the eigenvalue."""
    pairs = [steepest(shifted, x, iterations=15) for x in starts]
    pairs = [_polished(f, shifted, pair) if pair.x.numel() <= _SMALL // 4 else pair for pair in pairs]
    best = max(pairs, key=lambda pair: pair.gain)
    climbed = steepest(shifted, (best.x + best.y) / 2, iterations=15, ascent=15)
    best = max(best, climbed, key=lambda pair: pair.gain)
    best = _polished(f, shifted, best)
    d = best.x - best.y
    with torch.no_grad():
        eigenvalue = float((d * (f(best.x) - f(best.y))).sum() / d.square().sum())
    return quotient(f, best.x, best.y), eigenvalue


def _polished(f: Map, shifted: Map, pair: Witness) -> Witness:
    """Put a pair along the exact eigenvector of the Jacobian between the two, if the block is small enough for one."""
    middle, d = (pair.x + pair.y) / 2, (pair.x - pair.y).norm() / 2
    if middle.numel() > _SMALL:
        return steepest(shifted, middle, iterations=100)
    J: Any = torch.autograd.functional.jacobian(f, middle)
    J = J.reshape(middle.numel(), -1)
    vectors = torch.linalg.eigh((J + J.T) / 2)[1]
    pairs = [quotient(shifted, middle + d * v, middle - d * v) for v in vectors.T[[0, -1]].view(2, *middle.shape)]
    return max([pair, *pairs], key=lambda pair: pair.gain)


def _lowest_points(scene: Scene, path: str, call: Call, z: float) -> Iterator[Tensor]:
    """Yield inputs that bring all units Ax + b as near as can be to ``z``, to 0 and to 3, for the matrices in the block."""
    x = _sample(call)
    module = scene.exact.get_submodule(path)
    vectors = [p.detach() for p in module.parameters() if p.ndim == 1]
    for A in (p.detach() for p in module.parameters() if p.ndim == 2):
        if A.shape[1] == x.shape[-1]:
            biases = [b for b in vectors if len(b) == len(A)] or [torch.zeros(len(A), dtype=torch.float64)]
            for level in {z, 0.0, 3.0}:
                target = (level - biases[0])[:, None]
                yield torch.linalg.lstsq(A, target, driver="gelsd").solution.T.expand_as(x).clone()
    for c in (z, -z):
        yield torch.full_like(x, c)


def functional_layers(scene: Scene) -> Iterator[Finding]:
    """Find operations inside foreign forward maps that a module would have shown: normalization, padding, upsampling, dropout.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> class Normed(nn.Module):
        ...     __module__ = "mine"
        ...
        ...     def forward(self, x):
        ...         return nn.functional.layer_norm(x, x.shape[1:])
        >>> [found.kind for found in functional_layers(scene(Normed(), (torch.ones(1, 4),)))]
        ['sample-normalization']
    """
    foreign = {path: call for path, call in scene.calls.items() if is_foreign(scene.exact.get_submodule(path))}
    for path, call in foreign.items():
        inside = [c for p, c in scene.calls.items() if p != path and (not path or p.startswith(f"{path}."))]
        for ops, kind, severity, what in _FUNCTIONAL:
            used = sorted({op for op in call.ops if op.startswith(ops)})
            if used and not any(op in c.ops for op in used for c in inside):
                yield _functional(scene, path, call, kind, severity, f"{', '.join(used)} in its forward map {what}")


_FUNCTIONAL: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    (("native_layer_norm", "native_group_norm", "_fused_rms_norm"), "sample-normalization", "serious",
     "divides by the spread of the input, with a constant of max|gamma|/sqrt(eps)"),
    (("reflection_pad", "replication_pad"), "copied-pixels", "weak", "shows pixels several times"),
    (("upsample_", "_upsample_"), "copied-pixels", "weak", "shows pixels several times"),
    (("native_dropout", "bernoulli"), "active-dropout", "weak", "draws at random in evaluation mode too"),
)  # fmt: skip


def _functional(scene: Scene, path: str, call: Call, kind: str, severity: str, what: str) -> Finding:
    f, x, pair = scene.run(path), call.single, None
    attained = math.nan
    if x is not None and kind != "active-dropout":
        tiny = 1e-3 if kind == "sample-normalization" else 1.0
        pair = steepest(f, torch.zeros_like(x), scale=tiny, iterations=30)
        attained = pair.gain
    elif x is not None:
        with torch.no_grad():
            attained = float((f(x) - f(x)).norm())
    return Finding(
        path,
        kind,
        f"{what}.",
        severity,
        "Write it as a module with a rule, so that it can be seen and bounded; see the advice for nn modules of this kind.",
        claimed=0.0 if kind == "active-dropout" else 1.0,
        attained=attained,
        witness=pair,
    )


def unread(scene: Scene, told: frozenset[str]) -> Iterator[Finding]:
    """Find modules with a forward map of their own for which no rule is registered, and of which nothing else was said.

    Args:
        scene: the model.
        told: the paths that other findings are about.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> class Mine(nn.Module):
        ...     __module__ = "mine"
        ...
        ...     def forward(self, x):
        ...         return 3 * x
        >>> [round(found.attained, 6) for found in unread(scene(Mine(), (torch.ones(1, 4),)), frozenset())]
        [3.0]
    """
    if scene.failure:
        yield Finding(
            "",
            "not-run",
            f"The model could not be run in float64 ({scene.failure}): forward maps of its own were seen in part only.",
            "weak",
            "Give the shape of one input without the batch, or the inputs themselves.",
        )
    for path, module in scene.modules():
        if not is_foreign(module) or path in told or _has_rule(module):
            continue
        call = scene.calls.get(path)
        seen = "an audit sees only what it did on one input" if call is not None else "and the run did not reach it"
        pair = _measured(scene, path, call)
        yield Finding(
            path,
            "unread",
            f"The forward map of {called(module)} is its own, which no rule bounds; {seen}.",
            "note",
            "Write it with modules that have rules, or register one: @stableopt.nn.lipschitz_rule.register.",
            attained=math.nan if pair is None else pair.gain,
            witness=pair,
        )


def _measured(scene: Scene, path: str, call: Call | None) -> Witness | None:
    if call is None or call.single is None:
        return None
    try:
        return steepest(scene.run(path), _sample(call), iterations=10)
    except Exception:  # foreign code fails in many ways
        return None


def _has_rule(module: nn.Module) -> bool:
    kind = registered_class(module)
    if kind is None:
        return False
    try:
        check_forward(module, kind)
    except UncertifiableError:
        return False
    return True


def _keeps_shape(call: Call) -> bool:
    x, y = call.single, call.output
    return x is not None and isinstance(y, Tensor) and x.shape == y.shape


def _sample(call: Call) -> Tensor:
    x: Any = call.single
    return x.detach().clone()


def _is_affine(f: Map, x: Tensor) -> bool:
    y = torch.randn(x.shape, generator=generator(2), dtype=x.dtype) * (1 + float(x.abs().max()))
    with torch.no_grad():
        parts = f(x + y), f(x), f(y), f(torch.zeros_like(x))
        defect = parts[0] - parts[1] - parts[2] + parts[3]
    return float(defect.norm()) <= 1e-10 * max(float(p.norm()) for p in parts)


def _best(f: Map, x: Tensor) -> Witness:
    pairs = [steepest(f, start, iterations=15, ascent=10) for start in (x, torch.zeros_like(x))]
    return max(pairs, key=lambda pair: pair.gain)


def _sum_bound(scene: Scene, path: str, f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return 1 + L of the only child, if the block was its input plus that child where it was tried; infinity otherwise."""
    children = list(scene.plain.get_submodule(path).named_children())
    if len(children) != 1:
        return math.inf
    name, child = children[0]
    branch = scene.run(f"{path}.{name}".lstrip("."))
    try:
        with torch.no_grad():
            if not all(torch.allclose(f(s * x), s * x + branch(s * x), rtol=1e-12, atol=1e-14) for s in (1.0, -3.0)):
                return math.inf
        return (lipschitz(child) + 1.0).upper
    except (UncertifiableError, RuntimeError, TypeError, ValueError):
        return math.inf
