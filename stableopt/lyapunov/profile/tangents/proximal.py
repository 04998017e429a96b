r"""Tangents through a prox or a projection, from products with its transposed Jacobian alone.

*The prox.* With :math:`D = sP^{-1}`, s the step, let :math:`p = \arg\min_u g(u)+\frac12\|u-y\|_{D^{-1}}^2`, g convex or not. Then

.. math:: D^{-1}p \in \partial\varphi(y), \qquad
    \varphi(y) = \sup_u\ \langle D^{-1}u, y\rangle - \tfrac12\|u\|_{D^{-1}}^2 - g(u),

a supremum of affine functions, which is convex. So :math:`D^{-1}J`, J the Jacobian of the prox, is a Hessian wherever it exists,
and symmetric: :math:`J = DJ^\top D^{-1} = P^{-1}J^\top P`. A product with J is one with :math:`J^\top` in reverse mode, which
all of :mod:`stableopt.constraints` has. For a sum over coordinates J is diagonal, and one product gives all of it.

*Its step.* p is the proximal point of y iff :math:`D^{-1}(y-p) \in \partial g(p)`. For another :math:`D'` the proximal point
:math:`p'` therefore is that of :math:`p'+DD'^{-1}(y-p')` for D, and to first order

.. math:: \dot p = J\bigl(\dot y - D^{-1}\dot D\,(y-p)\bigr), \qquad D^{-1}\dot D = \dot s/s - P^{-1}\dot P,

which asks for no other derivative than J. In the Euclidean projection :math:`\dot D` has no part.

*In a set without interior* autograd takes the identity for a point that lies in it exactly. The derivative there is the mean over
two neighbors outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from stableopt.constraints import Constraint, Regularizer

__all__ = ["pushed_through"]


def pushed_through(
    g: Regularizer,
    y: Tensor,
    d: Tensor,
    size: float,
    d_size: Tensor,
    metric: Tensor | float = 1.0,
    d_metric: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the proximal point, or the projection, as :func:`stableopt.optim.regularize.regularize` does, and its tangents.

    Args:
        g: a penalty or a set; a set without projection in a diagonal metric is projected on in the Euclidean one.
        y: where the plain step has ended.
        d: its tangents, ``(k, *shape)``.
        size: the step s.
        d_size: its tangents, ``(k,)``.
        metric: P, a number, or one number per entry.
        d_metric: the tangents of one that is a tensor, ``(k, *shape)``.

    Returns:
        The point, and its tangents ``(k, *shape)``.

    Raises:
        ValueError: if autograd does not get through the prox, or the step is 0 and has a tangent.

    Examples:
        >>> from stableopt.constraints import L1
        >>> pushed_through(L1(1.0), torch.tensor([2.0, 0.5]), torch.ones(1, 2), 1.0, torch.tensor([0.5]))
        (tensor([1., 0.]), tensor([[0.5000, 0.0000]]))
    """
    in_metric = isinstance(metric, Tensor) and g.diagonal
    if isinstance(g, Constraint) and not in_metric:
        return (p := g.project(y)), _through(g, g.project, y, p, d, None)
    prox = functools.partial(g.prox, step=size / metric)
    p = prox(y)
    if isinstance(metric, Tensor) and d_metric is not None:
        d = d + d_metric / metric * (y - p)
    if not isinstance(g, Constraint):  # the size of the metric has no part in a projection
        d = d - _relative(d_size, size).view(-1, *[1] * y.ndim).to(y.device) * (y - p)
    return p, _through(g, prox, y, p, d, metric if isinstance(metric, Tensor) else None)


def _through(
    g: Regularizer, prox: Callable[[Tensor], Tensor], y: Tensor, p: Tensor, rows: Tensor, metric: Tensor | None
) -> Tensor:
    """Multiply rows by the Jacobian of a prox at y, which is symmetric in the metric; p is the proximal point."""
    places = _around(prox, y) if isinstance(g, Constraint) and torch.equal(p, y) else [y]
    single = g.separable and not y.is_complex()  # then one product has the whole diagonal
    weighted = torch.ones_like(y)[None] if single else rows if metric is None else metric * rows
    product = torch.stack([_adjoint(g, prox, x, weighted) for x in places]).mean(0)
    return product * rows if single else product if metric is None else product / metric


def _adjoint(g: Regularizer, prox: Callable[[Tensor], Tensor], y: Tensor, rows: Tensor) -> Tensor:
    """Multiply rows by the transposed Jacobian of a prox at y."""
    leaf = y.detach().clone().requires_grad_()
    with torch.enable_grad():
        p = prox(leaf)
    if p.requires_grad:
        return torch.stack([torch.autograd.grad(p, leaf, row, retain_graph=True)[0] for row in rows])
    if any(not torch.equal(prox(y + 1e-3 * row), p) for row in rows):
        raise ValueError(
            f"push needs a prox that autograd can differentiate, and that of {g!r} comes back detached; "
            "leave out torch.no_grad and detach from its prox or project."
        )
    return torch.zeros_like(rows)


def _around(project: Callable[[Tensor], Tensor], y: Tensor) -> list[Tensor]:
    """Return where to differentiate a projection in place of a point of the set: there if a neighbor lies inside, else around it.

    The mean over two neighbors, one opposite to the other, is off by the square of their distance, which is that of rounding.
    """
    size = y.abs().max() if y.any() else 1.0
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    apart = torch.finfo(y.dtype).eps ** 0.5 * size * noise
    around = [y + apart, y - apart]
    return [y] if any(torch.equal(project(x), x) for x in around) else around


def _relative(d_size: Tensor, size: float) -> Tensor:
    """Return the tangents of the logarithm of the step."""
    if size != 0.0:
        return d_size / size
    if d_size.any():
        raise ValueError(
            "push has no derivative of a prox with respect to a step of 0, as a learning rate of 0 gives; raise lr."
        )
    return d_size
