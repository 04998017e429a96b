"""Weights as the bytes of a safetensors file, and back; whether this machine can check proofs."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from stableopt.certify.verifier import parse_weights
from stableopt.certify.verifier.checking import self_test
from stableopt.errors import CertificateError
from stableopt.files import encode_safetensors

__all__ = ["check_machine", "decode_weights", "encode_weights"]

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def encode_weights(tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of a safetensors file: the same tensors always give the same bytes.

    Args:
        tensors: named floating tensors on the CPU.

    Examples:
        >>> data = encode_weights({"w": torch.tensor([1.0, 2.0])})
        >>> decode_weights(data)["w"]
        tensor([1., 2.])
    """
    arrays = {}
    for name, tensor in tensors.items():
        value = tensor.contiguous()
        bits = {8: (torch.int64, "<i8"), 4: (torch.int32, "<i4"), 2: (torch.int16, "<i2")}[value.element_size()]
        chunk = value.view(bits[0]).numpy().astype(bits[1]).tobytes()
        arrays[name] = _NAMES[value.dtype], value.shape, chunk
    return encode_safetensors(arrays)


def decode_weights(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, bit for bit, in their stored dtypes.

    Raises:
        RejectedError: if the file is malformed.

    Examples:
        >>> decode_weights(encode_weights({"b": torch.ones(1, dtype=torch.bfloat16)}))["b"].dtype
        torch.bfloat16
    """
    tensors = {}
    for name, (kind, shape, chunk) in parse_weights(data).items():
        dtype = _DTYPES[kind]
        code, bits = {8: ("<i8", np.int64), 4: ("<i4", np.int32), 2: ("<i2", np.int16)}[dtype.itemsize]
        tensors[name] = torch.from_numpy(np.frombuffer(chunk, code).astype(bits)).view(dtype).reshape(shape)
    return tensors


@functools.cache
def check_machine() -> None:
    """Spot-check, once in a process, what the proofs assume of the arithmetic of this machine.

    Raises:
        CertificateError: if it is not so.

    Examples:
        >>> check_machine()
    """
    try:
        self_test(np.matmul)
    except OSError as error:
        raise CertificateError(f"{error}.") from None
