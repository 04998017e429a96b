r"""A step limit for the residual branch of a user: what is declared of it, and what is proved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, Real, lower, upper
from stableopt.nn.branches import (
    branch_constant,
    branches_of,
    check_branches,
    refuse_in_place,
    same_shape,
)
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule, require_norm
from stableopt.nn.precision import wide
from stableopt.nn.residual.fields import Field
from stableopt.nn.residual.runge_kutta import RungeKuttaBlock
from stableopt.nn.residual.steps import SMALLEST, floored, initial_fraction, raw_fraction
from stableopt.nn.rules import lipschitz as proved_constant
from stableopt.nn.tokens import token_rule
from stableopt.nn.training_constants import BranchConstant
from stableopt.nn.uniform import uniform_rule
from stableopt.theory import (
    dissipative_factor,
    dissipative_max_step,
    lipschitz_factor,
    strongly_convex_factor,
    strongly_convex_max_step,
)

__all__ = ["CFLBlock", "cfl"]

Kind: TypeAlias = Literal["gradient", "dissipative", "averaged", "lipschitz"]
Number: TypeAlias = Real | Callable[[nn.Module], Tensor | float]
"""A number of a branch: fixed, or computed from the branch at every forward map."""

_FIRST = {"gradient": "strong", "dissipative": "dissipation", "lipschitz": "growth"}
"""What is needed of a branch of each kind beside its constant L."""
_SECOND = {"gradient": "smoothness", "dissipative": "lipschitz", "averaged": "lipschitz", "lipschitz": "lipschitz"}
"""What L is called."""


def cfl(
    branch: nn.Module,
    kind: Kind | None = None,
    *,
    smoothness: Number | None = None,
    strong: Number | None = None,
    dissipation: Number | None = None,
    lipschitz: Number | None = None,
    growth: float | None = None,
    norm: str = "l2",
    depth: int = 1,
    step: float | None = None,
) -> CFLBlock | RungeKuttaBlock:
    r"""Make a residual block :math:`h + \tau f(h)` of a branch, with a learned step below the limit of the branch's class (T3).

    What is declared of the branch, the limit of the step, and the promise:

    * ``"gradient"``: :math:`f = -\nabla\varphi`, :math:`mI \preceq \nabla^2\varphi \preceq LI` (``strong``, ``smoothness``);
      :math:`\tau \le 2/(m + L)`; at most :math:`1 - \tau m`.
    * ``"dissipative"``: :math:`\langle f(x) - f(y), x - y\rangle \le -m\|x - y\|^2` and :math:`\operatorname{Lip} f \le L`
      (``dissipation``, ``lipschitz``); :math:`\tau \le 2m/L^2`; at most 1, the least at half of the limit.
    * ``"lipschitz"``: :math:`\operatorname{Lip} f \le L` (``lipschitz``); :math:`\tau \le (G - 1)/L`; at most G (``growth``).
    * ``"averaged"``: the same of the branch, and the block is :math:`h + \tau\,(f(h)/\max(1, L) - h)`; :math:`\tau \le 1`; at
      most 1, in any norm.

    Args:
        branch: :math:`f`, a module whose output has the shape of its input. For a :class:`Field`, which proves its own limit, give
            nothing but depth and step: its Euler step is returned.
        kind: what is declared.
        smoothness: L of a gradient. Each number is a float, an end of a :class:`Bound` (the safe one), or a function of the branch
            that computes it anew at every forward map; None measures L, see :func:`stableopt.nn.training_constant`.
        strong: m of a gradient, at least 0; None for 0.
        dissipation: m of a dissipative branch.
        lipschitz: L of the others; None measures it.
        growth: G > 1.
        norm: ``"l2"``; for the last two kinds also ``"linf"``, ``"l1"`` or ``"token_max"``.
        depth: number of blocks in the stack. The initial step is the fraction :math:`1/\max(2, \text{depth})` of its limit.
        step: initial step as a fraction of its limit, in (0, 1); None for the one that fits the depth.

    Returns:
        A :class:`CFLBlock`; for a Field a :class:`RungeKuttaBlock`.

    Raises:
        TypeError: if the branch is no module.
        ValueError: if a number is missing, superfluous or out of range, m > L (impossible by Cauchy-Schwarz), or the norm does not
            belong to the kind.
        UncertifiableError: if L is to be measured and the branch has a layer that cannot be.

    Note:
        **What you declare is not proved.** The bound of the block then has ``proved=False``, and :func:`stabilize` refuses it.
        It is proved where it rests on rules alone: the kinds ``"averaged"`` and ``"lipschitz"`` of a branch that has a Lipschitz
        rule, and a Field. :meth:`CFLBlock.refuted_by` looks for inputs that contradict a declaration.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> mine = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        >>> bound = lipschitz_rule(cfl(mine, "averaged"), "l2")
        >>> bound.upper <= 1.0, bound.proved
        (True, True)
        >>> block = cfl(mine, "gradient", smoothness=4.0)
        >>> bound = lipschitz_rule(block, "l2")
        >>> bound.upper <= 1.0, bound.proved
        (True, False)
        >>> print(block.refuted_by(torch.randn(64, 4), torch.randn(64, 4)))
        not a gradient with smoothness 4: <f(x) - f(y), x - y> is 0... where at most -... is declared (pair ...).
    """
    given = {
        "smoothness": smoothness,
        "strong": strong,
        "dissipation": dissipation,
        "lipschitz": lipschitz,
        "growth": growth,
    }
    numbers = {name: number for name, number in given.items() if number is not None}
    if isinstance(branch, Field):
        if kind is not None or numbers or norm != branch.norm:
            raise ValueError(
                f"a {type(branch).__name__} proves its own limit, in {branch.norm!r}: give cfl nothing but depth and step."
            )
        return RungeKuttaBlock(branch, substeps=1, depth=depth, step=step)
    if kind is None:
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))} for a branch that is no Field.")
    return CFLBlock(branch, kind, numbers, norm=norm, depth=depth, step=step)


class CFLBlock(nn.Module):
    r"""A residual block with the branch of a user, and a learned step below the limit of its class; made by :func:`cfl`.

    .. math:: h \mapsto h + \tau f(h), \qquad \tau = \operatorname{sigmoid}(r)\,\tau_{\max}(m, L) .

    Args:
        branch: :math:`f`.
        kind: ``"gradient"``, ``"dissipative"``, ``"averaged"`` or ``"lipschitz"``.
        numbers: the declared numbers by name, see :func:`cfl`.
        norm: of the promise.
        depth: number of blocks in the stack.
        step: initial step as a fraction of its limit.

    Raises:
        TypeError: if the branch is no module.
        ValueError: as :func:`cfl`; in ``forward``, if the branch changes the shape.
        UncertifiableError: if L is to be measured and the branch has a layer that cannot be.

    Examples:
        >>> block = CFLBlock(nn.Tanh(), "lipschitz", {"growth": 1.5}, step=0.5)
        >>> round(float(block.step_size().detach()), 4), lipschitz_rule(block, "linf").upper <= 1.25
        (0.25, True)
    """

    def __init__(
        self,
        branch: nn.Module,
        kind: Kind,
        numbers: Mapping[str, Number],
        *,
        norm: str = "l2",
        depth: int = 1,
        step: float | None = None,
    ) -> None:
        super().__init__()
        check_branches([branch], "a block of cfl")
        require_norm(norm)
        self.kind, self.norm, self.numbers = kind, norm, _checked(kind, numbers, norm)
        measured = _SECOND[kind] not in self.numbers
        self.constant = BranchConstant(branch, norm, "cfl") if measured else None
        self.branch = branch
        self.raw_step = raw_fraction(initial_fraction(step, depth))

    def current(self) -> tuple[Tensor | float, Tensor | float]:
        """Return what the step is computed from now: m (or G) and L, as declared or measured.

        Examples:
            >>> cfl(nn.Tanh(), "dissipative", dissipation=0.5, lipschitz=lambda branch: 2.0).current()
            (0.5, 2.0)
        """
        m = self.declared(_FIRST.get(self.kind, ""), upper if self.kind == "gradient" else lower)
        L = self.declared(_SECOND[self.kind], upper) if self.constant is None else self.constant.now(self.branch)
        return m, L

    def declared(self, name: str, end: Callable[[Real], float]) -> Tensor | float:
        """Return a declared number as it is now, 0 where nothing is declared.

        Args:
            name: which.
            end: which end of a :class:`Bound` is the safe one, :func:`stableopt.linalg.lower` or ``upper``.

        Examples:
            >>> cfl(nn.Tanh(), "gradient", smoothness=Bound(1.0, 2.0)).declared("smoothness", upper)
            2.0
        """
        number = self.numbers.get(name, 0.0)
        return number(self.branch) if callable(number) else end(number)

    def step_size(self) -> Tensor:
        r"""Return the step :math:`\tau` that ``forward`` uses now, a 0-d tensor, at least float32 and differentiable.

        Examples:
            >>> block = cfl(nn.Tanh(), "dissipative", dissipation=1.0, lipschitz=2.0, step=0.5)
            >>> round(float(block.step_size().detach()), 4)
            0.25
        """
        raw = wide(self.raw_step)
        m, L = self.current()
        eps = max(torch.finfo(x.dtype).eps for x in (raw, m, L) if isinstance(x, Tensor))
        return raw[0].sigmoid() * (1.0 - 16.0 * eps) * _limit(self.kind, m, L)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state."""
        change = same_shape(self.branch(input), input, "the branch of a block of cfl")
        if self.kind == "averaged":
            change = self._scale() * change - input
        return input + self.step_size() * change

    def _scale(self) -> Tensor | float:
        L = floored(self.current()[1])
        if isinstance(L, Tensor):
            return ((1.0 - 4.0 * torch.finfo(L.dtype).eps) / L).clamp_max(1.0)
        return min(1.0, (1.0 - 2.0**-50) / L)

    @torch.no_grad()
    def refuted_by(self, x: Tensor, y: Tensor) -> str | None:
        r"""Return the sentence about a pair of inputs that contradicts what is declared, None if no pair does.

        Of a gradient :math:`\langle f(x) - f(y), x - y\rangle \le -\|f(x) - f(y)\|^2/L` and :math:`\le -m\|x - y\|^2` must hold, of
        a dissipative branch the latter, of all :math:`\|f(x) - f(y)\| \le L\|x - y\|`. That no pair is found proves nothing.

        Args:
            x: a batch of inputs, float64 to be exact.
            y: another one.

        Raises:
            UncertifiableError: for a norm other than l2.

        Examples:
            >>> block = cfl(nn.Tanh(), "lipschitz", lipschitz=0.5, growth=2.0)
            >>> print(block.refuted_by(torch.zeros(1, 1), torch.ones(1, 1)))
            not Lipschitz with the constant 0.5: |f(x) - f(y)| is 0.761594 where at most 0.5 is declared (pair 0).
        """
        if self.norm != "l2":
            raise UncertifiableError(
                f"refuted_by knows the declarations in l2, and this block is one in {self.norm!r}."
            )
        m, L = float(self.declared(_FIRST.get(self.kind, ""), lower)), float(self.current()[1])
        d = (x - y).flatten(1).double()
        df = (self.branch(x) - self.branch(y)).flatten(1).double()
        gap, spread, inner = d.norm(dim=1), df.norm(dim=1), (df * d).sum(1)
        size = 1.0 + sum(self.branch(z).flatten(1).double().norm(dim=1) for z in (x, y))
        noise = 64.0 * torch.finfo(x.dtype).eps * size * (1.0 + gap) * (1.0 + spread / max(min(L, 1.0), SMALLEST))
        claims = [(f"Lipschitz with the constant {L:g}", "|f(x) - f(y)|", spread, L * gap)]
        product = "<f(x) - f(y), x - y>"
        if self.kind == "gradient":
            claims = [(f"a gradient with smoothness {L:g}", product, inner, -spread.square() / L)]
        if self.kind in {"gradient", "dissipative"}:
            claims.append((f"dissipative with m = {m:g}", product, inner, -m * gap.square()))
        for claim, name, found, most in claims:
            excess = found - most - noise
            if float(excess.max()) > 0.0:
                i = int(excess.argmax())
                return f"not {claim}: {name} is {float(found[i]):g} where at most {float(most[i]):g} is declared (pair {i})."
        return None

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return ", ".join([repr(self.kind), *(f"{k}={v}" for k, v in self.numbers.items()), f"norm={self.norm!r}"])


def _limit(kind: str, m: Tensor | float, L: Tensor | float) -> Tensor | float:
    if kind == "averaged":
        return 1.0
    if kind == "lipschitz":
        return (m - 1.0) / floored(L)
    if kind == "gradient":
        return 2.0 / floored(m + L)
    m = (
        m.clamp_min(0.0) if isinstance(m, Tensor) else max(m, 0.0)
    )  # a number of the moment may be negative: no step then
    return 2.0 * m / floored(L * L)


def _checked(kind: str, numbers: Mapping[str, Number], norm: str) -> dict[str, Number]:
    if kind not in _SECOND:
        raise ValueError(f"kind must be one of {', '.join(_SECOND)}, got {kind!r}.")
    if norm != "l2" and kind in {"gradient", "dissipative"}:
        raise ValueError(
            f"the limit of a {kind} branch is one in 'l2', got norm={norm!r}; use kind='averaged' or 'lipschitz'."
        )
    names = {_FIRST.get(kind), _SECOND[kind]}
    if extra := [name for name in numbers if name not in names]:
        raise ValueError(f"kind={kind!r} has no {extra[0]}; its numbers are {', '.join(sorted(filter(None, names)))}.")
    missing = {"dissipative": "dissipation", "lipschitz": "growth"}.get(kind)
    if missing is not None and missing not in numbers:
        raise ValueError(f"kind={kind!r} needs {missing}=..., which cannot be measured.")
    for name, number in numbers.items():
        if not callable(number):
            _check_number(name, number)
        elif name == "growth":
            raise ValueError("growth is the limit that the block keeps, a number above 1, got a function.")
    m, L = (numbers.get(name or "") for name in (_FIRST.get(kind), _SECOND[kind]))
    fixed = not (m is None or L is None or callable(m) or callable(L))
    if fixed and kind != "lipschitz" and lower(m) > upper(L):  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"{_FIRST[kind]}={m!r} is above {_SECOND[kind]}={L!r}, which no branch can have: |<f(x) - f(y), x - y>| is at most "
            "|f(x) - f(y)| |x - y|."
        )
    return dict(numbers)


def _check_number(name: str, number: Real) -> None:
    low, high = lower(number), upper(number)
    least = {"growth": "above 1", "strong": ">= 0"}.get(name, "> 0")
    inside = low > 1.0 if name == "growth" else low >= 0.0 if name == "strong" else low > 0.0
    if not (inside and math.isfinite(high)):
        raise ValueError(f"{name} must be finite and {least}, got {number!r}.")


@lipschitz_rule.register(CFLBlock)
def _cfl(module: CFLBlock, norm: str) -> Bound:
    """Bound the block by the law of its class; what rests on a declaration is not proved."""
    refuse_in_place(module)
    L = _constant_of(module, norm)
    with torch.no_grad():
        step = _finite(module.step_size())
        if module.kind == "averaged":
            scale = Bound.point(_finite(module._scale()))  # noqa: SLF001 the class of this file
            return Bound(0.0, (1.0 + step * (scale * L.upper - 1.0)).upper, L.proved)
        m = _finite(module.declared(_FIRST[module.kind], lower))
    if module.kind == "lipschitz" or norm != module.norm:
        return Bound(0.0, upper(lipschitz_factor(Bound.point(step), L.upper)), L.proved)
    if module.kind == "gradient":
        factor, most = strongly_convex_factor(Bound.point(step), m, L.upper), strongly_convex_max_step(L.upper)
    else:
        factor, most = dissipative_factor(Bound.point(step), m, L.upper), dissipative_max_step(m, L.upper)
    return Bound(0.0, min(upper(factor), 1.0) if step <= most else upper(factor), False)


def _finite(number: Tensor | float) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"no bound holds for a block of cfl with NaN or infinite numbers ({value}).")
    return value


def _constant_of(module: CFLBlock, norm: str) -> Bound:
    """Return what is proved of the Lipschitz constant of the branch, else what is declared; refuse a contradiction."""
    try:
        known = proved_constant(module.branch, norm)
    except UncertifiableError:
        if norm != module.norm or module.constant is not None:
            raise
        known = None
    if module.constant is not None or norm != module.norm:
        return Bound(0.0, known.upper, known.proved)  # pyright: ignore[reportOptionalMemberAccess]
    with torch.no_grad():
        declared = _finite(module.current()[1])
    if known is not None and known.lower > declared:
        raise ValueError(
            f"{_SECOND[module.kind]}={declared:.6g} is declared of the branch, but its Lipschitz constant is proved to be at least "
            f"{known.lower:.6g}. Declare a larger number, or leave it out to have it measured."
        )
    if known is not None and known.proved and module.kind in {"averaged", "lipschitz"}:
        return known
    return Bound(0.0, declared, False)


@token_rule.register(CFLBlock)
def _token(module: CFLBlock) -> Bound:
    return _cfl(module, TOKEN_MAX)


def _promise(module: CFLBlock, norm: str) -> Bound | None:
    """Return what holds for all values of the parameters, None if it is declared or nothing does."""
    if norm != module.norm or module.constant is None or not module.constant.still_holds(module.branch, "cfl"):
        return None
    if module.kind == "averaged":
        return Bound(0.0, 1.0)
    return Bound(0.0, float(module.declared("growth", lower))) if module.kind == "lipschitz" else None


uniform_rule.register(CFLBlock, _promise)


@branches_of.register(CFLBlock)
def _branches(module: CFLBlock) -> dict[str, nn.Module]:
    return {"branch": module.branch}


@branch_constant.register(CFLBlock)
def _constant(module: CFLBlock, parts: list[Bound], norm: str) -> Bound:  # noqa: ARG001 the step makes up for it
    refuse_in_place(module)
    promise = _promise(module, norm)
    if promise is None:
        raise UncertifiableError(
            f"a block of cfl of kind {module.kind!r} in {module.norm!r} rests on what is declared of its branch, or promises "
            f"nothing in {norm!r}, so no limit can be kept. Use kind='averaged' without a declared constant and with norm={norm!r}."
        )
    return promise
