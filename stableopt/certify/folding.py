r"""Normalizations joined with the weight before them.

.. math:: s \odot (Wx + b) + t = (\operatorname{diag}(s)\, W)\, x + (s \odot b + t), \qquad
    \|\operatorname{diag}(s)\, W\| \le \max_i |s_i| \, \|W\|

The bound of the joint operation is never above the product of the two, and often far below: a normalization divides channels by
what the weight makes large.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from stableopt.certify.program import Node, Program
from stableopt.errors import UncertifiableError

__all__ = ["fold_affine", "with_nodes"]


def fold_affine(program: Program) -> Program:
    """Join each ``affine`` with the ``linear`` or ``conv`` before it, if nothing else reads that value.

    Args:
        program: the program; it is not changed.

    Returns:
        A program that computes the same function up to the rounding of the new weights, which are computed in float64 and stored in
        the dtype of the old ones, under the name ``folded_weight``.

    Raises:
        UncertifiableError: if a new weight overflows its dtype.

    Examples:
        >>> import torch
        >>> from stableopt.certify.program import Builder
        >>> graph = Builder((2,))
        >>> value = graph.add("linear", graph.input, weight=torch.eye(2), bias=None, transposed=False)
        >>> _ = graph.add("affine", value, scale=torch.tensor([2.0, 3.0]), bias=torch.ones(2), axis=-1)
        >>> joined = fold_affine(graph.program())
        >>> [node["op"] for node in joined.nodes], joined.tensors["0.folded_weight"].diag().tolist()
        (['linear'], [2.0, 3.0])
    """
    users = Counter(number for node in program.nodes for number in node["in"])
    tensors, nodes = dict(program.tensors), list[Node]()
    place = {0: 0}
    """The new number of each value."""
    joined: set[int] = set()
    for index, node in enumerate(program.nodes):
        node: Node = node | {"in": [place[number] for number in node["in"]]}  # noqa: PLW2901
        before = nodes[node["in"][0] - 1] if node["in"][0] else {"op": "input"}
        if node["op"] == "affine" and users[program.nodes[index]["in"][0]] == 1 and _fits(before, node["axis"]):
            nodes[node["in"][0] - 1] = _joined(before, node, tensors)
            place[index + 1] = node["in"][0]
            joined |= {index + 1, program.nodes[index]["in"][0]}
        else:
            nodes.append(node)
            place[index + 1] = len(nodes)
    return with_nodes(program, nodes, tensors, {old: new for old, new in place.items() if old not in joined})


def _fits(node: Node, axis: int | None) -> bool:
    return (node["op"] == "linear" and axis == -1) or (node["op"] == "conv" and axis == 0)


def _joined(node: Node, affine: Node, tensors: dict[str, Tensor]) -> Node:
    weight, name = tensors.pop(node["weight"]), node["weight"]
    bias, scale, shift = (
        None if key is None else tensors.pop(key) for key in (node["bias"], affine["scale"], affine["bias"])
    )
    if scale is not None:
        weight = (weight.double() * _along_outputs(node, weight, scale.double())).to(weight.dtype)
        name = _renamed(name)
    tensors[name] = weight
    node = node | {"weight": name}
    offset = [part for part in (_scaled(bias, scale), None if shift is None else shift.double()) if part is not None]
    if offset:
        node["bias"] = _renamed(f"{name.rpartition('.')[0]}.bias")
        tensors[node["bias"]] = sum(offset[1:], offset[0]).to(weight.dtype)
    new = [tensors[node[key]] for key in ("weight", "bias") if node[key] is not None]
    if not all(bool(tensor.isfinite().all()) for tensor in new):
        raise UncertifiableError(
            f"'{name}' overflows {weight.dtype} when it is joined with the normalization after it."
        )
    return node


def _renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.folded_{last}"


def _scaled(bias: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return bias.double() if scale is None else bias.double() * scale.double()


def _along_outputs(node: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Return one factor per output in a shape that broadcasts against the weight."""
    if node["op"] == "linear":
        return scale if node["transposed"] else scale[:, None]
    ones = [1] * node["dims"]
    if not node["transposed"]:
        return scale.reshape(-1, 1, *ones)
    grouped = scale.reshape(
        node["groups"], 1, -1, *ones
    )  # the weight of a transposed one has the shape (in, out / groups, ...)
    return grouped.expand(-1, len(weight) // node["groups"], *[-1] * (1 + node["dims"])).flatten(0, 1)


def with_nodes(
    program: Program, nodes: Sequence[Node], tensors: dict[str, Tensor], place: Mapping[int, int]
) -> Program:
    """Return a program with other operations; what it says about some of them together is dropped where one is no more.

    Args:
        program: the program whose shape, norm and joint bounds are kept.
        nodes: the new operations.
        tensors: the new tensors.
        place: the new number of each value that is still computed in the same way.

    Examples:
        >>> program = Program(({"op": "scale", "in": [0], "factor": 2.0},), {}, (1,))
        >>> with_nodes(program, [], {}, {0: 0}).nodes
        ()
    """
    changed: dict[str, Any] = {"nodes": tuple(nodes), "tensors": tensors}
    joint = getattr(program, "joint", None)
    if joint:
        kept = [entry for entry in joint if all(index + 1 in place for index in entry["nodes"])]
        changed["joint"] = [entry | {"nodes": [place[i + 1] - 1 for i in entry["nodes"]]} for entry in kept]
    return replace(program, **changed)
