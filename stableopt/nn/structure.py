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
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.rules import lipschitz
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_parts, uniform_rule

__all__ = ["Concat", "Merge", "Parallel", "Residual", "branch_constant", "branches_of"]


class Residual(nn.Module):
    r"""Convex mix of the input and a branch.

    .. math:: x \mapsto (1 - a)\, x + a\, g(x), \qquad 0 \le a \le 1 .

    In every norm the constant is at most :math:`(1 - a) + a L_g`, so at most 1 if the branch has :math:`L_g \le 1`; it is attained
    where the branch acts as :math:`L_g` times the identity. A plain sum :math:`x + g(x)` has :math:`1 + L_g` instead, which doubles
    with every block.

    Args:
        branch: :math:`g`, a module whose output has the shape of its input.
        weight: :math:`a`, in [0, 1], or in (0, 1) if it is learned.
        learnable: whether :math:`a = \operatorname{sigmoid}(r)` is learned, through the parameter ``raw_weight``.

    Raises:
        TypeError: if ``branch`` is no module.
        ValueError: if ``weight`` is out of range or a part of the branch has ``inplace=True``; in ``forward``, if the branch
            changes the shape.

    References:
        Serrurier et al., 2021; Meunier et al., *A Dynamical System Perspective for Lipschitz Neural Networks*, 2022 (other
        1-Lipschitz residual blocks; see :class:`GradientBlock`).

    Examples:
        >>> block = Residual(nn.Identity(), weight=0.25, learnable=False)
        >>> block(torch.tensor([2.0])).tolist(), lipschitz(block).upper
        ([2.0], 1.0)
    """

    raw_weight: nn.Parameter | None

    def __init__(self, branch: nn.Module, weight: float = 0.5, *, learnable: bool = True) -> None:
        super().__init__()
        _check_modules([branch], "Residual")
        if not (0.0 < weight < 1.0 or (weight in {0.0, 1.0} and not learnable)):
            interval = "(0, 1) to be learned" if learnable else "[0, 1]"
            raise ValueError(f"weight must lie in {interval}, got {weight!r}.")
        self.branch = branch
        self.weight = float(weight)
        raw = torch.tensor([math.log(weight / (1.0 - weight))]) if learnable else None  # fully_shard wants an axis
        self.raw_weight = None if raw is None else nn.Parameter(raw)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the mix of the input and the branch."""
        output = self.branch(input)
        if output.shape != input.shape:
            raise ValueError(
                f"the branch of a Residual must keep the shape, got {tuple(output.shape)} from {tuple(input.shape)}."
            )
        weight = self.weight if self.raw_weight is None else self.raw_weight[0].sigmoid()
        return input + weight * (output - input)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"weight={self.weight}, learnable={self.raw_weight is not None}"


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
        >>> lipschitz(Concat(nn.Identity(), nn.Tanh(), nn.ReLU(), nn.Tanh()))
        Bound(lower=0.0, upper=2.0, proved=True)
    """

    def __init__(self, *branches: nn.Module, dim: int = 1) -> None:
        super().__init__()
        _check_modules(branches, "Concat")
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

    The Jacobian is block diagonal: in l2, linf and l1 the constant is exactly the largest constant of a branch.

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
        >>> model(torch.tensor([[-1.0, -2.0, 3.0]])).tolist(), lipschitz(model).upper
        ([[0.0, -2.0, 3.0]], 1.0)
    """

    def __init__(self, *branches: nn.Module, sizes: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        _check_modules(branches, "Parallel")
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
        >>> model(torch.tensor([2.0])).tolist(), lipschitz(model).upper
        ([10.0], 5.0)
    """

    def __init__(self, *branches: nn.Module, weights: Sequence[float] | None = None, by: str = "sum") -> None:
        super().__init__()
        _check_modules(branches, "Merge")
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


def _check_modules(branches: Sequence[nn.Module], name: str) -> None:
    if not branches:
        raise ValueError(f"{name} needs at least one branch.")
    for branch in branches:
        if not isinstance(branch, nn.Module):
            raise TypeError(f"the branches of {name} must be torch.nn.Modules, got {type(branch).__name__}.")
    if (found := _in_place(branches)) is not None:
        raise ValueError(f"{name} got {found}")


def _in_place(branches: Sequence[nn.Module]) -> str | None:
    """Return the sentence about the first part of a branch that overwrites its input, None if there is none.

    All branches, and the skip of a Residual, read the same memory: one that writes to it changes what the others get.
    """
    for index, branch in enumerate(branches):
        for path, part in branch.named_modules():
            if getattr(part, "inplace", False):
                where = f"branch {index}, part '{path}'," if path else f"branch {index}"
                return (
                    f"{type(part).__name__}(inplace=True) in {where} which overwrites an input that other branches read, so "
                    "another map is computed; build it with inplace=False."
                )
    return None


def _refuse_in_place(module: nn.Module) -> None:
    """Refuse a module whose branches got a part with ``inplace=True`` after the module was built."""
    if (found := _in_place(list(branches_of(module).values()))) is not None:
        raise UncertifiableError(f"no bound holds for {type(module).__name__} with {found}")


def _check_dim(dim: int, name: str) -> int:
    if not isinstance(dim, int) or isinstance(dim, bool) or dim == 0:
        raise ValueError(f"{name} joins along a dimension other than 0, the batch; got dim={dim!r}.")
    return dim


def _part(branch: nn.Module, path: str, norm: str) -> Bound:
    """Return the bound of a branch from 0 to its upper end: the branch may not stretch where the others do."""
    try:
        bound = lipschitz(branch, norm)
    except UncertifiableError as error:
        raise UncertifiableError(f"in {path}: {error}") from error
    return Bound(0.0, bound.upper, bound.proved)


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


def _sigmoid(raw: float) -> Bound:
    """Enclose the sigmoid of a float: math.exp is within a unit in the last place, and two operations follow."""
    value = 1.0 / (1.0 + math.exp(-raw)) if raw >= 0 else math.exp(raw) / (1.0 + math.exp(raw))
    return Bound(value * (1.0 - 2.0**-50), min(1.0, math.nextafter(value * (1.0 + 2.0**-50), 2.0)))


@lipschitz_rule.register(Residual)
def _residual(module: Residual, norm: str) -> Bound:
    _refuse_in_place(module)
    inner = _part(module.branch, "branch", norm)
    if module.raw_weight is None:
        a = Bound.point(module.weight)
    elif math.isfinite(raw := float(module.raw_weight.detach())):
        a = _sigmoid(raw)
    else:
        raise ValueError(f"no bound holds for a Residual with the raw weight {raw}.")
    excess = a * (Bound.point(inner.upper) - 1.0)  # (1 - a) + a L = 1 + a (L - 1), with a in one place only
    return Bound(0.0, (1.0 + excess).upper, inner.proved)


def _combined(module: Concat | Parallel | Merge, parts: Sequence[Bound], norm: str) -> Bound:
    """Return the bound of a combination whose branches have the bounds ``parts``."""
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
    _refuse_in_place(module)
    return _combined(module, [_part(branch, f"branches.{i}", norm) for i, branch in enumerate(module.branches)], norm)


@token_rule.register(Residual)
def _residual_token(module: Residual) -> Bound:
    return _residual(module, TOKEN_MAX)


@token_rule.register(Concat)
@token_rule.register(Parallel)
@token_rule.register(Merge)
def _combination_token(module: Concat | Parallel | Merge) -> Bound:
    """Combine as in l2: the parts of a token are entries of one vector, or those of several, of which the largest counts."""
    return _combination(module, TOKEN_MAX)


@uniform_rule.register(Residual)
@uniform_rule.register(Concat)
@uniform_rule.register(Parallel)
@uniform_rule.register(Merge)
def _uniform(module: nn.Module, norm: str) -> Bound | None:
    parts = uniform_parts(list(branches_of(module).values()), norm)
    return None if parts is None else branch_constant(module, parts, norm)


def branches_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the branches of a module of this file by their names in it; none for any other.

    Examples:
        >>> branches_of(Concat(nn.Identity(), nn.ReLU()))
        {'branches.0': Identity(), 'branches.1': ReLU()}
        >>> branches_of(nn.Sequential(nn.ReLU()))
        {}
    """
    if isinstance(module, Residual):
        return {"branch": module.branch}
    if isinstance(module, Concat | Parallel | Merge):
        return {f"branches.{i}": branch for i, branch in enumerate(module.branches)}
    return {}


def branch_constant(module: nn.Module, parts: Sequence[Bound], norm: str) -> Bound:
    """Return the bound of a module of this file for branches with the given bounds and every value of its own parameters.

    Args:
        module: the module.
        parts: one bound for each of its branches.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Raises:
        TypeError: if the module is of another class.
        UncertifiableError: if a part of a branch works in place.

    Examples:
        >>> branch_constant(Concat(nn.Identity(), nn.ReLU()), [Bound.point(3.0), Bound.point(4.0)], "l2").upper
        5.0
    """
    _refuse_in_place(module)
    if isinstance(module, Residual):
        return Bound(0.0, max(1.0, parts[0].upper), parts[0].proved)
    if isinstance(module, Concat | Parallel | Merge):
        return _combined(module, parts, norm)
    raise TypeError(f"a module with branches is expected, got {type(module).__name__}.")


@lipschitz_rule.register(nn.Embedding)
@lipschitz_rule.register(nn.EmbeddingBag)
def _embedding(module: nn.Embedding | nn.EmbeddingBag, norm: str) -> Bound:
    name = type(module).__name__
    raise UncertifiableError(
        f"{name} maps indices to vectors: there is no distance between indices, so it has no {norm} Lipschitz constant. "
        f"Bound the model behind it with respect to the embedded vectors; for one-hot inputs, {name} is a Linear without bias."
    )
