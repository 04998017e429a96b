r"""The cheapest weight map: train with a warm estimate of the norm, evaluate and export with a proved one.

**In training** one power step per forward map estimates the norm from below, so the weight may exceed the radius a little:
:meth:`Power.gap` says by how much at the moment. **In evaluation** the weight is divided by a proved bound of the norm of its
stored numbers, and the quotient is proved again. It depends on the original alone, whatever the vectors are.

**Jumps.** An estimate that lags behind the weight is too small. Two signs give that away. The step compares its own two halves:
with :math:`u` from the step before and :math:`v \propto V^\top u`,

.. math:: \|V^\top u\| \;\le\; \|V v\| \;\le\; \|V\| ,

and where the second is more than 0.5 % above the first the vector has not settled. And the quotient of the estimate and the
Frobenius norm is compared with the largest since the vectors last settled: it does not change when the weight is scaled, and it
rises while the direction that is followed grows. A new singular value :math:`r` with vectors orthogonal to all others leaves
the estimate as it is and adds :math:`r^2` to :math:`\|V\|_F^2`, so a fall by 2 % shows each :math:`r \ge \|V\|_F / 5`. At
either sign the vectors settle anew, by 20 steps. A fixed direction, mixed into :math:`u` in each step, keeps it from being
orthogonal to any new singular vector for good. What is left is an excess of a few percent while the largest singular vectors
change quickly, and after a jump by less than :math:`\|V\|_F / 5` in a direction orthogonal to :math:`u` and :math:`v`, which
takes the steps to grow into it.

Where a decision costs more than the steps, which is on accelerators, while compiling and under the transforms of
:mod:`torch.func`, only the halves are compared, and an upper bound takes the place of an estimate that has not settled.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from stableopt.linalg import Bound, conv_power_step
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import WeightMap, slack
from stableopt.nn.weights.geometry import Geometry
from stableopt.nn.weights.isometry import HALF
from stableopt.nn.weights.power_proof import Folded, fold, proved_weight
from stableopt.nn.weights.power_steps import direction, fresh, half_steps, quick_half_steps, scaled, settled
from stableopt.nn.weights.scaled import (
    Factor,
    best_direction,
    scaled_kernel,
    scaled_linear,
    scaled_matrix,
    transformed,
)

__all__ = ["Power"]

_UNSETTLED = 1.005
"""Quotient of the second half of a step to the first, above which the vector has not settled."""
_CHANGED = 0.02
"""Relative fall of the quotient of estimate and Frobenius norm, above which the vectors settle anew."""
_RISEN = 1.5
"""Factor of its rise within a step, above which the same is done: a jump may hide another."""
_RENEWED = 20
_RANGE, _MOST = 24, 100
"""Binary exponents: of a Frobenius norm whose fourth power stays in the range of float32, and of the largest scaling at once."""


class Power(WeightMap):
    r"""Rescale by a power-step estimate in training, and by a proved bound in evaluation.

    .. math:: V \mapsto V \min\Bigl(1, \frac{\text{radius}}{\sigma}\Bigr), \qquad
        \sigma = \|V v\|,\; v \propto V^\top u,\; u' \propto V v \quad\text{(training)}, \qquad
        \sigma = U(V) \ge \|V\| \quad\text{(evaluation)} .

    The derivative of :math:`\sigma` is :math:`u' v^\top`, that of the norm at the vectors. For convolutions eight vectors take the
    place of one, each at the frequency of a grid where it reaches most, and the estimate is that of the operator on images of any
    size; see :func:`stableopt.linalg.conv_power_step`.

    Args:
        geometry: the operator.
        radius: the limit.
        norm: ``"l2"``.

    Raises:
        TypeError: as :class:`WeightMap`.
        ValueError: as :class:`WeightMap`; in evaluation if the original holds NaN or infinity.
        StabilityError: in evaluation, if no scale can be proved in the dtype.

    Note:
        A forward map in training moves the vectors, in evaluation nothing. The proof of a matrix in evaluation is made on the
        CPU, once for each value of the original: the result is kept next to a copy of the original, and used again only while
        the two are equal bit for bit. :func:`stableopt.nn.export` gives a layer without any of this. A transform of
        :mod:`torch.func` over the original needs training mode, and leaves the vectors where they are. Derivatives of the
        estimate take its vectors as constants, so second derivatives are not those of the norm.

    References:
        Miyato, Kataoka, Koyama and Yoshida, *Spectral Normalization for Generative Adversarial Networks*, 2018 (the warm step).

    Examples:
        >>> from stableopt.nn.weights import Geometry
        >>> limit = Power(Geometry("linear")).eval()
        >>> W = limit(10.0 * torch.ones(2, 3))
        >>> bool(0.9999 <= torch.linalg.matrix_norm(W.double(), 2) <= 1.0)
        True
    """

    name: ClassVar[str] = "power"
    by_construction: ClassVar[bool] = False
    vectors: Tensor
    share: Tensor
    _spec: str

    def __init__(self, geometry: Geometry, radius: float = 1.0, norm: str = "l2") -> None:
        super().__init__(geometry, radius, norm)
        self.register_buffer("vectors", None)
        self.register_buffer("share", None)  # estimate / Frobenius norm when the vectors last settled
        self._folded: Folded | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the geometry as text as well: equal layers then share a compiled graph."""
        super().__setattr__(name, value)
        if name == "geometry":
            super().__setattr__("_spec", value.spec())

    def forward(self, V: Tensor) -> Tensor:
        """Return the weight; in training mode make a power step."""
        if not V.numel():
            return V
        if not self.training:
            return self._proved(V)
        if self.vectors is None:
            self._start(V)
        wide = V.float() if V.dtype in HALF else V
        keep = slack if torch.compiler.is_compiling() else _kept_slack
        target = self.radius * (1.0 - keep(wide, wide.dtype))
        lowered = not V.is_meta and torch.is_autocast_enabled(V.device.type)
        with full_precision(wide) if lowered else contextlib.nullcontext():
            W = self._decided(wide, target) if _may_branch(wide) else self._branchless(wide, target)
        return W.to(V.dtype).contiguous()

    def multiply(self, V: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
        r"""Return :math:`x W^\top + b` in training, without the matrix :math:`W`; None where it has to be made.

        Args:
            V: the original of a matrix.
            x: the input, shape ``(..., n)``.
            bias: or None.

        Examples:
            >>> from stableopt.nn.weights import Geometry
            >>> limit, V = Power(Geometry("linear")), torch.eye(3)
            >>> _ = limit.right_inverse(V)
            >>> torch.allclose(limit.multiply(V, torch.ones(1, 3), None), torch.ones(1, 3) @ limit(V).T, rtol=1e-3)
            True
        """
        plain = self.training and self.geometry.kind == "linear" and V.numel() > 0 and V.dtype not in HALF
        if not (plain and _may_branch(V) and _fits(x, V, bias)):
            return None
        if self.vectors is None:
            self._start(V)
        if not _is_moderate(size := float(torch.linalg.vector_norm(V.detach()))):
            return None
        return scaled_linear(x, V, bias, self._factor(V, self.radius * (1.0 - _kept_slack(V, V.dtype)), size))

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return ``W``, and let the vectors settle on it."""
        self._start(W)
        return W

    @torch.no_grad()
    def gap(self, V: Tensor) -> Bound:
        """Return a proved bound of the norm in training over the radius, without moving the vectors.

        Above 1 it is the relative amount by which the estimate is too small at the moment, in eager or in compiled training,
        whichever is larger: where nothing can be decided, fewer jumps are noticed.

        Args:
            V: the original.

        Raises:
            ValueError: as for the proof of the norm.

        Examples:
            >>> from stableopt.nn.weights import Geometry
            >>> limit = Power(Geometry("linear"))
            >>> V = limit.right_inverse(3.0 * torch.eye(4))
            >>> bool(0.99 < limit.gap(V).upper < 1.01)
            True
        """
        vectors, share, mode = self.vectors, self.share, self.training
        wide = V.float() if V.dtype in HALF else V
        target = self.radius * (1.0 - _kept_slack(wide, wide.dtype))
        gaps = []
        try:
            self.training = True
            for compute in (self._decided, self._branchless) if _may_branch(wide) else (self._branchless,):
                if vectors is not None:
                    self.vectors, self.share = vectors.clone(), share.clone()
                else:
                    self._start(V)
                with full_precision(wide):
                    gaps.append(self.geometry.proved(compute(wide, target).to(V.dtype)) * (1.0 / self.radius))
        finally:
            self.vectors, self.share, self.training = vectors, share, mode
        return max(gaps, key=lambda gap: gap.upper)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept for evaluation."""
        return {**super().__getstate__(), "_folded": None}  # pyright: ignore[reportGeneralTypeIssues]

    # training

    @torch.inference_mode(False)  # the buffers will be changed in place by others
    @torch.no_grad()
    def _start(self, W: Tensor) -> None:
        """Make the vectors for a weight of this shape, and let them settle on its numbers."""
        if not W.numel():
            return
        wide = W.detach().float() if W.dtype in HALF else W.detach()
        with full_precision(wide):
            self.vectors = settled(wide if wide.is_meta else scaled(wide)[0], self.geometry).clone().contiguous()
        self.share = wide.new_zeros(())  # that of no weight, so the first step settles anew

    def _decided(self, V: Tensor, target: float) -> Tensor:
        """Return the weight where a decision costs nothing: a step, and many if the first has not settled."""
        size = float(torch.linalg.vector_norm(V.detach()))
        if not _is_moderate(size):
            k = max(-_MOST, min(_MOST, math.frexp(float(V.detach().abs().amax()))[1]))
            if abs(k) > _RANGE // 2:  # scaling by a power of two is exact
                return self._decided(V * 2.0**-k, target * 2.0**-k) * 2.0**k
        if self.geometry.kind == "linear":
            return scaled_matrix(V, self._factor(V, target, size))
        return self._decided_kernel(V, target, size)

    @torch.no_grad()
    def _factor(self, V: Tensor, target: float, size: float) -> Factor:
        """Make a power step for a matrix of that Frobenius norm, and return the number that it is scaled by."""
        u, v, first, norm = quick_half_steps(V, self.vectors.to(V.dtype))
        if not (norm <= _UNSETTLED * first and self._as_before(norm, size)):
            u = fresh(self.vectors.to(V.dtype), (0,)) + direction(V)
            for _ in range(_RENEWED):
                u, v, first, norm = quick_half_steps(V, u)
            self.share.fill_(norm / size if size else 0.0)
        self.vectors.copy_(u)
        if not norm <= _UNSETTLED * first:  # not even then, or not finite
            return Factor(target / max(size, target), None, u, v)
        return Factor(target / norm, target, u, v) if norm > target else Factor(1.0, None, u, v)

    def _decided_kernel(self, V: Tensor, target: float, size: float) -> Tensor:
        with torch.no_grad():
            options = self.geometry.options(V.ndim - 2)
            step = best_direction(V, self.vectors, options)
            if not self._as_before(step.norm, size):
                u = fresh(self.vectors, (1, 2)) + fresh(settled(V, self.geometry, 0), (1, 2))
                for _ in range(_RENEWED):
                    step = best_direction(V, u, options)
                    u = step.vectors
                self.share.fill_(step.norm / size if size else 0.0)
            self.vectors.copy_(step.vectors)
        limited = step.norm > target
        return scaled_kernel(V, step, target / step.norm if limited else 1.0, target if limited else None)

    def _as_before(self, norm: float, size: float) -> bool:
        """Return whether no other singular value shows in the quotient; a quotient that has risen is the next one's measure."""
        if size == 0.0:
            return True
        now, before = norm / size, float(self.share)
        if before < now <= _RISEN * before:
            self.share.fill_(now)
            return True
        return (1.0 - _CHANGED) * before <= now <= before

    def _branchless(self, V: Tensor, target: float) -> Tensor:
        """Return the weight without any decision: an estimate that has not settled gives way to an upper bound."""
        if self.geometry.kind == "linear":
            return self._dense(V, target)
        unit, size = scaled(V)
        return self._conv(unit, target / size) * size

    def _move(self, vectors: Tensor) -> None:
        if torch.compiler.is_compiling() or not transformed():
            self.vectors.copy_(vectors)

    def _dense(self, V: Tensor, target: float) -> Tensor:
        with torch.no_grad():
            u, v, first, second = half_steps(V, torch.nan_to_num(self.vectors.to(V.dtype)))
            self._move(u)
            unsettled = ~(second <= _UNSETTLED * first)
            bound = torch.linalg.vector_norm(V, dtype=torch.float64)
        norm = torch.where(unsettled, bound, torch.dot(torch.where(second > 0, u, 0.0), V @ v))
        return V * (target / norm.clamp_min(target)).to(V.dtype)

    def _conv(self, V: Tensor, target: Tensor) -> Tensor:
        before, vectors = self._conv_step(V.detach(), torch.nan_to_num(self.vectors))
        after, vectors = self._conv_step(V, vectors)
        self._move(vectors)
        # by the Cauchy-Schwarz inequality, the sum of the Frobenius norms of the taps is at most this
        taps = math.prod(V.shape[2:])
        bound = self.geometry.repeated(V) ** 0.5 * math.sqrt(taps) * torch.linalg.vector_norm(V)
        norm = torch.where(after.detach() <= _UNSETTLED * before, after, bound)
        return V * (target / torch.maximum(norm, target))

    # evaluation

    def _proved(self, V: Tensor) -> Tensor:
        if V.is_meta:
            return V.clone()
        if torch.compiler.is_compiling():
            return self._proved_in_a_graph(V)
        differentiated = V.requires_grad and torch.is_grad_enabled()
        if transformed():
            differentiated = True
            folded = self._kept_below_transforms(V)
        else:
            folded = self._kept(V.detach())
        if not differentiated:
            return folded.weight.clone()  # nothing that is done to it must be remembered
        if folded.scale == 1.0:
            return V.clone(memory_format=torch.contiguous_format)
        return self._differentiable(V, folded.weight, folded.scale, folded.settled_vectors())

    def _proved_in_a_graph(self, V: Tensor) -> Tensor:
        """Leave the proof to one opaque node, which keeps its result as outside of a graph."""
        differentiated = V.requires_grad and torch.is_grad_enabled()
        if self.vectors is None:
            self._start(V)
        like = self.vectors if differentiated else self.vectors.new_empty(0)
        weight, scale, vectors = proved_weight(V.detach(), like, self.radius, self._spec)
        return self._differentiable(V, weight, scale, vectors) if differentiated else weight

    def _differentiable(self, V: Tensor, weight: Tensor, scale: float | Tensor, vectors: Tensor) -> Tensor:
        """Return the proved numbers, with the derivative of the quotient; of a scale in a graph it is not known to be below 1."""
        wide = V.float() if V.dtype in HALF else V
        with full_precision(wide):
            unit, size = scaled(wide)
            norm = self._estimate(unit, vectors)
            shrinking = norm.detach() / norm
            if isinstance(scale, Tensor):
                shrinking = torch.where(scale < 1.0, shrinking, 1.0)
            moved = (unit * (scale * size * shrinking)).to(V.dtype)
        return weight + (moved - moved.detach())

    def _kept_below_transforms(self, V: Tensor) -> Folded:
        """Return what is kept for the numbers below the transforms of :mod:`torch.func` that are at work."""
        value = torch.func.debug_unwrap(V.detach(), recurse=True)
        if value.shape != V.shape:
            raise RuntimeError(
                "vmap over the weights of a layer with the method 'power' cannot prove each of them in evaluation mode; "
                "use training mode, or another method."
            )
        with temporarily_clear_interpreter_stack():  # a proof reads numbers, which no transform can follow
            folded = self._kept(value.detach())
            folded.settled_vectors()
        return folded

    def _kept(self, V: Tensor) -> Folded:
        kept = self._folded
        if kept is None or not kept.fits(V, self.radius, self.geometry):
            kept = self._folded = fold(V, self.radius, self.geometry)
        return kept

    def _estimate(self, V: Tensor, vectors: Tensor) -> Tensor:
        if self.geometry.kind == "linear":
            with torch.no_grad():
                u, v, _, _ = half_steps(V, vectors.to(V.dtype))
            return torch.dot(u, V @ v)
        return self._conv_step(V, vectors)[0]

    def _conv_step(self, V: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return conv_power_step(V, vectors, **self.geometry.options(V.ndim - 2), riesz=True, free=True)


def _kept_slack(stored: Tensor, computed: torch.dtype) -> float:
    return _slack_of(stored.shape, stored.dtype, computed)


@functools.lru_cache(maxsize=1024)
def _slack_of(shape: torch.Size, stored: torch.dtype, computed: torch.dtype) -> float:
    return slack(torch.empty(shape, dtype=stored, device="meta"), computed)


def _is_moderate(size: float) -> bool:
    """Return whether the fourth power of a Frobenius norm stays in the range of float32."""
    return size == 0.0 or (size < math.inf and abs(math.frexp(size)[1]) <= _RANGE)


_PLAIN = {Tensor, nn.Parameter}


def _may_branch(V: Tensor) -> bool:
    """Return whether a number can be read at once: on the CPU, of a plain tensor, outside of compilers, tracers and transforms."""
    if torch.compiler.is_compiling() or transformed() or torch._C._get_tracing_state() is not None:  # noqa: SLF001 torch has no public question
        return False
    return V.device.type == "cpu" and type(V) in _PLAIN and not torch._C._len_torch_dispatch_stack()  # noqa: SLF001


def _fits(x: Any, V: Tensor, bias: Tensor | None) -> bool:
    """Return whether a plain product of an input with a matrix is all that is asked for."""
    return (
        type(x) in _PLAIN
        and x.layout == torch.strided
        and x.ndim >= 1
        and x.shape[-1] == V.shape[1]
        and (x.dtype, x.device) == (V.dtype, V.device)
        and (bias is None or (type(bias) in _PLAIN and bias.dtype == V.dtype))
        and not torch.is_autocast_enabled(V.device.type)
    )
