r"""A rotation with damping: the linear skew block that contracts at every step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, inf_norm, one_norm, spectral_norm
from stableopt.nn.arguments import check_nonnegative, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.positive import positive, raw_positive
from stableopt.nn.precision import wide
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.weights import Geometry
from stableopt.nn.weights.orthogonal import Cayley, Exponential, Isometry

__all__ = ["SkewBlock", "check_finite", "draw_skew"]

_ROTATIONS: dict[str, tuple[Isometry, float]] = {
    "cayley": (Cayley(Geometry("linear")), -0.5),  # (I + A)^-1 (I - A) of A = -hK/2
    "expm": (Exponential(Geometry("linear")), 1.0),
}
"""The maps from V to a rotation by V - V^T, and the factor that gives the flow of K to first order."""


class SkewBlock(nn.Module):
    r"""Rotation by a skew matrix with damping: linear, and a contraction for every step.

    .. math::
        x \mapsto e^{-\gamma h}\,Qx + b, \qquad Q = \bigl(I - \tfrac h2 K\bigr)^{-1}\bigl(I + \tfrac h2 K\bigr)
        \quad\text{or}\quad Q = e^{hK}, \qquad K = V - V^\top, \quad h = \operatorname{softplus}(r) .

    :math:`Q` is orthogonal, so every singular value of the block is :math:`e^{-\gamma h}`: it loses nothing but what the damping
    takes. It is the implicit midpoint step, or the exact flow, of :math:`\dot x = Kx`; the explicit step
    :math:`x + h(K - \gamma I)x` has a limit (:class:`SkewEulerBlock`), and none at all for :math:`\gamma = 0`.

    Args:
        dim: number of features of input and output.
        damping: :math:`\gamma \ge 0`.
        depth: number of blocks in the stack. The initial step is :math:`1/\text{depth}`, so the damping of the stack is
            :math:`e^{-\gamma}` at the start.
        step: initial step :math:`h`, in [1e-6, 1e6]; None for the one that fits the depth. The learned one stays in that range.
        method: ``"cayley"`` (one linear solve; reaches no rotation by half a turn) or ``"expm"``.
        bias: whether there is a :math:`b`.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        What is stored of an orthogonal matrix is orthogonal up to rounding. It is shrunk by a few units in the last place until
        its norm is at most 1, so :func:`stableopt.nn.lipschitz` encloses the norm of the stored matrix, and is at most 1 for all
        values of the parameters.

        **The trap:** with a nonlinearity inside, :math:`\sigma(Kx + b) - \gamma x`, nothing of this is true, whatever the
        eigenvalues of :math:`K - \gamma I` are: the slopes make it :math:`DK`, which is not skew, and two patterns of slopes
        that alternate can multiply. Put the nonlinearity into a :class:`stableopt.nn.GradientBlock` beside this one, or use a
        :class:`stableopt.nn.ResolventBlock`.

    References:
        Helfrich, Willmott and Ye, *Orthogonal Recurrent Neural Networks with Scaled Cayley Transform*, 2018; Haber and Ruthotto,
        *Stable Architectures for Deep Neural Networks*, 2017 (the explicit step).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> block = SkewBlock(4, damping=0.5, step=2.0, bias=False)
        >>> x = torch.randn(4)
        >>> torch.testing.assert_close(block(x).norm(), math.exp(-1.0) * x.norm())
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        damping: float = 0.0,
        *,
        depth: int = 1,
        step: float | None = None,
        method: str = "cayley",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, depth=depth)
        check_nonnegative(damping=damping)
        if method not in _ROTATIONS:
            raise ValueError(f"method must be one of {', '.join(_ROTATIONS)}, got {method!r}.")
        self.damping = float(damping)
        self.method = method
        self.skew = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.raw_step = raw_positive(1.0 / depth if step is None else step)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new skew matrix of norm about 1 and set the bias to zero; the step stays."""
        draw_skew(self.skew)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def step_size(self) -> Tensor:
        """Return the step :math:`h` that ``forward`` uses now, a 0-d tensor, at least float32."""
        return positive(self.raw_step)[0]

    def decay(self) -> Tensor:
        r"""Return :math:`e^{-\gamma h}`, a 0-d tensor, at least float32 and at most 1."""
        return (-self.damping * self.step_size()).exp()

    def rotation(self) -> Tensor:
        r"""Return :math:`Q` as ``forward`` uses it, in the dtype of the parameters; its proved norm is at most 1.

        Examples:
            >>> spectral_norm(SkewBlock(3).rotation()).upper <= 1.0
            True
        """
        rotation, factor = _ROTATIONS[self.method]
        largest = torch.finfo(
            self.skew.dtype
        ).max  # a product that half precision cannot hold is a rotation by half a turn
        return rotation((factor * self.step_size() * wide(self.skew)).clamp(-largest, largest).to(self.skew.dtype))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input."""
        output = self.decay() * F.linear(input, self.rotation())
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{len(self.skew)}, damping={self.damping}, method={self.method!r}, bias={self.bias is not None}"


def draw_skew(V: Tensor) -> None:
    r"""Fill :math:`V` so that :math:`V - V^\top` has a norm of about 1.

    Examples:
        >>> V = torch.empty(50, 50)
        >>> draw_skew(V)
        >>> bool(0.5 < torch.linalg.matrix_norm(V - V.mT, 2) < 1.5)
        True
    """
    nn.init.normal_(
        V, std=0.35 / math.sqrt(len(V))
    )  # the norm of a skew matrix of such differences tends to 2 * 0.35 * sqrt(2)


def check_finite(module: nn.Module) -> None:
    """Refuse a block whose parameters hold NaN or infinity.

    Raises:
        ValueError: if one does.

    Examples:
        >>> check_finite(SkewBlock(2))
    """
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"no bound holds for a {type(module).__name__} whose {name} holds NaN or infinite entries."
            )


@lipschitz_rule.register(SkewBlock)
def _skew_block(module: SkewBlock, norm: str) -> Bound:
    """Return the decay times the norm of the stored rotation: the block is linear, so this is its constant."""
    check_finite(module)
    with torch.no_grad():
        Q, decay = module.rotation(), float(module.decay())
    return decay * {"l2": spectral_norm, "linf": inf_norm, "l1": one_norm}[norm](Q)


@uniform_rule.register(SkewBlock)
def _uniform(module: SkewBlock, norm: str) -> Bound:
    rows = Bound.point(1.0 if norm in {"l2", TOKEN_MAX} else float(len(module.skew)))
    return Bound(0.0, rows.sqrt().upper)  # a row of a matrix of norm 1 has the norm 1 in l2, so at most sqrt(n) in l1


@token_rule.register(SkewBlock)
def _token(module: SkewBlock) -> Bound:
    return _skew_block(module, "l2")
