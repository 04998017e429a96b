r"""Vector fields :math:`f` of which a step limit is proved, for blocks and flows :math:`\dot h = f(h)`.

Two numbers say what a step :math:`h + \tau f(h)` does: the *rate* :math:`m`, where :math:`-m` bounds the logarithmic norm of the
derivative, and the *limit* of the steps that do not expand. In l2 the limit also is what a Runge-Kutta method needs to know: that
Euler's step at :math:`\tau_{\max}` is nonexpansive is the same inequality as

.. math:: \langle f(x) - f(y), x - y\rangle \le -\frac{\tau_{\max}}{2}\,\|f(x) - f(y)\|^2 ,

cocoercivity, the hypothesis of circle contractivity (T3h) with :math:`2/\tau_{\max}` in place of L.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, inf_norm, one_norm, spectral_norm
from stableopt.nn.arguments import check_nonnegative, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, check_forward, lipschitz_rule
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import SMALLEST, rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes
from stableopt.theory import skew_damped_factor

__all__ = [
    "Field",
    "FieldBound",
    "GradientField",
    "check_field",
    "damped_bound",
    "field_bound",
    "field_norm",
    "gradient_part",
    "lipschitz_of_field",
]

_ZERO = Bound.point(0.0)


@dataclass(frozen=True)
class FieldBound:
    r"""What is proved about a field in one norm, for the numbers stored now.

    Args:
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.
        rate: :math:`m`: the logarithmic norm of every derivative is at most :math:`-m`, the lower end of which counts.
        lipschitz: a Lipschitz constant, the upper end of which counts.
        max_step: the largest step of Euler's method that is proved not to expand; 0 if there is none.
        law: the Lipschitz constant of a step as a function of the step, :math:`\tau > 0`.

    Examples:
        >>> field_bound(GradientField(3, strong=0.5), "l2").rate.lower
        0.5
    """

    norm: str
    rate: Bound
    lipschitz: Bound
    max_step: float
    law: Callable[[Bound], Bound]

    def factor(self, step: float) -> Bound:
        r"""Bound the Lipschitz constant of :math:`h + \tau f(h)`; at most 1, exactly, up to the largest step.

        Args:
            step: :math:`\tau \ge 0`.

        Examples:
            >>> field_bound(GradientField(3, strong=0.5), "l2").factor(0.5).upper
            0.75
        """
        if step == 0.0:
            return Bound.point(1.0)
        upper = self.law(Bound.point(step)).upper
        return Bound(0.0, min(upper, 1.0) if step <= self.max_step else upper)


class Field(nn.Module):
    r"""A vector field with a proved step limit: the interface for fields of your own.

    A subclass defines ``forward``, :meth:`step_limit` and :meth:`bound`. The norm of :meth:`step_limit` is the attribute ``norm``.

    Examples:
        >>> class Decay(Field):
        ...     def forward(self, input):
        ...         return -input
        ...
        ...     def step_limit(self):
        ...         return torch.ones(())
        ...
        ...     def bound(self, norm):
        ...         return damped_bound(norm, Bound.point(1.0))
        >>> field_bound(Decay(), "l2").max_step
        2.0
    """

    norm = "l2"

    def step_limit(self) -> Tensor:
        """Return a step that Euler's method may take in the norm ``norm``: a 0-d tensor, at least float32, differentiable.

        Raises:
            NotImplementedError: in a subclass that does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step_limit().")

    def bound(self, norm: str) -> FieldBound:
        """Return what is proved about the field in a norm; call :func:`field_bound`, which also checks hooks and subclasses.

        Args:
            norm: ``"l2"``, ``"linf"`` or ``"l1"``.

        Raises:
            NotImplementedError: in a subclass that does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define bound(norm).")


def field_bound(field: Field, norm: str) -> FieldBound:
    """Return what is proved about a field, after checking that its class says so about the map that it computes.

    Args:
        field: the field.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Raises:
        UncertifiableError: if a subclass or a hook may change the map.
        ValueError: if a parameter is NaN or infinite.

    Examples:
        >>> field_bound(GradientField(3), "l2").norm
        'l2'
    """
    check_field(field)
    for name, parameter in field.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"no bound holds for a {type(field).__name__} with NaN or infinite numbers in {name}.")
    with torch.no_grad():
        return field.bound(norm)


def check_field(field: Field) -> None:
    """Refuse a field whose map or limit is changed below the class that says what is proved about it.

    Args:
        field: the field.

    Raises:
        UncertifiableError: if a subclass or a hook may change the map.

    Examples:
        >>> check_field(GradientField(3))
    """
    check_forward(field, next(c for c in type(field).__mro__ if "bound" in vars(c)))


def damped_bound(
    norm: str, damping: Bound, rest: Bound = _ZERO, *, curvature: Bound = _ZERO, skew: Bound = _ZERO
) -> FieldBound:
    r"""Return the bound of :math:`f(h) = (K - cI)h - \nabla\varphi(h) + g(h)`.

    With :math:`\nabla^2\varphi` between 0 and :math:`\kappa` its derivative is :math:`-(c + \kappa/2)I + K + E`, :math:`\|E\| \le
    \rho = \kappa/2 + \operatorname{Lip} g`, so that T3e applies with :math:`\gamma = c + \kappa/2`:

    .. math::
        m = c - \operatorname{Lip} g, \qquad L = \sqrt{\gamma^2 + \|K\|^2} + \rho, \qquad
        \tau_{\max} = \frac{2m}{\gamma^2 + \|K\|^2 - \rho^2}
                    = \frac{2}{c + \kappa + \operatorname{Lip} g + \|K\|^2/m} .

    Args:
        norm: of the statement; in linf and l1 everything but the damping belongs to the rest.
        damping: :math:`c \ge 0`.
        rest: Lip g.
        curvature: :math:`\kappa`, only in l2.
        skew: :math:`\|K\|_2`, :math:`K^\top = -K`, only in l2.

    Examples:
        >>> bound = damped_bound("l2", Bound.point(1.0), curvature=Bound.point(3.0))
        >>> bound.rate.lower, bound.lipschitz.upper, bound.max_step
        (1.0, 4.0, 0.5)
    """
    half, m = curvature / 2, damping - rest
    gamma, rho = damping + half, half + rest
    L = (gamma**2 + skew**2).sqrt() + rho if math.isfinite(gamma.upper) else Bound.point(math.inf)
    total = damping + curvature + rest  # gamma + rho, and m = gamma - rho, without the difference of two large numbers
    if m.lower < 0.0 or (m.lower == 0.0 and skew.upper > 0.0) or not math.isfinite(total.upper):
        max_step = 0.0
    elif skew.upper > 0.0:
        max_step = (2.0 / (total + skew**2 / m)).lower
    else:
        max_step = (2.0 / Bound.point(total.upper)).lower if total.upper > 0.0 else math.inf

    def law(step: Bound) -> Bound:
        if skew.upper == 0.0:  # the ends of the spectrum, without the sum of two roundings
            return abs(1.0 - step * m).join(abs(1.0 - step * total))
        factor = skew_damped_factor(step, gamma, skew, rho)
        return factor if isinstance(factor, Bound) else Bound.point(factor)

    return FieldBound(norm, m, L, max_step, law)


class GradientField(Field):
    r"""Minus the gradient of a convex function, a cocoercive field.

    .. math:: f(h) = -\bigl(m h + A^\top \sigma(A h + b)\bigr)

    With slopes of :math:`\sigma` in [0, 1] its derivative is symmetric with spectrum in :math:`[-(m + \|A\|_2^2), -m]`: it is
    cocoercive with :math:`L = m + \|A\|_2^2`, and Euler's step does not expand up to :math:`2/L`. :class:`GradientBlock` is its
    Euler step.

    Args:
        dim: number of features.
        hidden: rows of :math:`A`; None for ``dim``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        strong: :math:`m \ge 0`.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    References:
        Baillon and Haddad, 1977.

    Examples:
        >>> field = GradientField(4)
        >>> _ = nn.init.eye_(field.weight)
        >>> round(field_bound(field, "l2").max_step, 9)
        2.0
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: str = "relu", strong: float = 0.0) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden)
        check_nonnegative(strong=strong)
        check_unit_slopes(activation, "GradientField")
        self.activation = activation
        self.strong = float(strong)
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new weight with orthonormal rows or columns and set the bias to zero."""
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the field at the states whose features are the last dimension of the input."""
        slope = gradient_part(input, self.weight, self.bias, self.activation)
        return -(slope + self.strong * input) if self.strong else -slope

    def step_limit(self) -> Tensor:
        """Return Euler's limit 2/L, from the Gram bound of the weight, less a slack for rounding.

        Examples:
            >>> bool(GradientField(3).step_limit() <= 2.0)
            True
        """
        weight = wide(self.weight)
        with full_precision(weight):
            U = gram_norm(weight)
        return (1.0 - rounding_slack(weight)) * 2.0 / (self.strong + U * U).clamp_min(SMALLEST)

    @torch.no_grad()
    def bound(self, norm: str) -> FieldBound:
        """Return rate, Lipschitz constant and step law, proved for the stored numbers.

        Args:
            norm: ``"l2"``, where everything is sharp, ``"linf"`` or ``"l1"``.

        Examples:
            >>> GradientField(3, strong=0.5).bound("l2").rate.lower
            0.5
        """
        damping = Bound.point(self.strong)
        if norm == "l2":
            return damped_bound(norm, damping, curvature=Bound.point(spectral_norm(self.weight).upper) ** 2)
        return damped_bound(norm, damping, one_norm(self.weight) * inf_norm(self.weight))

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        return f"{dim}, {hidden}, activation={self.activation!r}, strong={self.strong}"


def gradient_part(input: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:  # noqa: A002
    r"""Return :math:`A^\top \sigma(A h + b)`, the gradient of a convex function.

    Examples:
        >>> gradient_part(torch.tensor([2.0]), torch.tensor([[3.0]]), torch.tensor([1.0]), "relu")
        tensor([21.])
    """
    return F.linear(UNIT_SLOPES[activation](F.linear(input, weight, bias)), weight.mT)


def lipschitz_of_field(module: Field, norm: str) -> Bound:
    """Return the rule of a class of fields, to be registered for it.

    Args:
        module: the field.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Examples:
        >>> lipschitz_of_field(GradientField(3, strong=0.5), "l2").lower
        0.0
    """
    return Bound(0.0, field_bound(module, norm).lipschitz.upper)


lipschitz_rule.register(GradientField)(lipschitz_of_field)


@token_rule.register(GradientField)
def _token(module: GradientField) -> Bound:
    return lipschitz_of_field(module, "l2")


def field_norm(field: Field, norm: str) -> str:
    """Return the norm of one token where a bound for tokens is asked for, if the field acts on each token alone.

    Raises:
        UncertifiableError: if the field may mix the entries of different tokens.

    Examples:
        >>> field_norm(GradientField(2), "token_max"), field_norm(GradientField(2), "linf")
        ('l2', 'linf')
    """
    if norm != TOKEN_MAX:
        return norm
    token_rule(field)  # refuses what is not known to act on each token alone
    return "l2"
