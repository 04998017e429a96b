"""The vital signs of a step: norms of gradients, weights and updates, the slope along the update, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.constraints.sharding import is_sharded
from stableopt.lyapunov.lengths import has_norm, norms, read
from stableopt.optim.agree import Processes
from stableopt.optim.snapshot import local

__all__ = ["Names", "Vitals", "measure_vitals"]

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""
_HALF = (torch.float16, torch.bfloat16)
_PIECE = 1 << 16


@dataclass(frozen=True)
class Vitals:
    r"""What one pass over the parameters shows.

    Args:
        grad_norm: :math:`\|g\|` over all parameters; NaN if there is no gradient.
        weight_norm: :math:`\|\theta\|` after the step.
        displacement: :math:`\|d\|`; NaN if the values before the step are not known.
        slope: :math:`g^\top d`; NaN likewise.
        grad_norms: parameter name -> :math:`\|g_p\|`.
        update_ratio: parameter name -> :math:`\|d_p\|/\|\theta_p\|`, for parameters that are not zero.
        nonfinite: ``grad:NAME``, ``param:NAME``, ``buffer:NAME`` of what is not finite.

    Examples:
        >>> Vitals().nonfinite
        ()
    """

    grad_norm: float = math.nan
    weight_norm: float = math.nan
    displacement: float = math.nan
    slope: float = math.nan
    grad_norms: dict[str, float] = field(default_factory=dict)
    update_ratio: dict[str, float] = field(default_factory=dict)
    nonfinite: tuple[str, ...] = ()


class Names:
    """The parameters of an optimizer and the buffers of a model, with their names.

    Args:
        model: where the names are from.
        optimizer: whose parameters count; one that the model does not have is called ``group I, parameter J``.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> list(Names(model, torch.optim.SGD(model.parameters())).parameters().values())
        ['weight', 'bias']
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._names: dict[Tensor, str] = {}
        self._key: tuple[int, ...] = ()

    def parameters(self) -> dict[Tensor, str]:
        """Return the parameters that may move, in the order of the groups."""
        groups = self._optimizer.param_groups
        # a parameter that is replaced, as by module.to of a sharded one, is another object
        key = tuple(id(p) for group in groups for p in group["params"])
        if key != self._key:
            known = {p: name for name, p in self._model.named_parameters()}
            self._names = {
                p: known.get(p, f"group {i}, parameter {j}")
                for i, group in enumerate(groups)
                for j, p in enumerate(group["params"])
            }
            self._key = key
        return self._names

    def buffers(self) -> dict[Tensor, str]:
        """Return the floating buffers with numbers in them."""
        return {b: name for name, b in self._model.named_buffers() if has_norm(b)}


@torch.no_grad()
def measure_vitals(
    parameters: Mapping[Tensor, str],
    before: Mapping[Tensor, Tensor],
    processes: Processes,
    buffers: Mapping[Tensor, str] | None = None,
    *,
    overwrite: bool = False,
) -> Vitals:
    """Look at parameters after a step, with one wait for the device.

    Args:
        parameters: with their names; their gradients are those of the step.
        before: parameter -> values before the step, for all that may have moved; empty if not known.
        processes: that train the model; parts of a sharded parameter are summed over them.
        buffers: with their names.
        overwrite: whether the values before may be overwritten, which spares memory.

    Examples:
        >>> from stableopt.optim.agree import Alone
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([1.0, 0.0])
        >>> vitals = measure_vitals({w: "w"}, {w: torch.tensor([3.5, 4.0])}, Alone)
        >>> vitals.weight_norm, vitals.grad_norm, vitals.displacement, vitals.slope
        (5.0, 1.0, 0.5, -0.5)
        >>> vitals.update_ratio
        {'w': 0.1}
    """
    here = [p for p in parameters if has_norm(p)]
    grads = {p: g for p in here if (g := _gradient(p)) is not None}
    moved = _moves({p: before[p] for p in here if p in before}, overwrite=overwrite)
    slopes = {p: _dot(grads[p], d) for p, d in moved.items() if p in grads}
    names = buffers or {}
    inner = {b: local(b) for b in names}
    values = read(
        [
            *norms(local(p).detach() for p in here),
            *norms(grads.values()),
            *norms(moved.values()),
            *slopes.values(),
            *norms(inner.values()),
        ],
        here[0].device if here else None,
    )
    take = iter(values)
    w, g, d, s, b = ({k: next(take) for k in keys} for keys in (here, grads, moved, slopes, inner))
    nonfinite = (
        *(f"grad:{parameters[p]}" for p, x in g.items() if not math.isfinite(x) and not _all_finite(grads[p])),
        *(f"param:{parameters[p]}" for p, x in w.items() if not math.isfinite(x) and not _all_finite(local(p))),
        *(f"buffer:{names[k]}" for k, x in b.items() if not math.isfinite(x) and not _all_finite(inner[k])),
    )
    w, g, d, s = _over_processes(here, (w, g, d, s), processes)
    return Vitals(
        grad_norm=_length(g) if g else math.nan,
        weight_norm=_length(w),
        displacement=_length(d) if d or before else math.nan,
        slope=-math.fsum(s.values()) if d and all(map(math.isfinite, s.values())) else math.nan,
        grad_norms={parameters[p]: x for p, x in g.items()},
        update_ratio={parameters[p]: x / w[p] for p, x in d.items() if w[p] > 0},
        nonfinite=nonfinite,
    )


def _gradient(p: Tensor) -> Tensor | None:
    if p.grad is None:
        return None
    g = local(p.grad)
    return g.coalesce().values() if g.is_sparse else g


def _moves(before: dict[Tensor, Tensor], *, overwrite: bool) -> dict[Tensor, Tensor]:
    """Return the displacements with the opposite sign."""
    if not before:
        return {}
    starts, ends = [local(x) for x in before.values()], [local(p).detach() for p in before]
    if overwrite:
        _TORCH._foreach_sub_(starts, ends)
        return dict(zip(before, starts, strict=True))
    return dict(zip(before, _TORCH._foreach_sub(starts, ends), strict=True))  # noqa: SLF001


def _dot(g: Tensor, d: Tensor) -> Tensor:
    """Return the real inner product; a gradient of another shape than the displacement is sparse, and has no slope."""
    if g.shape != d.shape:
        return torch.full((), math.nan, dtype=torch.float64, device=d.device)
    if g.is_complex() or d.is_complex():
        return (torch.view_as_real(g.resolve_conj()) * torch.view_as_real(d.resolve_conj())).sum(dtype=torch.float64)
    if g.dtype == d.dtype and g.dtype not in _HALF and g.is_contiguous() and d.is_contiguous():
        g, d = g.view(-1), d.view(-1)
        if g.numel() <= _PIECE:
            return torch.dot(g, d)
        # in pieces: a long sum in float32 loses digits
        return torch.stack([torch.dot(a, b) for a, b in zip(g.split(_PIECE), d.split(_PIECE), strict=True)]).sum()
    wide = torch.float32 if g.dtype in _HALF else g.dtype
    return (g.to(wide) * d).sum(dtype=torch.float64)


def _all_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())  # finite numbers, too, may have a norm that is not


def _length(norms: dict[Tensor, float]) -> float:
    return math.sqrt(math.fsum(x * x for x in norms.values())) if all(map(math.isfinite, norms.values())) else math.nan


def _over_processes(
    here: list[Tensor], tables: tuple[dict[Tensor, float], ...], processes: Processes
) -> tuple[dict[Tensor, float], ...]:
    """Return norms and slopes of whole parameters, where processes hold parts of some."""
    if processes.size == 1 or not any(is_sharded(p) for p in here):
        return tables
    flat = [
        (x if i == len(tables) - 1 else x * x) * processes.share(p) for i, t in enumerate(tables) for p, x in t.items()
    ]
    total = iter(processes.total(torch.tensor(flat, dtype=torch.float64)).tolist())
    return tuple(
        {p: x if i == len(tables) - 1 else math.sqrt(max(0.0, x)) for p, x in zip(t, total, strict=False)}
        for i, t in enumerate(tables)
    )
