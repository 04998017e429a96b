"""Independent truths: exact rational arithmetic, dense operator matrices, files that are tampered with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from stableopt.certify import Certificate
from stableopt.certify.verifier import Result, check


def norm_is_at_most(A: np.ndarray, limit: Fraction) -> bool:
    """Decide ||A||_2 <= limit exactly: limit^2 I - A^T A is positive semidefinite, by rational elimination."""
    a = [[Fraction(float(v)) for v in row] for row in (A if A.shape[0] >= A.shape[1] else A.T)]
    n = len(a[0])
    S = [[limit**2 * (i == j) - sum(row[i] * row[j] for row in a) for j in range(n)] for i in range(n)]
    for k in range(n):
        if S[k][k] < 0 or (S[k][k] == 0 and any(S[k][j] for j in range(k, n))):
            return False
        for i in range(k + 1, n):
            if S[k][k] and S[i][k]:
                factor = S[i][k] / S[k][k]
                for j in range(k, n):
                    S[i][j] -= factor * S[k][j]
    return True


def operator_matrix(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of the linear part of a layer, column by column, in float64."""
    size = int(np.prod(shape))
    with torch.no_grad():
        columns = layer(torch.eye(size).reshape(size, *shape)) - layer(torch.zeros(1, *shape))
    return columns.flatten(1).T.numpy()


def statement(cert: Certificate) -> dict[str, Any]:
    return json.loads(cert.certificate)


def recheck(cert: Certificate, edit: Callable[[dict[str, Any]], None], weights: bytes | None = None) -> Result:
    """Check an edited certificate; with new weights the digest is corrected first."""
    document, data = statement(cert), cert.weights if weights is None else weights
    document["subject"][0]["digest"]["sha256"] = hashlib.sha256(data).hexdigest()
    edit(document)
    return check(json.dumps(document).encode(), lambda _: data)


def lowered(text: str, relative: float = 1e-8) -> str:
    return (float.fromhex(text) * (1.0 - relative)).hex()
