"""Attacks on certified radii: minimal-norm steps, bisection down to neighboring floats, neighbors of what was found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from stableopt.certify.program import Builder, Program
from stableopt.certify.rounding import slope
from stableopt.certify.rounding_terms import weight_norm
from stableopt.nn.heads import margin_constants

Classify = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a CertifiedModel needs of a certificate, with bounds from stableopt.linalg times a factor."""

    program: Program
    lipschitz: float
    margin_constants: Tensor | None


def claims(graph: Builder, *, inflated: float = 1.0) -> Claims:
    """Bound the operations of a chain and its pairs of outputs; ``inflated`` > 1 claims radii that much too large."""
    program, total, before = graph.program(), 1.0, 1.0
    doubles = {name: value.double() for name, value in program.tensors.items()}
    nodes = []
    for node in program.nodes:
        if node["op"] in {"linear", "conv"}:
            bound = weight_norm(node, doubles[node["weight"]], program.norm) * (1 + 1e-9)
        elif node["op"] == "pool":
            bound = pool_bound(node, program.norm)
        else:
            bound = slope(node, doubles, program.norm)
        before, total = total, total * bound
        nodes.append({**node, "bound": bound})
    last = nodes[-1]
    pairs = None
    if last["op"] == "linear":
        weight = doubles[last["weight"]]
        pairs = margin_constants(weight.T if last["transposed"] else weight, program.norm) * (before * (1 + 1e-9))
        pairs = pairs / inflated
    whole = Program(tuple(nodes), program.tensors, program.shape, program.norm)
    return Claims(whole, total * (1 + 1e-9) / inflated, pairs)


def pool_bound(node: dict, norm: str) -> float:
    windows = math.prod(-(-k // s) for k, s in zip(node["kernel"], node["stride"], strict=True))
    if norm == "linf":
        return 1.0
    return math.sqrt(windows / (math.prod(node["kernel"]) if node["name"] == "avg" else 1)) * (1 + 1e-12)


def length(delta: Tensor, norm: str = "l2") -> list[float]:
    """Return the norms of rows of float64 differences, rounded up: exact sums of squares."""
    found = []
    for row in delta.flatten(1).tolist():
        if norm == "linf":
            found.append(max(map(abs, row)))
            continue
        square = sum((Fraction(v) ** 2 for v in row), Fraction(0))
        root = math.sqrt(float(square))
        while Fraction(root) ** 2 < square:
            root = math.nextafter(root, math.inf)
        found.append(root)
    return found


def deepfool(logits: Classify, x: Tensor, steps: int = 20, overshoot: float = 0.02, norm: str = "l2") -> Tensor:
    """Step to the nearest linearized boundary until the class changes; float64 throughout."""
    start = logits(x).argmax(1)
    rows, far = torch.arange(len(x)), x.clone()
    for _ in range(steps):
        point = far.detach().requires_grad_(True)
        y = logits(point)
        active = y.argmax(1) == start
        if not bool(active.any()):
            break
        best, push = torch.full((len(x),), math.inf, dtype=x.dtype), torch.zeros_like(x)
        for j in range(y.shape[1]):
            gap = y[:, j] - y[rows, start]
            (slopes,) = torch.autograd.grad(gap.sum(), point, retain_graph=True)
            flat = slopes.flatten(1)
            size = flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)
            distance = gap.detach().abs() / size.clamp_min(1e-30)
            closer = (distance < best) & (start != j) & (size > 1e-30)
            move = (
                flat.sign() * distance[:, None]
                if norm == "linf"
                else flat * (distance / size.clamp_min(1e-30))[:, None]
            )
            push = torch.where(closer[:, None], move, push.flatten(1)).reshape_as(x)
            best = torch.where(closer, distance, best)
        far = torch.where(active.reshape(-1, *[1] * (x.ndim - 1)), far + (1 + overshoot) * push, far)
    return far.detach()


def bisect(classify: Classify, x: Tensor, far: Tensor, dtype: torch.dtype, steps: int = 60) -> Tensor:
    """Halve the segment from x to an input of another class down to neighboring floats of a dtype; return the far ends."""
    near, far = x.to(dtype), far.to(dtype)
    start = classify(near)
    found = classify(far) != start
    shape = (-1, *[1] * (x.ndim - 1))
    for _ in range(steps):
        middle = (near.double() + (far.double() - near.double()) / 2).to(dtype)
        changed = (classify(middle) != start).reshape(shape)
        near, far = torch.where(changed, near, middle), torch.where(changed, middle, far)
    return torch.where(found.reshape(shape), far, torch.full_like(far, math.nan))


def neighbors(classify: Classify, x: Tensor, far: Tensor, rounds: int = 3) -> Tensor:
    """Move all entries, or each sign's entries, of an input of another class one float towards x while its class stays."""
    start = classify(x.to(far.dtype))
    shape = (-1, *[1] * (x.ndim - 1))
    for _ in range(rounds):
        closer = torch.nextafter(far, x.to(far.dtype))
        for mask in (torch.ones_like(far, dtype=torch.bool), far > x, far < x, torch.rand_like(far) < 0.5):
            tried = torch.where(mask, closer, far)
            still = (classify(tried) != start).reshape(shape)
            far = torch.where(still, tried, far)
    return far


def smallest_change(
    classify: Classify, logits: Classify, x: Tensor, dtype: torch.dtype, norm: str = "l2"
) -> tuple[Tensor, Tensor]:
    """Attack: return the smallest norms found, rounded up, of changes of x that change the class, and the inputs found."""
    far = deepfool(logits, x.double(), norm=norm)
    found = neighbors(classify, x, bisect(classify, x, far, dtype))
    sizes = torch.tensor([math.inf if math.isnan(n) else n for n in _lengths(found.double() - x.double(), norm)])
    return sizes.double(), found


def _lengths(delta: Tensor, norm: str) -> list[float]:
    return [math.nan if not bool(row.isfinite().all()) else length(row[None], norm)[0] for row in delta]
