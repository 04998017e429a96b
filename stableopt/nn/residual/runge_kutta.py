r"""Blocks that take a Runge-Kutta step along a field, within the limit at which the method cannot expand (T3h)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.residual.fields import Field, FieldBound, check_field, field_bound, field_norm
from stableopt.nn.residual.steps import initial_fraction, raw_fraction
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.theory import (
    DOPRI5,
    EULER,
    HEUN,
    HEUN3,
    KUTTA3,
    MIDPOINT,
    RALSTON,
    RK4,
    RK4_38,
    SSPRK33,
    SSPRK43,
    SSPRK104,
    ButcherTableau,
    circle_contractivity_radius,
    monotone_factor,
    monotonicity_radius,
)

__all__ = ["RUNGE_KUTTA", "RungeKuttaBlock", "contractivity_radius", "runge_kutta_step", "step_bound", "tableau_of"]

RUNGE_KUTTA: dict[str, ButcherTableau] = {
    "euler": EULER,
    "heun": HEUN,
    "ralston": RALSTON,
    "kutta3": KUTTA3,
    "ssprk33": SSPRK33,
    "ssprk43": SSPRK43,
    "ssprk104": SSPRK104,
    "rk4": RK4,
    "rk4_38": RK4_38,
    "midpoint": MIDPOINT,
    "heun3": HEUN3,
    "dopri5": DOPRI5,
}
"""The explicit methods by name; any other is a :class:`stableopt.theory.ButcherTableau`."""

_SLACK = 2.0**-20
"""By what fraction a step is shrunk against the rounding of its own product, in float32."""


def tableau_of(method: str | ButcherTableau) -> ButcherTableau:
    """Return the tableau of a method, given by name or as one.

    Args:
        method: a key of :data:`RUNGE_KUTTA`, or an explicit tableau.

    Raises:
        ValueError: if the name is unknown or the method is implicit.

    Examples:
        >>> tableau_of("rk4").stages
        4
    """
    if isinstance(method, str):
        if method not in RUNGE_KUTTA:
            raise ValueError(f"method must be one of {', '.join(RUNGE_KUTTA)} or a ButcherTableau, got {method!r}.")
        return RUNGE_KUTTA[method]
    if not isinstance(method, ButcherTableau):
        raise TypeError(f"method must be a name or a ButcherTableau, got {type(method).__name__}.")
    if not method.explicit:
        raise ValueError(
            f"{method.name} is implicit, and its stages are equations; use an explicit method such as 'euler'."
        )
    return method


@functools.lru_cache(maxsize=256)
def contractivity_radius(tableau: ButcherTableau, norm: str) -> float:
    r"""Return by what factor a method may exceed Euler's limit: the radius of circle contractivity in l2, else of monotonicity.

    Args:
        tableau: an explicit method.
        norm: of the limit.

    Raises:
        ValueError: if there is no such factor; the sentence names a method that works.

    Examples:
        >>> contractivity_radius(RK4, "l2")
        1.0
        >>> contractivity_radius(MIDPOINT, "l2")
        Traceback (most recent call last):
        ValueError: explicit midpoint has circle contractivity radius 0: ... Use method='euler' with substeps=2 ...
    """
    radius = circle_contractivity_radius(tableau) if norm == "l2" else monotonicity_radius(tableau)
    if radius > 0.0:
        return radius
    what = (
        "circle contractivity radius 0: there is a gradient field along which it expands"
        if norm == "l2"
        else (
            f"radius of absolute monotonicity 0: it is no convex combination of Euler steps, as a limit in {norm} needs"
        )
    )
    raise ValueError(
        f"{tableau.name} has {what} at every step size. Use method='euler' with substeps={tableau.stages}, which costs the same "
        f"and is safe for {tableau.stages} times the step of Euler's method, or 'heun' or 'ssprk33'."
    )


def runge_kutta_step(field: nn.Module, state: Tensor, step: Tensor, tableau: ButcherTableau) -> Tensor:
    r"""Return one step :math:`h + \tau\sum_i b_i k_i`, :math:`k_i = f(h + \tau\sum_{j<i} a_{ij} k_j)`.

    Args:
        field: :math:`f`.
        state: :math:`h`.
        step: :math:`\tau`, a 0-d tensor.
        tableau: an explicit method; stages that do not reach the result are not computed.

    Examples:
        >>> runge_kutta_step(nn.Identity(), torch.ones(1), torch.tensor(0.5), HEUN)
        tensor([1.6250])
    """
    slopes: list[Tensor] = []
    for row in tableau.A:
        slopes.append(field(_moved(state, step, slopes, row)))
    return _moved(state, step, slopes, tableau.b)


def _moved(state: Tensor, step: Tensor, slopes: list[Tensor], weights: tuple) -> Tensor:
    terms = [slope if a == 1 else float(a) * slope for a, slope in zip(weights, slopes, strict=False) if a != 0]
    return state + step * functools.reduce(torch.add, terms) if terms else state


def step_bound(tableau: ButcherTableau, bound: FieldBound, step: float) -> Bound:
    r"""Bound the Lipschitz constant of one step of a method along a field.

    The least of what is known: the convex combination of Euler steps (:func:`stableopt.theory.monotone_factor`), 1 within circle
    contractivity, and the recursion :math:`y_i = 1 + \tau L\sum_j|a_{ij}|y_j` that holds always.

    Args:
        tableau: an explicit method.
        bound: what is proved about the field.
        step: :math:`\tau \ge 0`.

    Examples:
        >>> from stableopt.nn.residual.fields import GradientField
        >>> bound = field_bound(GradientField(3, strong=0.5), "l2")
        >>> step_bound(EULER, bound, 0.5).upper, step_bound(RK4, bound, 0.5).upper
        (0.75, 1.0)
    """
    if step == 0.0:
        return Bound.point(1.0)
    known = []
    if (radius := monotonicity_radius(tableau)) > 0.0:
        short = step / radius if radius == 1.0 else (Bound.point(step) / radius).upper
        known.append(monotone_factor(tableau, radius, bound.factor(short).upper))
    if bound.norm == "l2" and step <= (Bound.point(circle_contractivity_radius(tableau)) * bound.max_step).lower:
        known.append(1.0)
    if not known or min(known) > 1.0:
        known.append(_lipschitz_bound(tableau, bound.lipschitz.upper, step))
    return Bound(0.0, min(known))


def _lipschitz_bound(tableau: ButcherTableau, lipschitz: float, step: float) -> float:
    scale = Bound.point(step) * lipschitz
    stages: list[Bound] = []
    for row in (*tableau.A, tableau.b):
        total = Bound.point(0.0)
        for a, y in zip(row, stages, strict=False):
            total = total + Bound.point(math.nextafter(abs(float(a)), math.inf)) * y if a != 0 else total
        stages.append(Bound.point((1.0 + scale * total).upper))
    return stages[-1].upper


class RungeKuttaBlock(nn.Module):
    r"""A step of an explicit Runge-Kutta method along a field, with a learned length that cannot exceed the limit.

    .. math::
        k_i = f\Bigl(h + \tau\sum_{j<i} a_{ij}k_j\Bigr), \quad h \mapsto h + \tau\sum_i b_i k_i, \qquad
        \tau = \operatorname{sigmoid}(r)\; c\, \tau_{\max}, \quad k \text{ times.}

    :math:`\tau_{\max}` is Euler's limit for the field, :math:`2/L` for a gradient field, and :math:`c` the method's radius of
    circle contractivity: a step of the method does not expand up to :math:`2c/L`, and beyond it expands along some field. Per
    evaluation of the field no explicit method allows more than Euler's, hence the default: sub-steps of Euler's method. RK4 has
    :math:`c = 1`, its 3/8 form 0.46; the midpoint rule, Heun's third-order method and Dormand-Prince have 0 and are refused.

    In a norm without an inner product (a field with ``norm = "linf"``) :math:`c` is the radius of absolute monotonicity.

    Args:
        field: a :class:`Field`, which knows its limit; it must keep the shape.
        method: ``"euler"``, ``"heun"``, ``"ralston"``, ``"kutta3"``, ``"ssprk33"``, ``"ssprk43"``, ``"ssprk104"``, ``"rk4"``,
            ``"rk4_38"``, or an explicit :class:`stableopt.theory.ButcherTableau`.
        substeps: k, how many equal steps; the limit of their sum is k times as long. None for 4 of Euler's method, else 1.
        depth: number of blocks in the stack. The initial length is the fraction :math:`1/\max(2, \text{depth})` of its limit.
        step: initial length as a fraction of its limit, in (0, 1); None for the one that fits the depth.

    Raises:
        TypeError: if the field is no :class:`Field`.
        ValueError: if an argument is out of range, or the method has no limit but 0.

    Note:
        The coefficients are used as floats; the rounding of a forward pass is not covered.

    References:
        Dahlquist and Jeltsch, *Generalized disks of contractivity*, 1979; Kraaijevanger, 1991 (other norms).

    Examples:
        >>> from stableopt.nn.residual.fields import GradientField
        >>> _ = torch.manual_seed(0)
        >>> block = RungeKuttaBlock(GradientField(4), method="rk4")
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((block(x) - block(y)).norm() <= (x - y).norm())
        True
        >>> RungeKuttaBlock(GradientField(4), method="dopri5")
        Traceback (most recent call last):
        ValueError: Dormand-Prince 5(4) has circle contractivity radius 0: ... Use method='euler' with substeps=7 ...
    """

    def __init__(
        self,
        field: Field,
        *,
        method: str | ButcherTableau = "euler",
        substeps: int | None = None,
        depth: int = 1,
        step: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(field, Field):
            raise TypeError(
                f"the field of a {type(self).__name__} must be a Field, which knows its step limit, got {type(field).__name__}. "
                "Derive a class from stableopt.nn.Field, or use GradientField, DissipativeField or InfNormField."
            )
        self.tableau = tableau_of(method)
        substeps = (4 if self.tableau == EULER else 1) if substeps is None else substeps
        check_sizes(substeps=substeps)
        self.radius = contractivity_radius(self.tableau, field.norm)
        self.field = field
        self.substeps = substeps
        self.raw_step = raw_fraction(initial_fraction(step, depth))

    def step_size(self) -> Tensor:
        r"""Return the length :math:`\tau` of one of the k steps, a 0-d tensor, at least float32 and differentiable.

        Examples:
            >>> from stableopt.nn.residual.fields import GradientField
            >>> block = RungeKuttaBlock(GradientField(3), substeps=1, step=0.5)
            >>> _ = nn.init.eye_(block.field.weight)
            >>> bool(0.98 < block.step_size() <= 1.0)
            True
        """
        limit = self.field.step_limit()
        return (1.0 - _SLACK) * self.radius * limit * self.raw_step[0].to(limit.dtype).sigmoid()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state."""
        state, step = input, self.step_size()
        for _ in range(self.substeps):
            state = runge_kutta_step(self.field, state, step, self.tableau)
        return state

    def extra_repr(self) -> str:
        """Return the method and how far it may go."""
        return f"method={self.tableau.name!r}, substeps={self.substeps}, limit 2r/L = {2 * self.substeps * self.radius:.6g}/L"


@lipschitz_rule.register(RungeKuttaBlock)
def _runge_kutta(module: RungeKuttaBlock, norm: str) -> Bound:
    tau = float(module.step_size().detach())
    bound = field_bound(module.field, norm)
    if not math.isfinite(tau):
        raise ValueError(f"no bound holds for a {type(module).__name__} with NaN or infinite parameters (step {tau}).")
    return Bound(0.0, (step_bound(module.tableau, bound, tau) ** module.substeps).upper)


@uniform_rule.register(RungeKuttaBlock)
def _uniform(module: RungeKuttaBlock, norm: str) -> Bound | None:
    own = module.field.norm
    check_field(module.field)
    try:
        radius = contractivity_radius(module.tableau, own)
    except ValueError:
        return None
    if module.radius > radius:  # the field was replaced, and the step is limited for another one
        return None
    return Bound(0.0, 1.0) if norm == own or (norm == TOKEN_MAX and own == "l2") else None


@token_rule.register(RungeKuttaBlock)
def _token(module: RungeKuttaBlock) -> Bound:
    return _runge_kutta(module, field_norm(module.field, TOKEN_MAX))
