r"""What penalties and sets of one kind share: checks, dtypes, batches, metrics, shards; a class adds its formula.

==================== ================================================== ====================================================
kind                 acts on                                            a class supplies
==================== ================================================== ====================================================
:class:`Elementwise` each entry alone                                   ``_value`` and ``_prox`` of entries
:class:`VectorPenalty` vectors along ``dims``                           ``_value`` and ``_prox`` of rows
:class:`VectorSet`   vectors along ``dims``                             ``_excess``, ``_nearest`` and ``_inward`` of rows
==================== ================================================== ====================================================

Rows are :class:`stableopt.constraints.layout.Vectors`: float64 whatever the dtype of the tensor. A metric is one positive number
per coordinate: :math:`\operatorname{prox}^P_{sg}(x) = \arg\min_u g(u) + \tfrac{1}{2s} \sum_i P_i (u_i - x_i)^2`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_step, check_tensor, combined_step
from stableopt.constraints.base import Constraint, Regularizer
from stableopt.constraints.layout import Vectors, substitute
from stableopt.constraints.rounding import toward_zero
from stableopt.constraints.sharding import Sharding, is_sharded, on_whole, part_like

__all__ = ["Elementwise", "VectorPenalty", "VectorSet"]


class Elementwise(Regularizer):
    """A penalty that is a sum over the entries; its prox is one formula per entry, in any diagonal metric.

    Attributes:
        complex_too: whether it is a function of the moduli, so that complex tensors work.
    """

    separable: ClassVar[bool] = True
    complex_too: ClassVar[bool] = False

    @abstractmethod
    def _value(self, x: Tensor) -> Tensor:
        """Return the penalty of each entry of a float64 (complex128) tensor."""

    @abstractmethod
    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        """Return the proximal point; ``x`` is float64 or float32 (or complex), a tensor step has its dtype and fits it."""

    def value(self, x: Tensor) -> Tensor:
        """Return the penalty, summed in float64 (0-d, on the device of ``x``).

        Raises:
            TypeError: if ``x`` has the wrong type.
        """
        v = Vectors(type(self).__name__, x, None, complex_too=self.complex_too)
        return v.total(v.sum(self._value(v.data)))

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point of each entry, rounded to nearest; half precision is computed in float32.

        Args:
            x: any shape; never changed.
            step: finite number >= 0, or a tensor that broadcasts to ``x``.
            metric: positive tensor that broadcasts to ``x``; the step of an entry is ``step / metric``.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if ``step`` is negative or not finite, or a tensor does not broadcast to ``x``.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        step = combined_step(name, step, metric, x, diagonal=True)
        layout = Sharding.of(name, x) if is_sharded(x) else None  # pyright: ignore[reportArgumentType]
        local: Tensor = x.to_local() if layout else x  # pyright: ignore[reportAttributeAccessIssue]
        work = local.float() if x.dtype in {torch.float16, torch.bfloat16} else local
        if isinstance(step, Tensor):
            step = (step if step.numel() == 1 else part_like(x, step, layout)).to(work.real.dtype)
        result = self._prox(work, step).to(x.dtype)
        return layout.wrap(result) if layout else result


class VectorPenalty(Regularizer):
    """A penalty of vectors: the sum over all vectors along ``dims`` of a function of each.

    Attributes:
        dims: a field that every class has: the dimensions of one vector, ``None`` for all entries together.
        complex_too: whether it is a function of the moduli, so that complex tensors work.
        needs_whole: whether the prox needs all entries of a vector in one place, as sorting does; a DTensor is then gathered.
    """

    complex_too: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False
    dims: int | tuple[int, ...] | None

    @abstractmethod
    def _value(self, v: Vectors) -> Tensor:
        """Return the penalty of each vector, shape ``(batch, 1)``."""

    @abstractmethod
    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        """Return the proximal points as float64 rows, differentiable; ``step`` is ``(1, 1)``, or ``(batch, n)`` if diagonal."""

    def value(self, x: Tensor) -> Tensor:
        """Return the penalty, summed in float64 over all vectors (0-d, on the device of ``x``).

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``.
        """
        if self.needs_whole and is_sharded(x):
            return self.value(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        v = Vectors(type(self).__name__, x, self.dims, complex_too=self.complex_too)
        return v.total(self._value(v))

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point of each vector, computed in float64 and rounded to nearest.

        Args:
            x: any shape that has ``dims``; never changed.
            step: finite number >= 0; if :attr:`diagonal` also a tensor that broadcasts to ``x``.
            metric: positive tensor that broadcasts to ``x``, if :attr:`diagonal`: the step of an entry is ``step / metric``.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if ``step`` is negative or not finite, a tensor does not broadcast to ``x``, there is no exact prox in a
                diagonal metric, or ``x`` lacks one of ``dims``.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        step = combined_step(name, step, metric, x, diagonal=self.diagonal)
        if self.needs_whole and is_sharded(x):
            whole = step.full_tensor() if is_sharded(step) else step  # pyright: ignore[reportAttributeAccessIssue]
            return on_whole(name, lambda t: self.prox(t, whole), x)
        v = Vectors(name, x, self.dims, complex_too=self.complex_too)
        steps = v.spread(step) if isinstance(step, Tensor) else v.data.real.new_full((1, 1), step)
        return v.fold(self._prox(v, steps).to(x.dtype))


class VectorSet(Constraint):
    r"""A set of vectors: all vectors along ``dims`` lie in it.

    Attributes:
        dims: a field that every class has: the dimensions of one vector, ``None`` for all entries together.
        complex_too: whether it is a condition on the moduli, so that complex tensors work.
        needs_whole: whether the projection needs all entries of a vector in one place; a DTensor is then gathered.
    """

    complex_too: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False
    dims: int | tuple[int, ...] | None

    @abstractmethod
    def _excess(self, v: Vectors) -> Tensor:
        """Return how far each vector is outside, ``(batch, 1)``: ``<= 0`` exactly if the stored numbers are proved feasible."""

    @abstractmethod
    def _nearest(self, v: Vectors, metric: Tensor | None) -> Tensor:
        """Return the projections as float64 rows, differentiable, with finite derivatives also for feasible rows.

        ``metric`` is ``None`` or positive rows ``(batch, n)``; it is given only if :attr:`diagonal`.
        """

    def _inward(self, v: Vectors, nearest: Tensor) -> Tensor:
        """Return the projections in the dtype of ``v.stored``, rounded into the set, so that their excess is not positive."""
        return toward_zero(nearest, v.stored.dtype)

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        r"""Return the nearest point of the set, in the norm :math:`\sum_i P_i u_i^2` if a metric is given, rounded inwards.

        Args:
            x: any shape that has ``dims``; never changed. A vector with NaN or infinity becomes NaN.
            metric: positive tensor that broadcasts to ``x``, if :attr:`diagonal`.

        Raises:
            TypeError: if ``x`` or ``metric`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``, or the metric does not fit or is not supported.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        if x.is_meta:
            return torch.empty_like(x)
        if metric is not None:
            check_step(name, metric, x, diagonal=self.diagonal, called="metric")
        if self.needs_whole and is_sharded(x):
            whole = metric.full_tensor() if is_sharded(metric) else metric  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            return on_whole(name, lambda t: self.project(t, whole), x)
        v = Vectors(name, x, self.dims, complex_too=self.complex_too)
        if v.stored.numel() == 0 and not v.groups:
            return x
        weights = v.spread(metric) if metric is not None and metric.numel() > 1 else None
        outside = ~(self._excess(v) <= 0)
        nearest = self._nearest(v, weights)
        moved = substitute(nearest.to(x.dtype), self._inward(v, nearest.detach()))
        finite = v.finite()
        moved = torch.where(finite, moved, math.nan)
        return v.fold(torch.where(outside | ~finite, moved, v.stored))

    def violation(self, x: Tensor) -> float:
        """Return the largest excess of a vector; 0.0 exactly if all stored vectors are proved feasible, infinite for NaN.

        Raises:
            TypeError: if ``x`` has the wrong type.
            ValueError: if ``x`` lacks one of ``dims``.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        with torch.no_grad():
            if self.needs_whole and is_sharded(x):
                return self.violation(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
            v = Vectors(name, x, self.dims, complex_too=self.complex_too)
            if v.stored.numel() == 0 and not v.groups:
                return 0.0
            return v.worst(torch.where(v.finite(), self._excess(v), math.inf))

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection, in the metric ``metric / step`` if one of them is a tensor; a number as step has no influence.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if ``step`` is negative or not finite, a tensor does not broadcast to ``x``, or there is no exact projection
                in a diagonal metric.
        """
        name = type(self).__name__
        check_tensor(name, x, complex_too=self.complex_too)
        step = combined_step(name, step, metric, x, diagonal=self.diagonal)
        if not isinstance(step, Tensor) or step.numel() == 1:
            return self.project(x)
        # Only ratios matter. A step of 0 everywhere (a learning rate of 0) leaves the Euclidean metric.
        top = step.amax()
        return self.project(x, torch.where(top > 0, top / step.clamp_min(top * 2.0**-60), 1.0))
