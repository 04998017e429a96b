r"""Upper bounds of Lipschitz constants that a block computes its step from, at every forward map of a training.

:func:`stableopt.nn.lipschitz` proves a bound of the stored numbers, once, without derivatives. A block whose step depends on the
constant of a branch needs a bound of the present weights on their device, differentiable and cheap. The rounding of its own
computation is counted in, so that what is proved later about the stored numbers is not above it.
"""

from __future__ import annotations

import functools
import math

import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.nn.budget import Budgeted
from stableopt.nn.dispatch import TOKEN_MAX, check_forward, named, refusal, registered_class
from stableopt.nn.layers import layers
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.tokens import known_for_tokens
from stableopt.nn.uniform import uniform_bound
from stableopt.nn.weights import Geometry, WeightMap
from stableopt.nn.weights.base import slack

__all__ = ["BranchConstant", "training_constant"]


@functools.singledispatch
def training_constant(module: nn.Module, norm: str) -> Tensor | float:  # noqa: ARG001 of the registered ones
    r"""Return an upper bound of the Lipschitz constant of one layer for its present weights, differentiable.

    Register a function for a class of your own, so that its modules can be branches of a block that computes its step from them.

    Args:
        module: the layer; of torch, Linear, the convolutions and the transposed ones.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.

    Returns:
        A 0-d tensor in at least float32, or a number that no parameter changes. It is at least what
        :func:`stableopt.nn.lipschitz` proves for the map of evaluation, also after rounding. Of a layer whose weight
        :func:`stableopt.nn.stabilize` limits it is that limit, which a method that trains with an estimate may exceed a
        little in training.

    Raises:
        UncertifiableError: for a class that is not registered.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.eye_(layer.weight)
        >>> bool(1.0 < training_constant(layer, "linf") < 1.0 + 1e-3)
        True
    """
    raise UncertifiableError(
        f"no bound of a {type(module).__name__} is known that holds while its weights are trained. Limit it by "
        "stableopt.nn.stabilize first, use layers with a fixed constant, or register a function: "
        f"@stableopt.nn.training_constant.register({type(module).__name__})."
    )


@training_constant.register(nn.Linear)
@training_constant.register(nn.Conv1d)
@training_constant.register(nn.Conv2d)
@training_constant.register(nn.Conv3d)
@training_constant.register(nn.ConvTranspose1d)
@training_constant.register(nn.ConvTranspose2d)
@training_constant.register(nn.ConvTranspose3d)
def _weighted(module: nn.Linear | nn.Conv1d, norm: str) -> Tensor | float:
    """Return the limit of a stabilized weight, else the Gram bound or the largest row or column sum."""
    norm = "l2" if norm == TOKEN_MAX else norm
    if P.is_parametrized(module, "weight"):
        outermost = list(module.parametrizations["weight"])[-1]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        if isinstance(outermost, WeightMap) and outermost.norm == norm:
            return outermost.radius
        if isinstance(outermost, Budgeted) and isinstance(outermost.unit, WeightMap) and outermost.unit.norm == norm:
            return outermost.shared()[outermost.index]
    weight, geometry = wide(module.weight), Geometry.of(module)
    with full_precision(weight):
        lost = slack(weight, weight.dtype) + (geometry.proof_slack(weight) if weight.numel() else 0.0)
        return geometry.upper(weight, norm) * (1.0 + lost)


class BranchConstant:
    """What is known of the Lipschitz constant of one branch while it is trained: the product of those of its layers.

    A layer whose class is registered with :func:`training_constant` is asked at every call. All others must have a bound for all
    values of their parameters (:func:`stableopt.nn.uniform_bound`), which is computed once, here.

    Args:
        branch: nested Sequentials of layers.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.
        owner: the class that has the branch, for messages.

    Raises:
        UncertifiableError: naming the first layer that has neither.

    Examples:
        >>> branch = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> constant = BranchConstant(branch, "l2", "ResidualStack")
        >>> constant.fixed
        {'1': 1.0}
    """

    def __init__(self, branch: nn.Module, norm: str, owner: str) -> None:
        self.norm = norm
        self.fixed = _fixed(branch, norm, owner)

    def now(self, branch: nn.Module, path: str = "") -> Tensor | float:
        """Return the product for the present weights.

        Args:
            branch: the branch.
            path: of a part of it, for the recursion.

        Examples:
            >>> branch = nn.Sequential(nn.Tanh(), nn.Sigmoid())
            >>> BranchConstant(branch, "l2", "ResidualStack").now(branch)
            0.25
        """
        if path in self.fixed:
            return self.fixed[path]
        if not isinstance(branch, nn.Sequential):
            return training_constant(branch, self.norm)
        product: Tensor | float = 1.0
        for name, child in branch._modules.items():  # noqa: SLF001 named_children() drops repeated modules
            if child is not None:
                product = product * self.now(child, f"{path}.{name}" if path else name)
        return product

    def still_holds(self, branch: nn.Module, owner: str) -> bool:
        """Return whether the constants that were computed once bound the layers that are there now.

        Args:
            branch: the branch.
            owner: the class that has it.

        Examples:
            >>> branch = nn.Sequential(nn.Tanh())
            >>> constant = BranchConstant(branch, "l2", "ResidualStack")
            >>> branch[0] = nn.GELU()
            >>> constant.still_holds(branch, "ResidualStack")
            False
        """
        try:
            now = _fixed(branch, self.norm, owner)
        except UncertifiableError:
            return False
        return all(path in self.fixed and value <= self.fixed[path] for path, value in now.items())


def _fixed(branch: nn.Module, norm: str, owner: str) -> dict[str, float]:
    """Return the constants of the layers of a branch that are not asked at every forward map, by path.

    Args:
        branch: the branch.
        norm: the norm.
        owner: the class that has it, for messages.

    Raises:
        UncertifiableError: if a layer has no constant that holds during training.

    Examples:
        >>> _fixed(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), "l2", "ResidualStack")
        {'1': 0.25}
    """
    fixed: dict[str, float] = {}
    for path, layer in layers(branch):
        kind = known_for_tokens(layer) if norm == TOKEN_MAX else registered_class(layer)
        if kind is None:
            raise UncertifiableError(f"in a branch of {owner}: {refusal(layer, norm)}")
        check_forward(layer, kind, path)
        if training_constant.dispatch(type(layer)) is not training_constant.dispatch(object):
            continue
        bound = uniform_bound(layer, norm)
        if bound is None or not bound.proved or math.isinf(bound.upper):
            raise UncertifiableError(
                f"{named(layer, path)} in a branch of {owner} has no constant that holds for all values of its parameters, and "
                "none that is measured while it is trained. Replace it, freeze it with requires_grad_(False), or register a "
                f"function: @stableopt.nn.training_constant.register({type(layer).__name__})."
            )
        fixed[path] = bound.upper
    return fixed
