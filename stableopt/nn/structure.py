r"""Modules made of branches, with a constant made of the branches' constants.

Each rule asks :func:`stableopt.nn.lipschitz` for its branches, so a branch may be anything that has a bound, also another module of
this file. An embedding has no constant in its indices; its rule says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, round_up
from stableopt.nn.branches import (
    branch_constant,
    branches_of,
    check_branches,
    part_bound,
    refuse_in_place,
    uniform_of_branches,
)
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["Concat", "Merge", "Parallel"]


class Concat(nn.Module):
    r"""Give the same input to several branches and concatenate their outputs.

    .. math:: x \mapsto (f_1(x), \dots, f_k(x))

    The constant is at most :math:`\bigl(\sum_i L_i^2\bigr)^{1/2}` in l2, :math:`\max_i L_i` in linf and :math:`\sum_i L_i` in l1:
    the norm of the vector of the parts' norms. All are attained by branches that stretch the same direction.

    Args:
        *branches: at least one module; their outputs must agree in all other dimensions. ``nn.Identity()`` is a skip connection.
        dim: dimension of the outputs along which they are joined; not 0, the batch.

    Raises:
        TypeError: if a branch is no module.
        ValueError: if there is no branch, ``dim`` is 0, or a part of a branch has ``inplace=True``.

    References:
        Huang et al., *Densely Connected Convolutional Networks*, 2017 (the use with identities).

    Examples:
        >>> lipschitz_rule(Concat(nn.Identity(), nn.Tanh(), nn.ReLU(), nn.Tanh()), "l2")
        Bound(lower=0.0, upper=2.0, proved=True)
    """

    def __init__(self, *branches: nn.Module, dim: int = 1) -> None:
        super().__init__()
        check_branches(branches, "Concat")
        self.branches, self.dim = nn.ModuleList(branches), _check_dim(dim, "Concat")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the outputs of the branches side by side."""
        return torch.cat([branch(input) for branch in self.branches], self.dim)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"dim={self.dim}"


class Parallel(nn.Module):
    r"""Split the input, give each part to its own branch, and concatenate the outputs.

    .. math:: (x_1, \dots, x_k) \mapsto (f_1(x_1), \dots, f_k(x_k))

    The Jacobian is block diagonal: in l2, linf and l1 the constant is exactly the largest constant of a branch. In ``token_max``
    it is at most :math:`\bigl(\sum_i L_i^2\bigr)^{1/2}`: branches that mix tokens may bring the parts of two together.

    Args:
        *branches: at least one module.
        sizes: sizes of the parts along ``dim``, one per branch, each at least 1.
        dim: dimension along which input and outputs are split; not 0, the batch.

    Raises:
        TypeError: if a branch is no module.
        ValueError: if there is no branch, ``dim`` is 0, a part has ``inplace=True`` or the sizes do not fit the branches; in
            ``forward``, if they do not add up to the size of the input.

    Examples:
        >>> model = Parallel(nn.ReLU(), nn.Identity(), sizes=(1, 2))
        >>> model(torch.tensor([[-1.0, -2.0, 3.0]])).tolist(), lipschitz_rule(model, "l2").upper
        ([[0.0, -2.0, 3.0]], 1.0)
    """

    def __init__(self, *branches: nn.Module, sizes: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        check_branches(branches, "Parallel")
        if len(sizes) != len(branches) or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
            raise ValueError(
                f"Parallel needs one integer size >= 1 per branch, got {sizes!r} for {len(branches)} branches."
            )
        self.branches, self.sizes, self.dim = nn.ModuleList(branches), tuple(sizes), _check_dim(dim, "Parallel")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the outputs of the branches, each of its own part, side by side."""
        if not -input.ndim <= self.dim < input.ndim or input.shape[self.dim] != sum(self.sizes):
            raise ValueError(
                f"Parallel(sizes={self.sizes}, dim={self.dim}) got an input of shape {tuple(input.shape)}; the sizes must add up."
            )
        parts = input.split(self.sizes, self.dim)
        return torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], self.dim)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"sizes={self.sizes}, dim={self.dim}"


class Merge(nn.Module):
    r"""Give the same input to several branches and add their outputs, or take their entrywise Euclidean norm.

    .. math:: x \mapsto \sum_i w_i f_i(x) \qquad\text{or}\qquad x \mapsto \Bigl(\sum_i w_i f_i(x)^2\Bigr)^{1/2}

    The sum has in every norm at most the constant :math:`\sum_i |w_i| L_i`. The Euclidean merge has
    :math:`\bigl(\sum_i w_i L_i^2\bigr)^{1/2}` in l2 and linf, because entrywise
    :math:`\bigl|\|u\|_2 - \|v\|_2\bigr| \le \|u - v\|_2`, and in l1, where the entries may move one branch each,
    :math:`\sum_i \sqrt{w_i}\, L_i`. With the default weights :math:`1/k` and branches of constant 1 both are 1 in l2.

    Args:
        *branches: at least one module; their outputs have one shape.
        weights: one finite number per branch, at least 0 for the Euclidean merge; None for :math:`1/k` each.
        by: ``"sum"`` or ``"l2"``.

    Raises:
        TypeError: if a branch is no module.
        ValueError: if there is no branch, a part of one has ``inplace=True``, the weights do not fit, or ``by`` is unknown; in
            ``forward``, if the branches give different shapes.

    Note:
        The weights are settings, not trained. Where all outputs are 0 the Euclidean merge has the gradient 0.

    References:
        Boissin et al., *An Adaptive Orthogonal Convolution Scheme*, 2025 (merges of 1-Lipschitz branches).

    Examples:
        >>> model = Merge(nn.Identity(), nn.Identity(), weights=(9.0, 16.0), by="l2")
        >>> model(torch.tensor([2.0])).tolist(), lipschitz_rule(model, "l2").upper
        ([10.0], 5.0)
    """

    def __init__(self, *branches: nn.Module, weights: Sequence[float] | None = None, by: str = "sum") -> None:
        super().__init__()
        check_branches(branches, "Merge")
        if by not in {"sum", "l2"}:
            raise ValueError(f"by must be 'sum' or 'l2', got {by!r}.")
        if weights is None:  # rounded down, so that equal weights do not add up to more than 1
            weights = [(Bound.point(1.0) / len(branches)).lower] * len(branches)
        if len(weights) != len(branches) or not all(math.isfinite(w) and (by == "sum" or w >= 0) for w in weights):
            raise ValueError(
                f"Merge(by={by!r}) needs one finite weight per branch{' >= 0' if by == 'l2' else ''}, got {weights!r} for "
                f"{len(branches)} branches."
            )
        self.branches, self.weights, self.by = nn.ModuleList(branches), tuple(float(w) for w in weights), by

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the merged outputs of the branches."""
        outputs = [branch(input) for branch in self.branches]
        if any(output.shape != outputs[0].shape for output in outputs):
            raise ValueError(f"the branches of a Merge gave different shapes: {[tuple(o.shape) for o in outputs]}.")
        if self.by == "sum":
            return torch.stack([w * output for w, output in zip(self.weights, outputs, strict=True)]).sum(0)
        roots = [math.sqrt(w) for w in self.weights]
        return torch.linalg.vector_norm(torch.stack([r * o for r, o in zip(roots, outputs, strict=True)]), dim=0)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"weights={self.weights}, by={self.by!r}"


def _check_dim(dim: int, name: str) -> int:
    if not isinstance(dim, int) or isinstance(dim, bool) or dim == 0:
        raise ValueError(f"{name} joins along a dimension other than 0, the batch; got dim={dim!r}.")
    return dim


def _sum(parts: Sequence[Bound], weights: Sequence[float] | None = None, power: int = 1) -> Bound:
    r"""Bound :math:`\sum_i |w_i| L_i^p` from 0 to its upper end, added exactly and rounded once."""
    proved = all(part.proved for part in parts)
    if any(math.isinf(part.upper) for part in parts):
        return Bound(0.0, math.inf, proved)
    factors = [1.0] * len(parts) if weights is None else weights
    total = sum(
        (abs(Fraction(w)) * Fraction(part.upper) ** power for w, part in zip(factors, parts, strict=True)),
        start=Fraction(0),
    )
    return Bound(0.0, round_up(total), proved)


def _combined(module: Concat | Parallel | Merge, parts: Sequence[Bound], norm: str) -> Bound:
    """Return the bound of a combination whose branches have the bounds ``parts``."""
    if isinstance(module, Parallel) and norm == TOKEN_MAX:  # parts of several tokens may meet in one
        return _sum(parts, power=2).sqrt()
    if isinstance(module, Parallel) or (isinstance(module, Concat) and norm == "linf"):
        return Bound(0.0, max(part.upper for part in parts), all(part.proved for part in parts))
    if isinstance(module, Concat):
        return _sum(parts) if norm == "l1" else _sum(parts, power=2).sqrt()
    if module.by == "sum":
        return _sum(parts, module.weights)
    if norm == "l1":
        return _sum(parts, [Bound.point(w).sqrt().upper for w in module.weights])
    return _sum(parts, module.weights, power=2).sqrt()


@lipschitz_rule.register(Concat)
@lipschitz_rule.register(Parallel)
@lipschitz_rule.register(Merge)
def _combination(module: Concat | Parallel | Merge, norm: str) -> Bound:
    refuse_in_place(module)
    return _combined(
        module, [part_bound(branch, f"branches.{i}", norm) for i, branch in enumerate(module.branches)], norm
    )


@token_rule.register(Concat)
@token_rule.register(Parallel)
@token_rule.register(Merge)
def _combination_token(module: Concat | Parallel | Merge) -> Bound:
    """Combine as in l2: the parts of a token are entries of one vector, or those of several, of which the largest counts."""
    return _combination(module, TOKEN_MAX)


@branches_of.register(Concat)
@branches_of.register(Parallel)
@branches_of.register(Merge)
def _branches(module: Concat | Parallel | Merge) -> dict[str, nn.Module]:
    return {f"branches.{i}": branch for i, branch in enumerate(module.branches)}


@branch_constant.register(Concat)
@branch_constant.register(Parallel)
@branch_constant.register(Merge)
def _constant(module: Concat | Parallel | Merge, parts: Sequence[Bound], norm: str) -> Bound:
    refuse_in_place(module)
    return _combined(module, parts, norm)


for _kind in (Concat, Parallel, Merge):
    uniform_rule.register(_kind, uniform_of_branches)


@lipschitz_rule.register(nn.Embedding)
@lipschitz_rule.register(nn.EmbeddingBag)
def _embedding(module: nn.Embedding | nn.EmbeddingBag, norm: str) -> Bound:
    name = type(module).__name__
    raise UncertifiableError(
        f"{name} maps indices to vectors: there is no distance between indices, so it has no {norm} Lipschitz constant. "
        f"Bound the model behind it with respect to the embedded vectors; for one-hot inputs, {name} is a Linear without bias."
    )
