r"""Rules for the norm of sequences in which attention is Lipschitz: :math:`\|x\| = \max_i \|x_i\|_2`.

A token :math:`x_i` is the vector along the last dimension; all dimensions between the batch and the last count tokens, so for an
input of shape ``(batch, features)`` this norm is the Euclidean one. Only a class that is registered here has a bound in this
norm: a map that mixes entries of different tokens need not have one. A perturbation of Euclidean (Frobenius) size
:math:`\varepsilon` is one of at most :math:`\varepsilon` in this norm, so what it certifies holds for l2 too.
"""

from __future__ import annotations

import functools

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import Abs, Scale
from stableopt.nn.dispatch import lipschitz_rule

__all__ = ["known_for_tokens", "token_rule"]

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    Abs, Scale, nn.Dropout, nn.ELU, nn.GELU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Tanh,
)  # fmt: skip
_LAST_DIMENSION: tuple[type[nn.Module], ...] = (nn.Linear,)
"""What acts on each token alone and in the same way: the l2 constant of one token is that of all."""
_REGROUPING: tuple[type[nn.Module], ...] = (nn.Unflatten,)
"""What splits tokens or counts them in another way; no entry moves into the token of another."""


@functools.singledispatch
def token_rule(module: nn.Module) -> Bound:
    r"""Return the proved bound of one module in the norm :math:`\max_i\|x_i\|_2`; register a function for a class of your own.

    Args:
        module: the module; a rule reads its current parameters.

    Raises:
        UncertifiableError: for a class without a rule.

    Examples:
        >>> token_rule(nn.Tanh()).upper
        1.0
    """
    raise UncertifiableError(
        f"no token_max Lipschitz rule is known for {type(module).__name__}: it may mix the entries of different tokens. Register "
        f"one: @stableopt.nn.token_rule.register({type(module).__name__}) on a function (module) -> Bound."
    )


def known_for_tokens(module: nn.Module) -> type[nn.Module] | None:
    """Return the class whose token rule would be used for ``module``, or None if there is none.

    Examples:
        >>> known_for_tokens(nn.Linear(1, 1)) is nn.Linear, known_for_tokens(nn.Flatten()) is None
        (True, True)
    """
    for kind in type(module).__mro__:
        if kind in token_rule.registry and kind is not object:
            return kind
    return None


def _of_one_token(module: nn.Module) -> Bound:
    bound = lipschitz_rule(module, "l2")
    return Bound(0.0, bound.upper, bound.proved)


for _kind in (*_ELEMENTWISE, *_LAST_DIMENSION, *_REGROUPING):
    token_rule.register(_kind, _of_one_token)
