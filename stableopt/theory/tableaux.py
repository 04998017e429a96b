"""Named Runge-Kutta methods: each is only its tableau."""

from __future__ import annotations

from fractions import Fraction

from stableopt.theory.runge_kutta import ButcherTableau

__all__ = [
    "BACKWARD_EULER",
    "DOPRI5",
    "EULER",
    "HEUN",
    "HEUN3",
    "IMPLICIT_MIDPOINT",
    "KUTTA3",
    "MIDPOINT",
    "RADAU_IIA",
    "RALSTON",
    "RK4",
    "RK4_38",
    "SSPRK33",
    "SSPRK43",
    "SSPRK104",
    "TABLEAUX",
    "TRAPEZOIDAL",
    "ssprk2",
    "substepped_euler",
]

_0, _1, _2, _3, _6 = Fraction(0), Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)

EULER = ButcherTableau(((),), (_1,), "Euler")
MIDPOINT = ButcherTableau(((), (_2,)), (_0, _1), "explicit midpoint")
HEUN = ButcherTableau(((), (_1,)), (_2, _2), "Heun")
RALSTON = ButcherTableau(((), (Fraction(2, 3),)), (Fraction(1, 4), Fraction(3, 4)), "Ralston")
KUTTA3 = ButcherTableau(((), (_2,), (-_1, Fraction(2))), (_6, Fraction(2, 3), _6), "Kutta 3")
HEUN3 = ButcherTableau(((), (_3,), (_0, Fraction(2, 3))), (Fraction(1, 4), _0, Fraction(3, 4)), "Heun 3")
SSPRK33 = ButcherTableau(((), (_1,), (Fraction(1, 4), Fraction(1, 4))), (_6, _6, Fraction(2, 3)), "SSPRK(3,3)")
SSPRK43 = ButcherTableau(((), (_2,), (_2, _2), (_6, _6, _6)), (_6, _6, _6, _2), "SSPRK(4,3)")
RK4 = ButcherTableau(((), (_2,), (_0, _2), (_0, _0, _1)), (_6, _3, _3, _6), "RK4")
RK4_38 = ButcherTableau(
    ((), (_3,), (-_3, _1), (_1, -_1, _1)),
    (Fraction(1, 8), Fraction(3, 8), Fraction(3, 8), Fraction(1, 8)),
    "RK4, 3/8 rule",
)
SSPRK104 = ButcherTableau(
    (*((_6,) * i for i in range(5)), *((Fraction(1, 15),) * 5 + (_6,) * i for i in range(5))),
    (Fraction(1, 10),) * 10,
    "SSPRK(10,4)",
)
DOPRI5 = ButcherTableau(
    (
        (),
        (Fraction(1, 5),),
        (Fraction(3, 40), Fraction(9, 40)),
        (Fraction(44, 45), Fraction(-56, 15), Fraction(32, 9)),
        (Fraction(19372, 6561), Fraction(-25360, 2187), Fraction(64448, 6561), Fraction(-212, 729)),
        (Fraction(9017, 3168), Fraction(-355, 33), Fraction(46732, 5247), Fraction(49, 176), Fraction(-5103, 18656)),
        (Fraction(35, 384), _0, Fraction(500, 1113), Fraction(125, 192), Fraction(-2187, 6784), Fraction(11, 84)),
    ),
    (Fraction(35, 384), _0, Fraction(500, 1113), Fraction(125, 192), Fraction(-2187, 6784), Fraction(11, 84), _0),
    "Dormand-Prince 5(4)",
)
BACKWARD_EULER = ButcherTableau(((_1,),), (_1,), "backward Euler")
IMPLICIT_MIDPOINT = ButcherTableau(((_2,),), (_1,), "implicit midpoint")
TRAPEZOIDAL = ButcherTableau(((), (_2, _2)), (_2, _2), "trapezoidal")
RADAU_IIA = ButcherTableau(
    ((Fraction(5, 12), Fraction(-1, 12)), (Fraction(3, 4), Fraction(1, 4))),
    (Fraction(3, 4), Fraction(1, 4)),
    "Radau IIA, order 3",
)


def ssprk2(stages: int) -> ButcherTableau:
    """Return the strong-stability-preserving method of order 2, whose radius of circle contractivity is ``stages - 1``.

    Args:
        stages: s >= 2.

    Returns:
        The tableau: all coefficients below the diagonal 1/(s-1), all weights 1/s.

    Raises:
        ValueError: if there are fewer than two stages.

    Examples:
        >>> from stableopt.theory import circle_contractivity_radius
        >>> circle_contractivity_radius(ssprk2(4))
        3.0
    """
    if stages < 2:
        raise ValueError(f"SSPRK(s,2) needs at least 2 stages, got {stages}.")
    return ButcherTableau(
        tuple((Fraction(1, stages - 1),) * i for i in range(stages)),
        (Fraction(1, stages),) * stages,
        f"SSPRK({stages},2)",
    )


def substepped_euler(substeps: int) -> ButcherTableau:
    """Return Euler's method with k equal sub-steps, whose radius is k: per evaluation no explicit method has more.

    Args:
        substeps: k >= 1.

    Returns:
        The tableau of the composed step.

    Raises:
        ValueError: if k < 1.

    Examples:
        >>> from stableopt.theory import circle_contractivity_radius
        >>> circle_contractivity_radius(substepped_euler(3))
        3.0
    """
    if substeps < 1:
        raise ValueError(f"sub-stepping needs at least 1 sub-step, got {substeps}.")
    return ButcherTableau(
        tuple((Fraction(1, substeps),) * i for i in range(substeps)),
        (Fraction(1, substeps),) * substeps,
        f"Euler x {substeps}",
    )


TABLEAUX: tuple[ButcherTableau, ...] = (
    EULER,
    MIDPOINT,
    HEUN,
    RALSTON,
    KUTTA3,
    HEUN3,
    SSPRK33,
    SSPRK43,
    SSPRK104,
    RK4,
    RK4_38,
    DOPRI5,
    BACKWARD_EULER,
    IMPLICIT_MIDPOINT,
    TRAPEZOIDAL,
    RADAU_IIA,
)
"""Every named method."""
