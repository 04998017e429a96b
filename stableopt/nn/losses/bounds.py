r"""Upper bounds of the Lipschitz constants of all margins of a model, for its present weights, differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import Scale
from stableopt.nn.branches import branch_constant, branches_of
from stableopt.nn.dispatch import TOKEN_MAX, check_forward, refusal, registered_class
from stableopt.nn.heads import UnitRowLinear, margin_radii
from stableopt.nn.layers import layers
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.rules import lipschitz
from stableopt.nn.tokens import known_for_tokens
from stableopt.nn.training_constants import training_constant
from stableopt.nn.uniform import uniform_bound

__all__ = ["MarginBounds", "pair_norms"]

_DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf, TOKEN_MAX: 2.0}
_AFTER_HEAD = (nn.Identity, nn.Dropout, Scale)
"""What multiplies all logits alike, so that the differences of the rows before it still count."""
_DIRECT = 2**24
"""Up to so many numbers the differences of all rows are formed; beyond, torch.cdist has the first derivative only."""


class MarginBounds:
    r"""Upper bounds of the Lipschitz constants of the margins of a model while it is trained.

    .. math:: K_{ij} = \Bigl(\prod_l L_l\Bigr) \|w_i - w_j\|_*, \qquad |(z_i - z_j)(x) - (z_i - z_j)(y)| \le K_{ij} \|x - y\|

    with the constants :math:`L_l` of the layers before a dense head with the rows :math:`w` (Linear or
    :class:`~stableopt.nn.UnitRowLinear`), and the dual norm: l2 for l2, l1 for linf. For other heads, with the constant
    :math:`L` of the whole model, it is :math:`\sqrt2 L` in l2, :math:`2L` in linf and :math:`L` in l1.

    :math:`L_l` is the limit of a weight that :func:`stableopt.nn.stabilize` limits; of all other layers with a
    :func:`~stableopt.nn.training_constant` that bound, differentiable; the bound for all parameters
    (:func:`~stableopt.nn.uniform_bound`), which is computed once, here; and else what :func:`~stableopt.nn.lipschitz` proves at
    each call, without derivatives.

    Args:
        model: nested Sequentials of layers. It is not copied, and no submodule of a loss that has these bounds.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``, of the input.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if the norm is unknown.
        UncertifiableError: if a layer has no Lipschitz constant in the norm, or the order of the layers cannot be known.

    Note:
        They bound the map of evaluation; rounding in computing them is counted, so what is proved later about the same weights is
        not above them (a certificate rounds up by a relative 1e-9 of its own). In training mode the logits of a model with
        dropout, batch statistics or a method that trains with an estimate (``"power"``) are those of another map. After changing
        frozen numbers, such as those of an InputNormalization, build the bounds anew.

    References:
        Tsuzuku, Sato and Sugiyama, *Lipschitz-Margin Training*, 2018; Leino, Wang and Fredrikson, *Globally-Robust Neural
        Networks*, 2021 (constants per pair).

    Examples:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(head.weight)
        >>> K = MarginBounds(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), head))(2)
        >>> K.shape, bool(K[0, 0] == 0), K.requires_grad
        (torch.Size([2, 2]), True, True)
    """

    def __init__(self, model: nn.Module, norm: str = "l2") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"MarginBounds needs a torch.nn.Module, got {type(model).__name__}.")
        if norm not in _DUAL:
            raise ValueError(f"norm must be 'l2', 'linf', 'l1' or 'token_max', got {norm!r}.")
        self.model, self.norm = model, norm
        self._read()
        self._before()  # refuses here what has no constant, not in the first step

    def __call__(self, classes: int) -> Tensor:
        """Return the bounds for the present weights.

        Args:
            classes: how many outputs the model has.

        Returns:
            Shape ``(classes, classes)``, in at least float32, on the device of the weights, 0 on the diagonal and for equal rows.

        Raises:
            ValueError: if the head has another number of outputs.

        Examples:
            >>> K = MarginBounds(nn.ReLU())(3)  # no dense head: the square root of 2 for each pair
            >>> K[0].sub(2**0.5).abs().lt(1e-5).tolist()
            [False, True, True]
        """
        if not torch.compiler.is_compiling() and [part for _, part in layers(self.model)] != self._chain:
            self._read()  # a layer was replaced
        L = self._before()
        if self._head is None:
            return self._without_head(L, classes)
        rows = self._head.unit_weight() if isinstance(self._head, UnitRowLinear) else self._head.weight
        if len(rows) != classes:
            raise ValueError(f"the head of the model has {len(rows)} outputs, got logits of {classes} classes.")
        rows = wide(rows)
        with full_precision(rows):
            return L * pair_norms(rows, _DUAL[self.norm]) * (1.0 + (len(self._chain) + 4) * torch.finfo(rows.dtype).eps)

    def radii(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return certified radii at the present weights, see :func:`stableopt.nn.margin_radii`.

        Args:
            logits: of the model in evaluation mode, shape ``(N, C)``.
            target: labels, shape ``(N,)``; wrongly classified samples have the radius 0.

        Returns:
            Shape ``(N,)``, float64: 0 for a tie or NaN. The rounding in computing the logits is not counted.

        Examples:
            >>> head = nn.Linear(1, 2, bias=False)
            >>> _ = nn.init.constant_(head.weight[0].data, 1.0), nn.init.constant_(head.weight[1].data, -1.0)
            >>> bounds, x = MarginBounds(head), torch.tensor([[3.0], [0.0]])
            >>> bounds.radii(head(x)).round(decimals=4).tolist()
            [3.0, 0.0]
        """
        return margin_radii(logits, self(logits.shape[-1]).detach(), 1.0, target)

    def _read(self) -> None:
        """Find the layers, the head, and the constants that no parameter changes."""
        named = list(layers(self.model))
        self._chain = [part for _, part in named]
        last = len(named) - 1
        while last > 0 and type(named[last][1]) in _AFTER_HEAD:
            last -= 1
        head = named[last][1] if named else None
        self._head = head if isinstance(head, nn.Linear | UnitRowLinear) else None
        if self._head is not None:
            check_forward(self._head, registered_class(self._head) or nn.Linear, named[last][0])
        self._factors = [
            (path, part, _at(path, self._fixed, part, path))
            for index, (path, part) in enumerate(named)
            if index != last or self._head is None
        ]

    def _fixed(self, layer: nn.Module, path: str) -> float | None:
        """Return the constant of a layer for all values of its parameters, None if it has to be asked at each call."""
        kind = known_for_tokens(layer) if self.norm == TOKEN_MAX else registered_class(layer)
        if kind is None:
            raise UncertifiableError(refusal(layer, self.norm))
        check_forward(layer, kind, path)
        if training_constant.dispatch(type(layer)) is not training_constant.dispatch(object):
            return None
        bound = uniform_bound(layer, self.norm)
        return None if bound is None or not bound.proved or math.isinf(bound.upper) else bound.upper

    def _before(self) -> Tensor | float:
        product: Tensor | float = 1.0
        for path, layer, fixed in self._factors:
            product = product * (_at(path, _constant, layer, self.norm) if fixed is None else fixed)
        return product

    def _without_head(self, L: Tensor | float, classes: int) -> Tensor:
        factor = {"l2": math.sqrt(2.0), TOKEN_MAX: math.sqrt(2.0), "linf": 2.0, "l1": 1.0}[self.norm]
        L = L if isinstance(L, Tensor) else torch.tensor(L)
        others = 1.0 - torch.eye(classes, dtype=L.dtype, device=L.device)
        return L * others * (factor * (1.0 + (len(self._chain) + 8) * torch.finfo(L.dtype).eps))


def pair_norms(rows: Tensor, p: float) -> Tensor:
    r"""Return upper bounds of :math:`\|w_i - w_j\|_p` for all pairs of rows, differentiable.

    Args:
        rows: shape ``(C, n)``, float32 or float64.
        p: 1, 2 or infinity.

    Returns:
        Shape ``(C, C)``. The rounding is counted: above the norm by a relative amount of at most :math:`3(n + 8)` units in the
        last place, and an absolute one that a difference far below the largest one needs. Equal rows have 0 and no gradient.
        Scaling by a power of two scales the result exactly, far from over- and underflow.

    Examples:
        >>> pair_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 2.0).sub(5.0).abs().lt(1e-4).tolist()
        [[False, True], [True, False]]
    """
    (C, n), kind = rows.shape, torch.finfo(rows.dtype)
    lost = 1.0 + (n + 8) * kind.eps  # n + 3 roundings of half of eps each
    if C * C * n > _DIRECT:
        size = rows.detach().abs().amax()
        size = torch.where(size > 0, size, torch.ones_like(size))
        scaled = rows / size  # rounds each entry, by an absolute amount
        K = torch.cdist(scaled, scaled, p, compute_mode="donot_use_mm_for_euclid_dist") * lost
        equal = torch.cdist(rows.detach(), rows.detach(), math.inf) == 0
        return torch.where(equal, torch.zeros_like(K), K + n * kind.eps) * size
    difference = rows.unsqueeze(1) - rows
    size = difference.detach().abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    entries = (difference / size).abs()
    equal = (difference == 0).all(2)
    if p == 1.0:
        K = entries.sum(2)
    elif p == 2.0:
        square = entries.square().sum(2)
        K = torch.where(square > 0, square, torch.ones_like(square)).sqrt()  # no derivative of a root at 0
        K = torch.where(square > 0, K, torch.zeros_like(K))
    else:
        K = entries.amax(2)
    return torch.where(equal, torch.zeros_like(K), K * lost + math.sqrt(n * kind.tiny)) * size


def _at(path: str, function: Callable[..., Any], *args: object) -> Any:
    """Call a function, and say of which layer its refusal speaks."""
    try:
        return function(*args)
    except UncertifiableError as error:
        raise UncertifiableError(
            f"at '{path}': {error}" if path and f"'{path}'" not in str(error) else str(error)
        ) from None


def _constant(layer: nn.Module, norm: str) -> Tensor | float:
    """Return the constant of one layer for its present weights."""
    if training_constant.dispatch(type(layer)) is not training_constant.dispatch(object):
        return training_constant(layer, norm)
    if branches := branches_of(layer):
        parts = [_chain_constant(branch, norm) for branch in branches.values()]
        if all(isinstance(part, float) for part in parts):
            return branch_constant(layer, [Bound(0.0, float(part)) for part in parts], norm).upper
    return lipschitz(layer, norm).upper


def _chain_constant(branch: nn.Module, norm: str) -> Tensor | float:
    try:
        return math.prod((_constant(part, norm) for _, part in layers(branch)), start=1.0)  # pyright: ignore[reportArgumentType]
    except UncertifiableError:
        return lipschitz(branch, norm).upper
