r"""The bound of a whole model, and the rules of what is made of other layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.dispatch import (
    TOKEN_MAX,
    check_forward,
    lipschitz_rule,
    named,
    refusal,
    refused_classes,
    registered_class,
    require_norm,
)
from stableopt.nn.layers import layers
from stableopt.nn.sharded import refuse_spread
from stableopt.nn.tokens import known_for_tokens, token_rule

__all__ = ["lipschitz", "rule_bound"]


def lipschitz(module: nn.Module, norm: str = "l2") -> Bound:
    r"""Bound the Lipschitz constant of the map that ``module`` computes in evaluation mode.

    .. math:: \|f(x) - f(y)\| \le L \|x - y\| \quad\text{for all } x, y .

    Args:
        module: a layer with a rule, or nested :class:`torch.nn.Sequential` of such layers. It is left as it is, in its mode.
        norm: ``"l2"``, ``"linf"`` for the largest absolute value, ``"l1"`` for the sum of the absolute values, or ``"token_max"``
            for the largest Euclidean norm of a token (:mod:`stableopt.nn.tokens`), at input and output, without the batch.

    Returns:
        An enclosure of the smallest :math:`L`; its upper end is proved for the numbers stored now and counts the rounding in its
        own computation. For a chain it is the product of the layers' bounds and the lower end is 0. A bound that rests on what
        you declared of a branch (:func:`stableopt.nn.cfl`) says ``proved=False``.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if the norm is unknown, or a weight holds NaN or infinity.
        UncertifiableError: if no rule is known for a module or for an option of it, or ``fully_shard`` has spread the weights
            over several processes.

    Note:
        It is a statement about the map in real arithmetic. The rounding of a forward pass itself is not covered.

    References:
        Szegedy et al., *Intriguing Properties of Neural Networks*, 2014, section 4.3 (the product of layer bounds).

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].weight, 1.0)
        >>> bool(2.0 <= lipschitz(model).upper < 2.0 + 1e-12)
        True
        >>> lipschitz(nn.GRU(2, 2))
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: no l2 Lipschitz bound for sequences of every length is known for GRU: ...
    """
    require_norm(norm)
    if not isinstance(module, nn.Module):
        raise TypeError(f"lipschitz needs a torch.nn.Module, got {type(module).__name__}.")
    refuse_spread(module, UncertifiableError)
    if type(module) in refused_classes() and registered_class(module) is None:
        raise UncertifiableError(refusal(module, norm))
    with _evaluated(module), torch.no_grad():
        bounds = [rule_bound(layer, norm, path) for path, layer in layers(module)]
    if len(bounds) == 1:
        return bounds[0]
    product = Bound.point(1.0)
    for bound in bounds:
        product = product * Bound(0.0, bound.upper, bound.proved)
    return product


def rule_bound(layer: nn.Module, norm: str, path: str = "") -> Bound:
    """Return the bound of one layer by the rule of its class, after checking that the rule applies.

    Args:
        layer: a layer as yielded by :func:`stableopt.nn.layers`.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.
        path: dotted name for messages.

    Raises:
        UncertifiableError: if there is no rule, or it does not apply.
        ValueError: if a weight holds NaN or infinity.

    Examples:
        >>> rule_bound(nn.Sigmoid(), "l2")
        Bound(lower=0.25, upper=0.25, proved=True)
    """
    kind = registered_class(layer)
    parts = [*layer.parameters(), *layer.buffers()]
    if any(is_lazy(part) for part in parts):
        raise UncertifiableError(
            f"{named(layer, path)} has parameters without a shape yet; run it once on an input so that it gets its weights."
        )
    if any(part.is_meta for part in parts):
        raise UncertifiableError(
            f"{named(layer, path)} is on the meta device, which holds no numbers; move it with to_empty() and load its weights."
        )
    if norm == TOKEN_MAX and kind is not nn.Sequential:
        kind = known_for_tokens(layer)
    if kind is not None:
        check_forward(layer, kind, path)
    try:
        return token_rule(layer) if norm == TOKEN_MAX and kind is not nn.Sequential else lipschitz_rule(layer, norm)
    except UncertifiableError as error:
        if not path:
            raise
        raise UncertifiableError(f"in {named(layer, path)}: {error}") from error


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Put every part of ``module`` into evaluation mode for the duration."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@lipschitz_rule.register(nn.Sequential)
def _sequential(module: nn.Sequential, norm: str) -> Bound:
    return lipschitz(module, norm)
