r"""Joint bounds of dense chains: tighter than the product of the norms, with a proof that a short program can repeat.

For a chain :math:`z_i = \sigma(A_i z_{i-1} + b_i)`, :math:`y = W z_k` with slopes in :math:`[0, 1]`, differences satisfy
:math:`z_i^\top \Lambda_i (A_i z_{i-1} - z_i) \ge 0` for any diagonal :math:`\Lambda_i > 0`. With :math:`X_0 = I` and
matrices for which

.. math::
    \begin{pmatrix} X_{i-1} & -A_i^\top \Lambda_i / 2 \\ \cdot & \Lambda_i - X_i \end{pmatrix} \succeq 0, \qquad
    \begin{pmatrix} X_k & W^\top \\ \cdot & G \end{pmatrix} \succeq 0 ,

the sum of the first ones over :math:`i` gives :math:`\|z_0\|^2 \ge z_k^\top X_k z_k`, and the last one
:math:`(c^\top W z_k)^2 \le c^\top G c \; \|z_0\|^2` for every :math:`c`: the Lipschitz constant is at most
:math:`\lambda_{\max}(G)^{1/2}`, and that of a difference of two outputs :math:`(G_{ii} + G_{jj} - 2 G_{ij})^{1/2}`. The matrices
follow from the :math:`\Lambda_i`, which is all that a certificate stores:

.. math:: X_i = (1 - \epsilon)\bigl(\Lambda_i - \tfrac14 \Lambda_i A_i X_{i-1}^{-1} A_i^\top \Lambda_i\bigr), \qquad
    G = (1 + \epsilon) S + \epsilon \operatorname{tr}(S) / n \; I, \quad S = W X_k^{-1} W^\top .

References:
    Fazlyab et al., *Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural Networks*, 2019 (the inequality);
    Xu and Sivaranjani, *ECLipsE*, 2024 (the recursion, with one layer at a time).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from stableopt.certify.program import Node, Program, nested_tensors
from stableopt.certify.publish import matrix_bound, slopes
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_down, round_up
from stableopt.linalg.proved import Array, gamma

__all__ = ["chain_bound", "chain_gram", "find_joint", "multipliers", "semidefinite"]

_EPSILON = 2.0**-20
_U = 2.0**-53
_FLOPS = 4e10
"""Roughly how much the search for multipliers may cost by default."""


def multipliers(weights: Sequence[Tensor], *, steps: int | None = None) -> list[Tensor]:
    r"""Choose diagonal multipliers for a chain of dense layers with slopes in :math:`[0, 1]` between them.

    Each layer starts from the best multiple of the identity, with which the bound is at most the product of the norms. Then the
    bound is improved over all entries by Adam on their logarithms; a step that leaves the feasible set is taken back and halved.

    Args:
        weights: :math:`A_1, \dots, A_k, W`, shapes ``(n_i, n_{i-1})``.
        steps: how many steps of improvement; None: up to 200, fewer for wide chains.

    Returns:
        The diagonals of :math:`\Lambda_1, \dots, \Lambda_k`, positive, float64. Nothing is proved: see :func:`chain_bound`.

    Raises:
        ValueError: if there are fewer than two weights or they do not fit.

    Examples:
        >>> weights = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
        >>> [diagonal] = multipliers(weights)
        >>> 2.0 <= chain_bound(weights, [diagonal]) < 2.01  # the product of the norms is 4
        True
    """
    matrices = _checked(weights)
    inner, last = matrices[:-1], matrices[-1]
    first = inner[0] @ inner[0].T
    logs = _start(first, inner)
    if steps is None:
        steps = max(20, min(200, int(_FLOPS / sum(16.0 * max(a.shape) ** 3 for a in matrices))))
    best, value, rate = logs, math.inf, 0.1
    moved = [log.clone().requires_grad_(True) for log in logs]
    optimizer = torch.optim.Adam(moved, lr=rate, betas=(0.9, 0.99))
    for step in range(steps + 1):
        loss = _log_constant(first, inner, last, moved)
        reached = math.inf if loss is None else float(loss.detach())
        if loss is None or not math.isfinite(reached):
            rate *= 0.5
            moved = [log.clone().requires_grad_(True) for log in best]
            optimizer = torch.optim.Adam(moved, lr=rate, betas=(0.9, 0.99))
            continue
        if reached < value:
            best, value = [log.detach().clone() for log in moved], reached
        for group in optimizer.param_groups:
            group["lr"] = rate * (1.0 - 0.95 * step / max(steps, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [log.exp() for log in best]


def _checked(weights: Sequence[Tensor]) -> list[Tensor]:
    fits = all(a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] for a, b in itertools.pairwise(weights))
    if len(weights) < 2 or not fits:
        raise ValueError(
            f"a chain needs two matrices or more that can be multiplied, got the shapes {[tuple(w.shape) for w in weights]}."
        )
    return [w.detach().to("cpu", torch.float64) for w in weights]


def _start(first: Tensor, inner: Sequence[Tensor]) -> list[Tensor]:
    r"""Return the logarithms of :math:`2/\|A_i X_{i-1}^{-1} A_i^\top\|`, multiples of the identity, one after the other."""
    logs, gram = list[Tensor](), first
    for index in range(len(inner)):
        top = float(torch.linalg.eigvalsh(gram)[-1])
        scale = 2.0 / max(top, 1e-300)
        logs.append(torch.full((len(gram),), math.log(scale), dtype=torch.float64))
        if index + 1 < len(inner):
            reach = scale * torch.eye(len(gram), dtype=torch.float64) - scale**2 / 4.0 * gram
            gram = inner[index + 1] @ torch.linalg.solve(reach, inner[index + 1].T)
    return logs


def _log_constant(first: Tensor, inner: Sequence[Tensor], last: Tensor, logs: Sequence[Tensor]) -> Tensor | None:
    r"""Return :math:`\tfrac12 \log \lambda_{\max}(W X_k^{-1} W^\top)`, or None where a matrix is not positive definite."""
    gram = first
    for log, after in zip(logs, [*inner[1:], last], strict=True):
        diagonal = log.exp()
        factor, failed = torch.linalg.cholesky_ex(torch.diag(diagonal) - diagonal[:, None] * gram * (diagonal / 4.0))
        if int(failed):
            return None
        root = torch.linalg.solve_triangular(factor, after.T, upper=False)
        gram = root.T @ root
    return torch.linalg.eigvalsh(gram)[-1].log() / 2.0


def chain_bound(weights: Sequence[Tensor], diagonals: Sequence[Tensor]) -> float:
    r"""Prove a bound of a chain from its multipliers, by the steps that the verifier repeats.

    Args:
        weights: :math:`A_1, \dots, A_k, W`.
        diagonals: the positive diagonals of :math:`\Lambda_1, \dots, \Lambda_k`.

    Returns:
        The bound with a slack of 1e-9; infinity if the multipliers prove nothing.

    Examples:
        >>> weights = [2 * torch.eye(2), torch.eye(2)]
        >>> chain_bound(weights, [torch.ones(2) / 2]) < 2.00001  # with 2 / ||A||^2 a single layer gets its norm
        True
        >>> chain_bound(weights, [torch.ones(2)])
        inf
    """
    gram = chain_gram(weights, diagonals)
    if gram is None:
        return math.inf
    size = float(np.abs(gram).max())
    top = float(np.linalg.eigvalsh(gram)[-1]) + 1e-10 * size
    for _ in range(8):
        bound = round_up(Fraction(math.sqrt(max(top, 0.0))) * (1 + Fraction(1, 10**9)))
        if semidefinite(round_down(Fraction(bound) ** 2) * np.eye(len(gram)) - gram):
            return bound
        top += 1e-8 * size
    return math.inf


def chain_gram(weights: Sequence[Tensor], diagonals: Sequence[Tensor]) -> Array | None:
    r"""Return :math:`G` for which :math:`(c^\top \delta y)^2 \le c^\top G c \, \|\delta x\|^2` for all :math:`c`, or None.

    The constant of a difference of two outputs is :math:`(G_{ii} + G_{jj} - 2G_{ij})^{1/2}` at most.

    Args:
        weights: as in :func:`chain_bound`.
        diagonals: as in :func:`chain_bound`.

    Examples:
        >>> gram = chain_gram([2 * torch.eye(2), torch.eye(2)], [torch.ones(2) / 2])
        >>> bool((gram.diagonal() >= 4.0).all()), bool(abs(gram[0, 1]) < 1e-5)
        (True, True)
    """
    matrices = [a.numpy() for a in _checked(weights)]
    x: Array = np.eye(matrices[0].shape[1])
    with np.errstate(all="ignore"):
        for a, diagonal in zip(matrices[:-1], diagonals, strict=True):
            scale = diagonal.double().numpy()
            off = a.T * (scale / 2.0)
            after = np.diag(scale) - _inside(x, off)
            after = (1.0 - _EPSILON) * (after + after.T) / 2.0
            if not (scale > 0).all() or not _joined(x, -off, np.diag(scale) - after):
                return None
            x = after
        gram = _inside(x, matrices[-1].T)
        gram = (1.0 + _EPSILON) * (gram + gram.T) / 2.0
        gram = gram + _EPSILON * np.trace(gram) / len(gram) * np.eye(len(gram))  # it may be singular
        return gram if _joined(x, matrices[-1].T, gram) else None


def _inside(x: Array, off: Array) -> Array:
    """Return off^T x^{-1} off; nothing relies on it."""
    try:
        return off.T @ np.linalg.solve(x, off)
    except np.linalg.LinAlgError:
        return np.full((off.shape[1], off.shape[1]), np.nan)


def _joined(first: Array, off: Array, second: Array) -> bool:
    return semidefinite(np.concatenate([np.concatenate([first, off], 1), np.concatenate([off.T, second], 1)], 0))


def semidefinite(matrix: Array) -> bool:
    r"""Return True only if a symmetric matrix is proved positive semidefinite, whatever its entries are within two roundings.

    With :math:`D` a diagonal of powers of two, :math:`M' = DMD` exactly, and any :math:`L`, :math:`M' - cI = LL^\top + E` gives
    :math:`M' \succeq (c - \|E\|) I`. It is semidefinite for all matrices that differ from it by at most :math:`e` if
    :math:`\|E\| + e \le c`; an entry that was rounded twice is off by :math:`2u` of its size.

    Args:
        matrix: exactly symmetric, float64.

    Examples:
        >>> semidefinite(np.eye(2) + 0.999), semidefinite(np.eye(2) - 1.001)
        (True, False)
        >>> semidefinite(np.ones((2, 2)))  # it is, but an entry that was rounded may not be
        False
    """
    n, diagonal = len(matrix), np.diagonal(matrix)
    if not np.isfinite(matrix).all() or not (diagonal > 2.0**-900).all():
        return False
    power = -np.rint(np.log2(diagonal) / 2.0).astype(np.int64)
    m = np.ldexp(matrix, power[:, None] + power[None, :])
    error = _up(float(np.abs(m).sum(axis=1).max()) * (2.0 * _U * (1.0 + 4.0 * gamma(n + 4)))) + n * 2.0**-170
    shift = _up(error + 2.0**-45 * n + 4.0 * n * n * _U)
    moved = m.copy()
    moved[range(n), range(n)] -= shift
    try:
        lower: Array = np.linalg.cholesky(moved).astype(np.float64)
    except np.linalg.LinAlgError:
        return False
    residual = np.abs(moved - lower @ lower.T)
    sums = float(max(residual.sum(axis=0).max(), residual.sum(axis=1).max()))
    rounding = gamma(n) * float(np.square(lower).sum()) + _U * float(np.abs(np.diagonal(moved)).max())
    return (sums + rounding) * (1.0 + 4.0 * gamma(n * n + 8)) + error + 2.0**-900 <= shift


def _up(value: float) -> float:
    return math.nextafter(value, math.inf)


def find_joint(program: Program, *, steps: int | None = None) -> list[Node]:
    r"""Find the chains of dense layers of a published program, and the joint bounds that improve on the products of their norms.

    A chain alternates dense layers with elementwise activations of slopes in :math:`[0, 1]`, and none of its inner values is used
    elsewhere. Two dense layers without anything between them count too: they are bounded by the norm of the product.

    Args:
        program: a program with bounds, in ``"l2"`` or ``"token_max"``; in ``"linf"`` nothing is found.
        steps: as in :func:`multipliers`.

    Returns:
        Entries of a certificate, ``{"nodes": [...], "multipliers": [[...], ...], "bound": ...}`` with floats.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> from stableopt.certify.publish import publish
        >>> graph = Builder((2,))
        >>> weights = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> value = graph.add("linear", graph.input, weight=weights[0], bias=None, transposed=False)
        >>> value = graph.add("linear", value, weight=weights[1], bias=None, transposed=False)
        >>> [(entry["nodes"], round(entry["bound"], 6)) for entry in find_joint(publish(graph.program()))]
        [([0, 1], 2.0)]
    """
    if program.norm == "linf":
        return []
    entries = [_entry(program, nodes, steps) for nodes in _chains(program)]
    return [
        e for e in entries if e["bound"] < 0.999 * math.prod(program.nodes[i].get("bound", 1.0) for i in e["nodes"])
    ]


def _entry(program: Program, nodes: list[int], steps: int | None) -> Node:
    weights = [_matrix(program, i) for i in nodes if program.nodes[i]["op"] == "linear"]
    if len(nodes) == 2:
        return {"nodes": nodes, "multipliers": [], "bound": _product_bound(*weights)}
    diagonals = multipliers(weights, steps=steps)
    return {"nodes": nodes, "multipliers": [d.tolist() for d in diagonals], "bound": chain_bound(weights, diagonals)}


def _product_bound(first: Tensor, second: Tensor) -> float:
    """Bound the norm of a product of two matrices; rounding in it is off by gamma_n ||B||_F ||A||_F at most."""
    a, b = first.double(), second.double()
    rounding = 2.0 * gamma(len(a)) * float(torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b))
    return round_up(Fraction(matrix_bound(b @ a)) + Fraction(rounding) + Fraction(1, 2**1000))


def _matrix(program: Program, index: int) -> Tensor:
    node = program.nodes[index]
    weight = program.tensors[node["weight"]]
    return weight.T if node["transposed"] else weight


def _chains(program: Program) -> list[list[int]]:
    """Return the longest chains [linear, activation, linear, ...] and pairs [linear, linear], disjoint, in order."""
    uses = Counter(value for node in program.nodes for value in node["in"])
    found, taken = list[list[int]](), set[int]()
    for start, node in enumerate(program.nodes):
        if node["op"] != "linear" or start in taken:
            continue
        chain = _grow(program, start, uses)
        if len(chain) > 1:
            found.append(chain)
            taken |= set(chain)
    return found


def _grow(program: Program, start: int, uses: Counter[int]) -> list[int]:
    chain, last = [start], start
    while (after := _follower(program, last, uses)) is not None:
        if program.nodes[after]["op"] == "linear":
            return [start, after] if chain == [start] else chain
        beyond = _follower(program, after, uses) if _monotone(program, program.nodes[after]) else None
        if beyond is None or program.nodes[beyond]["op"] != "linear":
            break
        chain += [after, beyond]
        last = beyond
    return chain


def _follower(program: Program, index: int, uses: Counter[int]) -> int | None:
    """Return the only operation that reads the value of another one, if it reads nothing else."""
    readers = [i for i, node in enumerate(program.nodes) if node["in"] == [index + 1]]
    return readers[0] if len(readers) == 1 and uses[index + 1] == 1 else None


def _monotone(program: Program, node: Node) -> bool:
    """Return whether an operation acts entry by entry with slopes that are proved to lie in [0, 1], whatever the shape."""
    if node["op"] != "activation" or any(name in program.tensors for name in nested_tensors(node)):
        return False
    try:
        low, high = slopes(node, program.tensors, ())
    except UncertifiableError:
        return False
    return low >= 0 and high <= 1
