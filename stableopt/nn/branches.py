r"""What modules made of branches share: which branches they have, what follows from the bounds of these, and what is refused.

A class with branches registers a function with :func:`branches_of` and one with :func:`branch_constant`. Then
:func:`stableopt.nn.stabilize` limits each of its branches, and :func:`stableopt.nn.uniform_bound` is known for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.rules import lipschitz
from stableopt.nn.uniform import uniform_parts

__all__ = [
    "branch_constant",
    "branches_of",
    "check_branches",
    "part_bound",
    "refuse_in_place",
    "same_shape",
    "uniform_of_branches",
]


@functools.singledispatch
def branches_of(module: nn.Module) -> dict[str, nn.Module]:  # noqa: ARG001 the interface of the registered functions
    """Return the branches of a module by their names in it; none for a class that is not registered.

    Args:
        module: the module.

    Examples:
        >>> from stableopt.nn import Concat
        >>> branches_of(Concat(nn.Identity(), nn.ReLU()))
        {'branches.0': Identity(), 'branches.1': ReLU()}
        >>> branches_of(nn.Sequential(nn.ReLU()))
        {}
    """
    return {}


@functools.singledispatch
def branch_constant(module: nn.Module, parts: Sequence[Bound], norm: str) -> Bound:  # noqa: ARG001 as above
    """Return the bound of a module with branches for branches with the given bounds and every value of its own parameters.

    Args:
        module: the module.
        parts: one bound for each of its branches.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.

    Raises:
        TypeError: if the class is not registered.
        UncertifiableError: if a part of a branch works in place.

    Examples:
        >>> from stableopt.nn import Concat
        >>> branch_constant(Concat(nn.Identity(), nn.ReLU()), [Bound.point(3.0), Bound.point(4.0)], "l2").upper
        5.0
    """
    raise TypeError(f"a module with branches is expected, got {type(module).__name__}.")


def check_branches(branches: Sequence[nn.Module], name: str) -> None:
    """Refuse branches that are no modules, and those with a part that overwrites its input.

    Args:
        branches: the branches.
        name: the class that has them, for messages.

    Raises:
        TypeError: if one is no module.
        ValueError: if there is none, or a part of one has ``inplace=True``.

    Examples:
        >>> check_branches([nn.ReLU()], "Concat")
    """
    if not branches:
        raise ValueError(f"{name} needs at least one branch.")
    for branch in branches:
        if not isinstance(branch, nn.Module):
            raise TypeError(f"the branches of {name} must be torch.nn.Modules, got {type(branch).__name__}.")
    if (found := _in_place(branches)) is not None:
        raise ValueError(f"{name} got {found}")


def refuse_in_place(module: nn.Module) -> None:
    """Refuse a module whose branches got a part with ``inplace=True`` after the module was built.

    Raises:
        UncertifiableError: naming the part.

    Examples:
        >>> refuse_in_place(nn.ReLU())
    """
    if (found := _in_place(list(branches_of(module).values()))) is not None:
        raise UncertifiableError(f"no bound holds for {type(module).__name__} with {found}")


def part_bound(branch: nn.Module, path: str, norm: str) -> Bound:
    """Return the bound of a branch from 0 to its upper end: the branch may not stretch where the others do.

    Args:
        branch: the branch.
        path: its name, for messages.
        norm: the norm.

    Raises:
        UncertifiableError: if it has no bound.

    Examples:
        >>> part_bound(nn.Identity(), "branch", "l2")
        Bound(lower=0.0, upper=1.0, proved=True)
    """
    try:
        bound = lipschitz(branch, norm)
    except UncertifiableError as error:
        raise UncertifiableError(f"in {path}: {error}") from error
    return Bound(0.0, bound.upper, bound.proved)


def same_shape(output: Tensor, input: Tensor, name: str) -> Tensor:  # noqa: A002 the name torch uses
    """Return the output of a branch that is added to its input, after checking that torch does not broadcast it.

    Args:
        output: of the branch.
        input: of the branch.
        name: what the message calls it.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> import torch
        >>> same_shape(torch.ones(2, 1), torch.ones(2, 3), "the branch of an AveragedResidual")
        Traceback (most recent call last):
        ValueError: the branch of an AveragedResidual must keep the shape, got (2, 1) from (2, 3).
    """
    if output.shape != input.shape:
        raise ValueError(f"{name} must keep the shape, got {tuple(output.shape)} from {tuple(input.shape)}.")
    return output


def uniform_of_branches(module: nn.Module, norm: str) -> Bound | None:
    """Return the bound for all values of the parameters that follows from those of the branches, None if one has none.

    Examples:
        >>> from stableopt.nn import Concat
        >>> uniform_of_branches(Concat(nn.Identity(), nn.ReLU()), "linf").upper
        1.0
    """
    parts = uniform_parts(list(branches_of(module).values()), norm)
    return None if parts is None else branch_constant(module, parts, norm)


def _in_place(branches: Sequence[nn.Module]) -> str | None:
    """Return the sentence about the first part of a branch that overwrites its input, None if there is none.

    All branches, and the skip of a residual block, read the same memory: one that writes to it changes what the others get.
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
