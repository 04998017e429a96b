"""What the implicit blocks share: parameters, the call of the solver, the distance to the exact solution, the rules."""

from __future__ import annotations

import math
from abc import ABC

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound, inf_norm, one_norm, spectral_norm, upper
from stableopt.nn.arguments import check_nonnegative, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX
from stableopt.nn.implicit.derivative import solve_implicitly
from stableopt.nn.implicit.equation import Equation
from stableopt.nn.implicit.proof import residual_upper
from stableopt.nn.implicit.solvers import ForwardBackward, Solver, ToTolerance
from stableopt.nn.positive import positive, raw_positive
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes
from stableopt.theory import implicit_factor

__all__ = ["ImplicitBlock", "bound", "uniform"]


class ImplicitBlock(nn.Module, ABC):
    r"""Base of the blocks that solve :math:`(1 + hm)\,y - hKy + hA^\top\sigma(Ay + b) = x` for their output.

    Args:
        dim: number of features of input and output.
        hidden: rows of :math:`A`.
        depth: number of blocks in the stack.
        activation: name of :math:`\sigma`.
        strong: :math:`m`.
        step: initial :math:`h`.
        solver: method for the equation.
        skew: whether there is a :math:`K`.

    Raises:
        TypeError: if ``solver`` is none.
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Examples:
        >>> from stableopt.nn import ProximalBlock
        >>> issubclass(ProximalBlock, ImplicitBlock)
        True
    """

    skew: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden: int | None,
        *,
        depth: int,
        activation: str,
        strong: float,
        step: float | None,
        solver: Solver | None,
        skew: bool,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden, depth=depth)
        check_nonnegative(strong=strong)
        check_unit_slopes(activation, type(self).__name__)
        step = 2.0 / max(2, depth) if step is None else step
        solver = ForwardBackward() if solver is None else solver
        if not isinstance(solver, Solver):
            raise TypeError(f"solver must be a Solver such as ForwardBackward(10), got {type(solver).__name__}.")
        self.activation = activation
        self.strong = float(strong)
        self.solver = solver
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.skew = nn.Parameter(torch.empty(dim, dim)) if skew else None
        self.raw_step = raw_positive(step)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Draw a new :math:`A` with orthonormal rows or columns and a new :math:`K` of norm about 1; the step stays."""
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)
        if self.skew is not None:
            nn.init.normal_(self.skew, std=0.35 / math.sqrt(len(self.skew)))

    def step_size(self) -> Tensor:
        """Return the step :math:`h` that ``forward`` uses now, a 0-d tensor, at least float32."""
        return positive(self.raw_step)[0]

    def equation(self) -> Equation:
        """Return the equation with the current numbers."""
        K = None if self.skew is None else self.skew - self.skew.mT
        return Equation(self.weight, self.bias, K, self.step_size(), self.strong, UNIT_SLOPES[self.activation])

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the solution as the solver finds it; the features are the last dimension of the input."""
        if not isinstance(self.solver, ToTolerance):
            return self.solver.solve(self.equation(), input)
        x = wide(input)
        with full_precision(x):
            K = None if self.skew is None else (self.skew - self.skew.mT).to(x.dtype)
            y = solve_implicitly(
                x,
                self.weight.to(x.dtype),
                self.bias.to(x.dtype),
                K,
                self.step_size().to(x.dtype),
                strong=self.strong,
                activation=self.activation,
                solver=self.solver,
            )
        return y.to(input.dtype)

    def solution_error(self, input: Tensor) -> Bound:  # noqa: A002 the name torch uses
        r"""Bound the distance of the output from the exact solution, over all vectors of an input.

        With the residual :math:`r = (1 + hm)\,y - hKy + hA^\top\sigma(Ay + b) - x` of the numbers that ``forward`` returns, the
        exact solution :math:`y^\star` obeys :math:`\|y - y^\star\| \le \|r\|/(1 + hm)`. The residual is evaluated in float64 and
        every rounding of that is counted, so the bound holds for the output as it is stored, whatever the solver and the dtype.

        Two inputs with the errors :math:`\varepsilon, \varepsilon'` hence have outputs that differ by at most
        :math:`\|x - x'\|/(1 + hm) + \varepsilon + \varepsilon'`.

        Args:
            input: of shape ``(..., dim)``.

        Returns:
            A proved bound from 0 to the largest error.

        Raises:
            ValueError: if a parameter, the input or the output holds NaN or infinity.

        Note:
            It assumes that tanh and softplus of the machine are accurate to 8 units in the last place.
        """
        with torch.no_grad():
            output = self(input)
            equation = self.equation()
        residual = residual_upper(equation, self.activation, input, output)
        return Bound(0.0, (residual * implicit_factor(Bound.point(float(equation.step)), self.strong)).upper)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        return f"{dim}, {hidden}, activation={self.activation!r}, strong={self.strong}, solver={self.solver}"


def bound(module: ImplicitBlock, norm: str) -> Bound:
    r"""Bound an implicit block.

    In l2 the map of :class:`ForwardBackward` by the numbers of its splitting, the exact solution of other solvers, unproved for the
    numbers that they compute. In linf and l1 by :math:`\sqrt n` times that.

    Args:
        module: the block.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Raises:
        ValueError: if a parameter is NaN or infinite.

    Examples:
        >>> from stableopt.nn import ProximalBlock
        >>> bound(ProximalBlock(2), "l2")
        Bound(lower=0.0, upper=1.0, proved=True)
    """
    h = float(module.step_size().detach())
    if not all(bool(p.isfinite().all()) for p in module.parameters()):
        raise ValueError(f"no bound holds for a {type(module).__name__} with NaN or infinite parameters (step {h}).")
    exact = implicit_factor(Bound.point(h), module.strong)
    if not module.solver.certified:
        euclidean = Bound(0.0, upper(exact), proved=False)
        return euclidean if norm == "l2" else Bound(0.0, (euclidean * _spread(module)).upper, proved=False)
    euclidean = Bound(0.0, _iterated(module))
    if norm == "l2":
        return euclidean
    return Bound(0.0, min((euclidean * _spread(module)).upper, _summed(module)))


def uniform(module: ImplicitBlock, norm: str) -> Bound:
    r"""Bound an implicit block for all values of its parameters: 1 in l2, :math:`\sqrt n` in linf and l1.

    Args:
        module: the block.
        norm: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.

    Examples:
        >>> from stableopt.nn import ProximalBlock
        >>> uniform(ProximalBlock(4), "linf").upper
        2.0
    """
    one = Bound.point(1.0) if norm in {"l2", TOKEN_MAX} else _spread(module)
    return Bound(0.0, one.upper, module.solver.certified)


def _spread(module: ImplicitBlock) -> Bound:
    return Bound.point(float(module.weight.shape[1])).sqrt()


def _iterated(module: ImplicitBlock) -> float:
    r"""Bound every iterate in l2 by :math:`c_{k+1} \le \rho(\kappa c_k + \mu)`, from the numbers of the splitting."""
    with torch.no_grad():
        keep, move, mix, start, rotation = module.equation().splitting()
    kappa, nu, mu = (Bound.point(float(number)) for number in (keep, move, mix))
    square = Bound.point(spectral_norm(module.weight).upper) ** 2
    kept = kappa.join(abs(kappa - nu * square))
    rho = Bound.point(1.0) if rotation is None else 0.5 * (1.0 + Bound.point(spectral_norm(rotation).upper))
    c = Bound.point(float(start))
    if (rho * kept).upper >= 1.0:
        return math.inf
    return max(c.upper, (rho * mu / (1.0 - rho * kept)).upper)  # every c_k lies between its start and its limit


def _summed(module: ImplicitBlock) -> float:
    r"""Bound the last iterate in linf or l1, with :math:`\|A^\top DA\| \le \|A\|_1\|A\|_\infty`: good for few small steps."""
    if not isinstance(module.solver, ForwardBackward):
        return math.inf
    with torch.no_grad():
        keep, move, mix, start, rotation = module.equation().splitting()
    kept = Bound.point(float(keep)) + float(move) * one_norm(module.weight) * inf_norm(module.weight)
    rho = Bound.point(1.0) if rotation is None else 0.5 * (1.0 + inf_norm(rotation).join(one_norm(rotation)))
    c = Bound.point(float(start))
    for _ in range(module.solver.iterations):
        c = rho * (kept * c + float(mix))
    return c.upper
