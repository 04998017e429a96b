r"""Solvers of the equation of an implicit block: one whose every iterate is certified, and two that are fast and measured."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.nn.arguments import check_sizes
from stableopt.nn.implicit.equation import Equation

__all__ = ["Anderson", "ConjugateGradient", "Fista", "ForwardBackward", "Solver", "ToTolerance"]


@dataclass(frozen=True)
class Solver(ABC):
    """A method for :class:`stableopt.nn.implicit.Equation`.

    Attributes:
        certified: whether the map from the input to what the method returns has the proved constant of the exact solution. Such a
            method is differentiated as it is computed, the others by the implicit function theorem.

    Examples:
        >>> ForwardBackward().certified, Fista().certified
        (True, False)
    """

    certified: ClassVar[bool] = False

    @abstractmethod
    def solve(self, equation: Equation, x: Tensor) -> Tensor:
        """Return an approximate solution.

        Args:
            equation: the equation.
            x: its right-hand side, of shape ``(..., dim)``.
        """


@dataclass(frozen=True)
class ForwardBackward(Solver):
    r"""A fixed number of forward-backward steps, each of which keeps the proved constant of the block.

    The map that is computed is certified, however far it is from the exact solution: see
    :class:`stableopt.nn.implicit.Equation` for the proof. The distance to the solution shrinks per step by
    :math:`hU^2/(2(1 + hm) + hU^2)`, :math:`U \ge \|A\|_2`, to first order; there is nothing to read from the device, so it
    compiles, exports and maps (``vmap``) as it is, and it is differentiated through its steps.

    Args:
        iterations: number of steps, at least 1. One gives a gradient block.

    Raises:
        ValueError: if it is no positive integer.

    Examples:
        >>> ForwardBackward(4)
        ForwardBackward(iterations=4)
    """

    iterations: int = 10
    certified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the number of steps."""
        check_sizes(iterations=self.iterations)

    def solve(self, equation: Equation, x: Tensor) -> Tensor:
        """Return the last iterate."""
        splitting = equation.splitting()
        y = splitting.start * x
        for _ in range(self.iterations):
            y = splitting.advance(equation, x, y)
        return y


@dataclass(frozen=True)
class ToTolerance(Solver):
    r"""What the solvers with a stopping rule share.

    They stop when every vector :math:`y` has

    .. math:: \|F(y)\| \le \text{tolerance} \cdot \bigl(\|x\| + (1 + h(m + U^2 + \|K\|_F))\,\|y\|\bigr)

    with the residual :math:`F`.

    Args:
        tolerance: relative to the sizes of the terms of the equation; None for 256 times the precision of the dtype.
        max_iterations: where they stop anyway, with a warning.
        check_every: after how many steps the residual is looked at. Each look waits for the device once.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        While compiling, exporting or under ``torch.func`` transforms nothing can be read: all ``max_iterations`` steps run. Choose
        a small number there, or :class:`ForwardBackward`.

    Examples:
        >>> Fista(tolerance=1e-6).max_iterations
        1000
    """

    tolerance: float | None = None
    max_iterations: int = 1000
    check_every: int = 10

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_sizes(max_iterations=self.max_iterations, check_every=self.check_every)
        if self.tolerance is not None and not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"tolerance must be None or lie in (0, 1), got {self.tolerance!r}.")

    def _iterate(self, equation: Equation, x: Tensor, advance: Callable[[], Tensor], y: Tensor) -> Tensor:
        """Call ``advance`` for the next iterate until the tolerance is met."""
        readable = _readable(x)
        tolerance = 256 * torch.finfo(x.dtype).eps if self.tolerance is None else self.tolerance
        largest = equation.size()
        for k in range(1, self.max_iterations + 1):
            y = advance()
            if readable and (k % self.check_every == 0 or k == self.max_iterations):
                limit = tolerance * (_size(x) + largest * _size(y))
                worst = (_size(equation.residual(x, y)) - limit).amax() if x.numel() else x.new_zeros(())
                if bool(worst <= 0):
                    return y
        if readable:
            warnings.warn(
                f"{type(self).__name__} did not reach the relative residual {tolerance:.1e} in {self.max_iterations} steps; "
                "solution_error(x) of the block bounds how far its output is from the solution. Allow more steps, raise the "
                "tolerance, or lower the step of the block.",
                RuntimeWarning,
                stacklevel=2,
            )
        return y


@dataclass(frozen=True)
class Fista(ToTolerance):
    r"""Accelerated gradient steps with constant momentum, for an equation without a skew part.

    .. math:: v = y_k + \beta(y_k - y_{k-1}), \quad y_{k+1} = v - \tfrac1\Lambda F(v), \qquad
              \Lambda = 1 + h(m + U^2), \quad \beta = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}, \quad
              \kappa = \frac{\Lambda}{1 + hm} .

    The energy shrinks per step by :math:`1 - 1/\sqrt\kappa`. The iterates are *not* nonexpansive in :math:`x`: what is certified is
    the solution, and the block says how far its output is from it.

    Args:
        tolerance: see :class:`ToTolerance`.
        max_iterations: see :class:`ToTolerance`.
        check_every: see :class:`ToTolerance`.

    Raises:
        ValueError: as :class:`ToTolerance`, and in ``solve`` if the equation has a skew part, which is the gradient of nothing.

    References:
        Beck and Teboulle, 2009; Nesterov, *Introductory Lectures on Convex Optimization*, 2004, section 2.2 (constant momentum).

    Examples:
        >>> equation = Equation(torch.eye(2).double(), None, None, torch.tensor(3.0).double(), 0.0, torch.relu)
        >>> Fista().solve(equation, torch.tensor([4.0, -3.0]).double())
        tensor([ 1.0000, -3.0000], dtype=torch.float64)
    """

    def solve(self, equation: Equation, x: Tensor) -> Tensor:
        """Return the first iterate that meets the tolerance."""
        if equation.skew is not None:
            raise ValueError("Fista minimises, and an equation with a skew part is no gradient: use Anderson.")
        smallest, largest = 1.0 + equation.step * equation.strong, equation.size()
        root = (largest / smallest).sqrt()
        beta, rate = (root - 1.0) / (root + 1.0), 1.0 / largest
        y = before = x / smallest

        def advance() -> Tensor:
            nonlocal y, before
            v = y + beta * (y - before)
            before, y = y, v - rate * equation.residual(x, v)
            return y

        return self._iterate(equation, x, advance, y)


@dataclass(frozen=True)
class Anderson(ToTolerance):
    r"""Forward-backward steps, extrapolated from the last few by least squares, and taken back where that does not help.

    A vector whose extrapolation does not lower the fixed-point residual as much as a plain step is sure to, returns to the plain
    step from the iterate before and forgets its past. So in every two evaluations the residual shrinks at least by the factor of
    one plain step: unlike the usual Anderson acceleration it converges from everywhere.

    Args:
        tolerance: see :class:`ToTolerance`.
        max_iterations: see :class:`ToTolerance`; here the evaluations of the splitting step.
        check_every: see :class:`ToTolerance`.
        memory: number of past differences, at least 1.

    Raises:
        ValueError: as :class:`ToTolerance`, or if the memory is no positive integer.

    References:
        Walker and Ni, *Anderson Acceleration for Fixed-Point Iterations*, 2011.

    Examples:
        >>> K = torch.tensor([[0.0, 2.0], [-2.0, 0.0]]).double()
        >>> equation = Equation(torch.eye(2).double(), None, K, torch.tensor(1.0).double(), 0.0, torch.relu)
        >>> y = Anderson().solve(equation, torch.tensor([0.0, 8.0]).double())  # 2 y1 = 2 y2, 2 y2 + 2 y1 = 8
        >>> y.round(decimals=6).tolist()
        [2.0, 2.0]
    """

    memory: int = 8

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        check_sizes(memory=self.memory)

    def solve(self, equation: Equation, x: Tensor) -> Tensor:
        """Return the first iterate that meets the tolerance."""
        splitting = equation.splitting(inward=False)
        y, f = splitting.start * x, torch.zeros_like(x)  # the last accepted iterate and its fixed-point residual
        trial = y
        accepted = x.new_full((*x.shape[:-1], 1), math.inf)
        plain = torch.zeros_like(accepted, dtype=torch.bool)
        moves, changes = (x.new_zeros(*x.shape[:-1], self.memory, x.shape[-1]) for _ in range(2))

        def advance() -> Tensor:
            nonlocal y, f, trial, accepted, plain, moves, changes
            g = splitting.advance(equation, x, trial) - trial
            size = _size(g)
            good = plain | (size <= splitting.keep * accepted)
            known = good & accepted.isfinite()
            kept = good.unsqueeze(-1).to(x.dtype)
            moves = torch.cat([moves[..., 1:, :], torch.where(known, trial - y, 0.0).unsqueeze(-2)], -2)
            changes = kept * torch.cat([changes[..., 1:, :], torch.where(known, g - f, 0.0).unsqueeze(-2)], -2)
            y, f = torch.where(good, trial, y), torch.where(good, g, f)
            accepted, plain = (
                torch.where(good, size, accepted),
                ~good,
            )  # without a past, the next trial is the plain step
            trial = y + f - _extrapolation(moves, changes, f)
            return y

        return self._iterate(equation, x, advance, y)


@dataclass(frozen=True)
class ConjugateGradient(ToTolerance):
    r"""Conjugate gradients for a linear equation without a skew part, whose matrix is symmetric and positive definite.

    Args:
        tolerance: see :class:`ToTolerance`.
        max_iterations: see :class:`ToTolerance`.
        check_every: see :class:`ToTolerance`.

    Examples:
        >>> slopes = torch.tensor([1.0, 0.0]).double()
        >>> equation = Equation(torch.eye(2).double(), None, None, torch.tensor(3.0).double(), 0.0, slopes.mul)
        >>> ConjugateGradient().solve(equation, torch.ones(2).double())
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """

    def solve(self, equation: Equation, x: Tensor) -> Tensor:
        """Return the first iterate that meets the tolerance."""
        tiny = torch.finfo(x.dtype).tiny
        y = torch.zeros_like(x)
        r = p = x
        square = _dot(r, r)

        def advance() -> Tensor:
            nonlocal y, r, p, square
            image = equation.residual(torch.zeros_like(p), p)
            rate = square / _dot(p, image).clamp_min(tiny)
            y, r = y + rate * p, r - rate * image
            before, square = square, _dot(r, r)
            p = r + square / before.clamp_min(tiny) * p
            return y

        return self._iterate(equation, x, advance, y)


def _extrapolation(moves: Tensor, changes: Tensor, f: Tensor) -> Tensor:
    r"""Return :math:`(\Delta Y + \Delta F)^\top\gamma`, where :math:`\gamma` minimises :math:`\|f - \Delta F^\top\gamma\|`."""
    gram = changes @ changes.mT
    ridge = 10.0 * torch.finfo(f.dtype).eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(f.dtype).tiny
    eye = torch.eye(gram.shape[-1], dtype=f.dtype, device=f.device)
    gamma = torch.linalg.solve(gram + ridge[..., None, None] * eye, changes @ f.unsqueeze(-1))
    return ((moves + changes).mT @ gamma).squeeze(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _readable(x: Tensor) -> bool:
    """Return whether a number can be read now: not while compiling, nor under a transform, nor on the meta device."""
    return not (
        x.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # noqa: SLF001 no public question
    )
