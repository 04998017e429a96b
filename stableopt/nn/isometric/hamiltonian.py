r"""Symplectic shears whose growth stays within a budget."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, inf_norm, one_norm, spectral_norm
from stableopt.nn.arguments import check_nonnegative, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.isometric.shears import pair_limit, pair_norm
from stableopt.nn.isometric.skew import check_finite
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import raw_fraction, rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes

__all__ = ["HamiltonianBlock"]

_SMALLEST = 1e-6
"""Floor of the squares of the norms of the weights, so that a zero weight has a finite step."""


class HamiltonianBlock(nn.Module):
    r"""Two symplectic shears of a Hamiltonian system: volume is kept, and distances grow within a budget.

    The features are split into halves :math:`(q, p)`;

    .. math::
        p \leftarrow p - h_1 A^\top\sigma(Aq + b), \qquad q \leftarrow q + h_2 B^\top\sigma(Bp + c), \qquad
        \text{then both times } e^{-\gamma} .

    It is *not* a contraction, and cannot be one without damping: the determinant of its Jacobian is 1. **The budget.** The Jacobian
    is the product of two opposite shears with the symmetric parts :math:`h_1A^\top D_1A \preceq u_1I` and :math:`h_2B^\top D_2B
    \preceq u_2I`, :math:`u_1 = h_1\|A\|_2^2`, :math:`u_2 = h_2\|B\|_2^2`. The largest norm of such a product is known exactly
    (:mod:`stableopt.nn.isometric.shears`), and the steps

    .. math::
        h_1 = \operatorname{sigmoid}(r_1)\,\frac{\bar u}{\|A\|_2^2}, \quad
        h_2 = \operatorname{sigmoid}(r_2)\,\frac{\bar u}{\|B\|_2^2}, \qquad
        \bar u = 2\tanh(\log L) \ \text{or, for } L > 1 + \sqrt2,\ \sqrt{L - 1/L}

    keep it within :math:`L = G^{1/\text{depth}}`. So the constant of the block is at most :math:`Le^{-\gamma}`, and no distance
    shrinks by more than :math:`e^{-\gamma}/L`: without damping, gradients of a stack neither grow nor shrink by more than
    :math:`G`.

    Args:
        dim: number of features of input and output, even.
        hidden: rows of :math:`A` and of :math:`B`; None for ``dim``.
        growth: :math:`G > 1`, the budget of the whole stack.
        depth: number of blocks in the stack.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``.
        damping: :math:`\gamma \ge 0` of this block. With :math:`\gamma = \log(G)/\text{depth}` the block is nonexpansive, at the
            price of damping all directions.
        step: initial steps as a fraction of their limit, in (0, 1).

    Raises:
        ValueError: if an argument is out of range, the activation has slopes outside [0, 1], or, in ``inverse``, the input has
            another number of features.

    Note:
        The norms come from Gram iteration and the steps are shrunk against rounding; what is proved of the stored numbers is said
        by :func:`stableopt.nn.lipschitz`.

    References:
        Galimberti, Furieri, Xu and Ferrari-Trecate, *Hamiltonian Deep Neural Networks Guaranteeing Nonvanishing Gradients by
        Design*, 2023 (which bounds gradients from below only).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = HamiltonianBlock(4, growth=2.0)
        >>> x = torch.randn(5, 4)
        >>> torch.testing.assert_close(block.inverse(block(x)), x)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        growth: float = 2.0,
        depth: int = 1,
        activation: str = "tanh",
        damping: float = 0.0,
        step: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden, depth=depth)
        check_nonnegative(damping=damping)
        check_unit_slopes(activation, "HamiltonianBlock")
        if dim % 2:
            raise ValueError(f"dim must be even, since the features are halves q and p, got {dim}.")
        if not (math.isfinite(growth) and growth > 1.0):
            raise ValueError(
                f"growth must be finite and > 1, got {growth!r}: volume is kept, so what does not grow does not move. For no "
                "growth use SkewBlock."
            )
        if not 0.0 < step < 1.0:
            raise ValueError(f"step is a fraction of the limit and must lie in (0, 1), got {step!r}.")
        self.activation = activation
        self.growth, self.depth, self.damping = float(growth), depth, float(damping)
        self.limit, self.decay = _root_below(self.growth, depth), math.exp(-self.damping)
        self._largest = pair_limit(self.limit)
        self.weight_q = nn.Parameter(torch.empty(hidden, dim // 2))
        self.weight_p = nn.Parameter(torch.empty(hidden, dim // 2))
        self.bias_q = nn.Parameter(torch.zeros(hidden))
        self.bias_p = nn.Parameter(torch.zeros(hidden))
        self.raw_step = raw_fraction(step, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights with orthonormal rows or columns and set the biases to zero; the shares stay."""
        for weight, bias in ((self.weight_q, self.bias_q), (self.weight_p, self.bias_p)):
            nn.init.orthogonal_(weight)
            nn.init.zeros_(bias)

    def step_sizes(self) -> tuple[Tensor, Tensor]:
        r"""Return the steps :math:`h_1, h_2` that ``forward`` uses now, 0-d tensors, at least float32.

        Examples:
            >>> block = HamiltonianBlock(4, growth=3.0**0.5, step=0.5)  # the limit is 1 for matrices of norm 1
            >>> [round(h.item(), 1) for h in block.step_sizes()]
            [0.5, 0.5]
        """
        share = wide(self.raw_step).sigmoid()
        return self._step(self.weight_q, share[0]), self._step(self.weight_p, share[1])

    def _step(self, weight: Tensor, share: Tensor) -> Tensor:
        weight = wide(weight)
        with full_precision(weight):
            U = gram_norm(weight)
        return (1.0 - rounding_slack(weight)) * self._largest * share / (U * U).clamp_min(_SMALLEST)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input, :math:`q` before :math:`p`."""
        q, p = input.chunk(2, -1)
        h1, h2 = self.step_sizes()
        p = p - h1 * self._force(q, self.weight_q, self.bias_q)
        q = q + h2 * self._force(p, self.weight_p, self.bias_p)
        state = torch.cat([q, p], -1)
        return self.decay * state if self.damping else state

    def inverse(self, output: Tensor) -> Tensor:
        """Return the input that is mapped to an output.

        Args:
            output: of shape ``(..., dim)``.

        Raises:
            ValueError: if it has another number of features.
        """
        if output.shape[-1] != 2 * self.weight_q.shape[1]:
            raise ValueError(
                f"inverse needs {2 * self.weight_q.shape[1]} features in the last dimension, got shape {tuple(output.shape)}."
            )
        q, p = (output / self.decay if self.damping else output).chunk(2, -1)
        h1, h2 = self.step_sizes()
        q = q - h2 * self._force(p, self.weight_p, self.bias_p)
        p = p + h1 * self._force(q, self.weight_q, self.bias_q)
        return torch.cat([q, p], -1)

    def _force(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(UNIT_SLOPES[self.activation](F.linear(x, weight, bias)), weight.mT)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, half = self.weight_q.shape
        return (
            f"{2 * half}, {hidden}, growth={self.growth}, depth={self.depth}, activation={self.activation!r}, "
            f"damping={self.damping}"
        )


def _root_below(growth: float, depth: int) -> float:
    r"""Return a number whose power ``depth`` is at most the growth: nearly :math:`G^{1/\text{depth}}`.

    Raises:
        ValueError: if there is none above 1.
    """
    root = growth ** (1.0 / depth)
    while Fraction(root) ** depth > Fraction(growth):
        root = math.nextafter(root, 0.0)
    if root <= 1.0 + 1e-12:
        raise ValueError(f"growth={growth!r} over a depth of {depth} leaves nothing for a block; raise the growth.")
    return root


@lipschitz_rule.register(HamiltonianBlock)
def _hamiltonian_block(module: HamiltonianBlock, norm: str) -> Bound:
    """Bound it by the largest norm of two opposite shears in l2; in linf and l1 also by the sums of rows and columns."""
    check_finite(module)
    steps = [float(h.detach()) for h in module.step_sizes()]
    if not all(map(math.isfinite, steps)):
        raise ValueError(f"no bound holds for a HamiltonianBlock with the steps {steps}; its weights are too large.")
    summed, sizes = Bound.point(module.decay), []
    for h, weight in zip(steps, (module.weight_q, module.weight_p), strict=True):
        sizes.append((h * Bound.point(spectral_norm(weight).upper) ** 2).upper)
        summed = summed * (1.0 + h * one_norm(weight) * inf_norm(weight))
    euclidean = module.decay * pair_norm(*sizes)
    if norm == "l2":
        return Bound(0.0, euclidean.upper)
    spread = Bound.point(2.0 * module.weight_q.shape[1]).sqrt()
    return Bound(0.0, min((euclidean * spread).upper, summed.upper))


@uniform_rule.register(HamiltonianBlock)
def _uniform(module: HamiltonianBlock, norm: str) -> Bound:
    size = Bound.point(1.0 if norm in {"l2", TOKEN_MAX} else 2.0 * module.weight_q.shape[1]).sqrt()
    return Bound(0.0, (Bound.point(module.limit) * module.decay * size).upper)


@token_rule.register(HamiltonianBlock)
def _token(module: HamiltonianBlock) -> Bound:
    return _hamiltonian_block(module, "l2")
