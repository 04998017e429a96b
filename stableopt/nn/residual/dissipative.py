r"""A dissipative field and its Euler step: a branch that provides its one-sided constant and its Lipschitz constant (T3b)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, inf_norm, one_norm, spectral_norm
from stableopt.nn.arguments import check_nonnegative, check_positive, check_sizes
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.fields import Field, FieldBound, damped_bound, gradient_part, lipschitz_of_field
from stableopt.nn.residual.runge_kutta import RungeKuttaBlock
from stableopt.nn.residual.steps import SMALLEST, rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes

__all__ = ["DissipativeBlock", "DissipativeField"]


class DissipativeField(Field):
    r"""A field that contracts at a chosen rate, whatever its parameters are.

    .. math::
        f(h) = -(m + p)\,h + (W - W^\top)\,h - A^\top\sigma(Ah + b)
               + \frac{p}{\|B\|_2\,\|C\|_2}\, B\,\sigma(Ch + d)

    a decay, a rotation, a gradient and a free part of Lipschitz constant p. With slopes of :math:`\sigma` in [0, 1]

    .. math::
        \langle f(x) - f(y), x - y\rangle \le -m\,\|x - y\|^2, \qquad
        \|f(x) - f(y)\| \le L\,\|x - y\|, \quad
        L = \sqrt{\Bigl(m + p + \tfrac{a^2}2\Bigr)^2 + s^2} + \tfrac{a^2}2 + p,

    where :math:`a = \|A\|_2`, :math:`s = \|W - W^\top\|_2`. **Proof.** The rotation adds nothing to the inner product, the gradient
    nothing positive, the free part at most :math:`p\|x - y\|^2`. The derivative is :math:`-\gamma I + S + E` with :math:`\gamma = m
    + p + a^2/2` and :math:`\|E\| \le \rho = a^2/2 + p`, because :math:`\|a^2/2 - A^\top DA\| \le a^2/2`.

    *A trap:* :math:`\sigma(Kh + b) - \gamma h` with K skew is *not* dissipative. Its derivative has :math:`DK` with the slopes D,
    which is not skew, and the symmetric part of :math:`DK` can exceed :math:`\gamma`, although all eigenvalues of every frozen
    derivative have a real part of at most :math:`-\gamma`. Here the rotation stays outside of :math:`\sigma`.

    Args:
        dim: number of features.
        hidden: rows of :math:`A` and :math:`C`; None for ``dim``.
        rate: :math:`m > 0`, at which the flow contracts.
        free: :math:`p \ge 0`; with 0 there are no :math:`B, C, d`.
        learn_rate: whether :math:`m = \text{rate}\, e^{15\tanh(r/15)}` is learned, through the parameter ``raw_rate``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        The two norms under the free part come from Gram iteration, upper bounds in exact arithmetic, with a slack for rounding;
        what is proved about the stored numbers is said by :func:`stableopt.nn.residual.field_bound`.

    References:
        Celledoni, Murari, Owren, Schönlieb and Sherry, *Dynamical Systems-Based Neural Networks*, 2023.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> field = DissipativeField(4, rate=0.5)
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((field(x) - field(y)) @ (x - y) <= -0.49 * (x - y) @ (x - y))
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        rate: float = 0.1,
        free: float = 1.0,
        learn_rate: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden)
        check_positive(rate=rate)
        check_nonnegative(free=free)
        check_unit_slopes(activation, "DissipativeField")
        self.rate, self.free, self.activation = float(rate), float(free), activation
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.skew = nn.Parameter(torch.empty(dim, dim))
        self.inner = nn.Parameter(torch.empty(hidden, dim)) if free else None
        self.inner_bias = nn.Parameter(torch.empty(hidden)) if free else None
        self.outer = nn.Parameter(torch.empty(dim, hidden)) if free else None
        self.raw_rate = nn.Parameter(torch.zeros(1)) if learn_rate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthonormal rows or columns and a small rotation, and set the biases to zero; the rate stays."""
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.skew, std=0.03 / math.sqrt(len(self.skew)))  # a rotation of a norm near 0.1
        if self.inner is not None and self.outer is not None and self.inner_bias is not None:
            nn.init.orthogonal_(self.inner)
            nn.init.orthogonal_(self.outer)
            nn.init.zeros_(self.inner_bias)

    def current_rate(self) -> Tensor | float:
        """Return the rate :math:`m`; if it is learned, a 0-d tensor.

        Examples:
            >>> DissipativeField(2, rate=0.25).current_rate()
            0.25
        """
        return self.rate if self.raw_rate is None else self.rate * bounded_exp(wide(self.raw_rate)[0])

    def rotation(self) -> Tensor:
        """Return the skew matrix of the rotation, exactly skew also after rounding.

        Examples:
            >>> S = DissipativeField(3).rotation()
            >>> bool((S == -S.mT).all())
            True
        """
        return self.skew - self.skew.mT

    def free_scale(self) -> Tensor | None:
        """Return the factor of the free part, a 0-d tensor, at least float32; None without a free part.

        Examples:
            >>> DissipativeField(3, free=0.0).free_scale() is None
            True
        """
        if self.inner is None or self.outer is None:
            return None
        inner, outer = wide(self.inner), wide(self.outer)
        with full_precision(inner):
            norms = gram_norm(inner) * gram_norm(outer)
        return (1.0 - 2.0 * rounding_slack(inner)) * self.free / norms.clamp_min(SMALLEST)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the field at the states whose features are the last dimension of the input."""
        slope = F.linear(input, self.rotation()) - gradient_part(input, self.weight, self.bias, self.activation)
        slope = slope - (self.current_rate() + self.free) * input
        scale = self.free_scale()
        if scale is None or self.inner is None or self.outer is None:
            return slope
        hidden = UNIT_SLOPES[self.activation](F.linear(input, self.inner, self.inner_bias))
        return slope + scale * F.linear(hidden, self.outer)

    def step_limit(self) -> Tensor:
        r"""Return Euler's limit :math:`2/(m + 2p + a^2 + s^2/m)`, from Gram bounds, less a slack for rounding.

        It is :math:`2m/(\gamma^2 + s^2 - \rho^2)`, larger than the :math:`2m/L^2` of a field of which only m and L are known.

        Examples:
            >>> bool(DissipativeField(3).step_limit() > 0)
            True
        """
        weight, skew = wide(self.weight), wide(self.rotation())
        m = self.current_rate()
        with full_precision(weight):
            U, s = gram_norm(weight), gram_norm(skew)
        slack = 2.0 * max(rounding_slack(weight), rounding_slack(skew))
        return (1.0 - slack) * 2.0 / (m + 2.0 * self.free + U * U + s * s / m)

    @torch.no_grad()
    def bound(self, norm: str) -> FieldBound:
        """Return rate, Lipschitz constant and step law, proved for the stored numbers.

        Args:
            norm: ``"l2"``, where everything is sharp, ``"linf"`` or ``"l1"``, where only the decay counts.

        Examples:
            >>> DissipativeField(3, rate=0.5).bound("l2").rate.lower >= 0.5
            True
        """
        order = {"l2": spectral_norm, "linf": inf_norm, "l1": one_norm}[norm]
        damping, rest, S = Bound.point(float(self.current_rate() + self.free)), Bound.point(0.0), self.rotation()
        scale = self.free_scale()
        if scale is not None and self.inner is not None and self.outer is not None:
            rest = Bound.point(float(scale)) * order(self.inner).upper * order(self.outer).upper
        if norm == "l2":
            curvature = Bound.point(spectral_norm(self.weight).upper) ** 2
            return damped_bound(norm, damping, rest, curvature=curvature, skew=Bound.point(spectral_norm(S).upper))
        return damped_bound(norm, damping, rest + order(S).upper + one_norm(self.weight) * inf_norm(self.weight))

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        learned = self.raw_rate is not None
        return (
            f"{dim}, {hidden}, rate={self.rate}, free={self.free}, learn_rate={learned}, activation={self.activation!r}"
        )


class DissipativeBlock(RungeKuttaBlock):
    r"""Residual block that contracts, whatever its parameters are: an Euler step of a :class:`DissipativeField`.

    .. math::
        h \mapsto h + \tau f(h), \qquad \tau = \operatorname{sigmoid}(r)\,\tau_{\max}, \quad
        \tau_{\max} = \frac{2}{m + 2p + a^2 + s^2/m}

    Its Lipschitz constant is at most :math:`\sqrt{(1 - \tau\gamma)^2 + \tau^2s^2} + \tau\rho < 1`, with the letters of
    :class:`DissipativeField`; that is never more than :math:`\sqrt{1 - 2\tau m + \tau^2L^2}`, all that m and L alone allow.

    **Proof.**
    :math:`I + \tau J = (1 - \tau\gamma)I + \tau S + \tau E`; the first two parts are normal, with eigenvalues :math:`1 - \tau\gamma
    + i\tau\omega`, :math:`|\omega| \le s`. The sum is at most 1 iff :math:`\tau \le 2(\gamma - \rho)/(\gamma^2 + s^2 - \rho^2)`.

    Args:
        dim: number of features of input and output.
        hidden: hidden units of gradient and free part; None for ``dim``.
        rate: :math:`m > 0`.
        free: :math:`p \ge 0`, the Lipschitz constant of the free part.
        learn_rate: whether the rate is learned.
        depth: number of blocks in the stack; the initial step is the fraction :math:`1/\max(2, \text{depth})` of its limit.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Note:
        The factor of a block depends on its learned step. A stack contracts at the rate m per unit of its time :math:`\sum\tau`.

    References:
        Celledoni et al., 2023 (the step limit of one-sided Lipschitz fields).

    Examples:
        >>> from stableopt.nn import lipschitz
        >>> block = DissipativeBlock(4, rate=0.5)
        >>> lipschitz(block).upper < 1.0
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        rate: float = 0.1,
        free: float = 1.0,
        learn_rate: bool = False,
        depth: int = 1,
        activation: str = "relu",
        step: float | None = None,
    ) -> None:
        field = DissipativeField(dim, hidden, rate=rate, free=free, learn_rate=learn_rate, activation=activation)
        super().__init__(field, substeps=1, depth=depth, step=step)


lipschitz_rule.register(DissipativeField)(lipschitz_of_field)


@token_rule.register(DissipativeField)
def _token(module: DissipativeField) -> Bound:
    return lipschitz_of_field(module, "l2")
