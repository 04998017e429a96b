r"""The small programs that composite operations stand for."""

from __future__ import annotations

from typing import Any

from stableopt.certify.operations import lowering

__all__ = ["adjoint"]

Node = dict[str, Any]


def adjoint(operator: Node) -> Node:
    """Return the adjoint of a dense layer or a convolution, without its bias, with the same weight.

    A convolution whose stride leaves pixels over names them in ``adjoint_padding``, its ``output_padding`` when transposed.

    Examples:
        >>> adjoint({"op": "linear", "weight": "w", "bias": "b", "transposed": False})
        {'op': 'linear', 'weight': 'w', 'bias': None, 'transposed': True}
    """
    turned = operator | {"bias": None, "transposed": not operator["transposed"]}
    if operator["op"] == "conv":
        rest = operator.get("adjoint_padding", [0] * operator["dims"])
        turned["output_padding"] = rest if turned["transposed"] else [0] * operator["dims"]
    return turned


@lowering("euler")
def _euler(node: Node) -> list[Node]:
    """Return c x + K x - A^T (s * sigma(A x + b)) as its steps."""
    operator, steps = node["operator"], node["steps"]
    nodes: list[Node] = [operator | {"in": [0]}, node["activation"] | {"in": [1]}]
    if isinstance(steps, str):
        nodes.append(
            {"op": "affine", "in": [2], "scale": steps, "bias": None, "axis": 0 if operator["op"] == "conv" else -1}
        )
        factor = -1.0
    else:
        factor = -float(steps)
    nodes.append(adjoint(operator) | {"in": [len(nodes)]})
    force = len(nodes)
    if node.get("skew") is not None:
        nodes.append({"op": "linear", "in": [0], "weight": node["skew"], "bias": None, "transposed": False})
        return [*nodes, {"op": "sum", "in": [0, force + 1, force], "factors": [node["decay"], 1.0, factor]}]
    return [*nodes, {"op": "sum", "in": [0, force], "factors": [node["decay"], factor]}]
