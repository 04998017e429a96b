r"""A contraction followed by an expansive step that it pays for (T3i)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.branches import (
    branch_constant,
    branches_of,
    check_branches,
    part_bound,
    refuse_in_place,
    same_shape,
)
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule, require_norm
from stableopt.nn.precision import wide
from stableopt.nn.residual.steps import floored, initial_fraction, raw_fraction
from stableopt.nn.tokens import token_rule
from stableopt.nn.training_constants import BranchConstant, training_constant
from stableopt.nn.uniform import uniform_bound, uniform_rule

__all__ = ["CompensatedPair"]


class CompensatedPair(nn.Module):
    r"""A contraction, then a residual step with any Lipschitz branch, as long as the contraction allows.

    .. math::
        y = C(x), \qquad x^+ = y + \tau f(y), \qquad
        \tau = \operatorname{sigmoid}(r)\,\frac{1/c - 1}{L}, \qquad c \ge \operatorname{Lip} C,\; L \ge \operatorname{Lip} f .

    The second map alone has the constant :math:`1 + \tau L`, attained by :math:`f = LI`; the pair has at most
    :math:`(1 + \tau L)\,c \le 1`, for every value of the parameters, because the limit of :math:`\tau` is computed from the
    contraction of the same moment. Limits that do not know of each other prove nothing: an orthogonal LeakyReLU(1/2) step of
    0.11 and an expansive one of 1.9, each within its own interval, have the factor 2.58 together.

    Args:
        contractive: :math:`C`, with a constant below 1 that can be relied on during training: a :class:`GradientBlock` with
            ``strong > 0``, a layer that :func:`stabilize` limits below 1, or a chain of them and of nonexpansive layers. It must
            not expand for any value of its parameters: where nothing is left for the branch, the pair is the contraction alone.
        branch: :math:`f`, of which a Lipschitz constant is enough: nested Sequentials of layers that
            :func:`stableopt.nn.training_constant` knows (Linear, convolutions), or that have a constant for all values of
            their parameters.
        norm: in which the pair does not expand: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.
        depth: number of pairs in the stack. The initial step is the fraction :math:`1/\max(2, \text{depth})` of its limit.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.

    Raises:
        TypeError: if a part is no module.
        ValueError: if the contraction has no constant below 1, or may expand, an argument is out of range, or a part has
            ``inplace=True``; in ``forward``, if the branch changes the shape.
        UncertifiableError: if a layer has no constant that can be relied on during training.

    Note:
        A strongly convex gradient block contracts the most at the end of its interval of steps, so a larger ``step`` of the
        contraction leaves more to the branch. If training undoes the contraction, :math:`\tau` becomes 0. Where a weight is limited
        by a method that trains with an estimate, all this holds for the map of evaluation. The denominators :math:`c` and
        :math:`L` have a floor of 1e-6.

    References:
        Celledoni et al., *Dynamical Systems-Based Neural Networks*, 2023 (expansive and contractive steps in turn).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> from stableopt.nn import GradientBlock
        >>> contraction = GradientBlock(4, strong=1.0, step=0.9)
        >>> pair = CompensatedPair(contraction, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), step=0.9)
        >>> 0.5 < lipschitz_rule(pair, "l2").upper <= 1.0
        True
    """

    def __init__(
        self,
        contractive: nn.Module,
        branch: nn.Module,
        *,
        norm: str = "l2",
        depth: int = 1,
        step: float | None = None,
    ) -> None:
        super().__init__()
        check_branches([contractive, branch], "CompensatedPair")
        require_norm(norm)
        self.norm = norm
        self.constants = tuple(BranchConstant(part, norm, "CompensatedPair") for part in (contractive, branch))
        _check_contracts(contractive, self.constants[0])
        if not _never_expands(contractive, norm):
            raise ValueError(
                f"the contraction of a CompensatedPair must not expand for any value of its parameters, which is not known of this "
                f"{type(contractive).__name__}. Use a GradientBlock with strong > 0, or a layer that stabilize limits below 1."
            )
        self.contractive, self.branch = contractive, branch
        self.raw_step = raw_fraction(initial_fraction(step, depth))

    def step_size(self) -> Tensor:
        r"""Return the step :math:`\tau` that ``forward`` uses now, a 0-d tensor, at least float32 and differentiable.

        Examples:
            >>> from stableopt.nn import GradientBlock
        >>> pair = CompensatedPair(GradientBlock(2, strong=1.0, step=0.5), nn.Tanh())
            >>> _ = nn.init.zeros_(pair.contractive.weight)
            >>> round(float(pair.step_size().detach()), 4)  # the contraction is by 1/2, half of (2 - 1) is taken
            0.5
        """
        raw = wide(self.raw_step)
        c, L = (
            constant.now(part) for constant, part in zip(self.constants, (self.contractive, self.branch), strict=True)
        )
        eps = max(torch.finfo(x.dtype).eps for x in (raw, c, L) if isinstance(x, Tensor))
        allowed = (1.0 - 16.0 * eps) / floored(c) - 1.0
        allowed = allowed.clamp_min(0.0) if isinstance(allowed, Tensor) else max(allowed, 0.0)
        return raw[0].sigmoid() * (1.0 - 16.0 * eps) * allowed / floored(L)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the state after both maps."""
        state = self.contractive(input)
        return state + self.step_size() * same_shape(self.branch(state), state, "the branch of a CompensatedPair")

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"norm={self.norm!r}"


def _check_contracts(contractive: nn.Module, constant: BranchConstant) -> None:
    with torch.no_grad():
        c = constant.now(contractive)
    if isinstance(c, Tensor) and c.is_meta:
        return
    if not float(c) < 1.0:
        raise ValueError(
            f"the contraction of a CompensatedPair needs a constant below 1, and {type(contractive).__name__} has {float(c):.6g}: "
            "nothing is left for the branch. Use a GradientBlock with strong > 0, or a layer that stabilize limits below 1."
        )


def _never_expands(contractive: nn.Module, norm: str) -> bool:
    """Return whether a chain has at most the constant 1 for all values of its parameters, by its rules or by limits of weights."""
    if isinstance(contractive, nn.Sequential):
        return all(_never_expands(layer, norm) for layer in contractive._modules.values() if layer is not None)  # noqa: SLF001
    uniform = uniform_bound(contractive, norm)
    if uniform is not None:
        return uniform.proved and uniform.upper <= 1.0
    with torch.no_grad():
        limit = training_constant(contractive, norm)
    return (
        not isinstance(limit, Tensor) and limit <= 1.0
    )  # a number is the limit of a weight, a tensor depends on its values


@lipschitz_rule.register(CompensatedPair)
def _pair(module: CompensatedPair, norm: str) -> Bound:
    refuse_in_place(module)
    c, L = (part_bound(getattr(module, name), name, norm) for name in ("contractive", "branch"))
    with torch.no_grad():
        step = float(module.step_size())
    if not math.isfinite(step):
        raise ValueError(f"no bound holds for a CompensatedPair with NaN or infinite parameters (step {step}).")
    pair = Bound.point(c.upper) * (1.0 + Bound.point(step) * Bound.point(L.upper))
    return Bound(0.0, pair.upper, c.proved and L.proved)


@token_rule.register(CompensatedPair)
def _token(module: CompensatedPair) -> Bound:
    return _pair(module, TOKEN_MAX)


@uniform_rule.register(CompensatedPair)
def _uniform(module: CompensatedPair, norm: str) -> Bound | None:
    return Bound(0.0, 1.0) if norm == module.norm and _is_current(module) else None


def _is_current(module: CompensatedPair) -> bool:
    parts = (module.contractive, module.branch)
    pairs = zip(parts, module.constants, strict=True)
    current = all(constant.still_holds(part, "CompensatedPair") for part, constant in pairs)
    return current and _never_expands(module.contractive, module.norm)


@branches_of.register(CompensatedPair)
def _branches(module: CompensatedPair) -> dict[str, nn.Module]:
    """Return the branch alone: a limit of 1 for the contraction would leave it nothing."""
    return {"branch": module.branch}


@branch_constant.register(CompensatedPair)
def _constant(module: CompensatedPair, parts: list[Bound], norm: str) -> Bound:  # noqa: ARG001 the step makes up for it
    refuse_in_place(module)
    if norm != module.norm or not _is_current(module):
        raise UncertifiableError(
            f"a CompensatedPair does not expand in the norm that it was built with, {module.norm!r}, with the layers that it was "
            f"built with; a limit in {norm!r} was asked for. Build it anew, with norm={norm!r}."
        )
    return Bound(0.0, 1.0)
