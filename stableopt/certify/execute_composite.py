r"""What the small programs of composite operations share."""

from __future__ import annotations

from typing import Any

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
