"""Plain data for JSON, which has no number for what is not finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """Return dicts, lists, numbers and texts in place of what numpy and tuples have.

    Args:
        value: nested dicts, lists, tuples, arrays and numbers.

    Returns:
        The same; NaN is None, and the infinities are the texts ``"inf"`` and ``"-inf"``: what is not known and what is infinite
        are not the same.

    Examples:
        >>> plain({"log": np.array([0.5, -np.inf]), 1: (np.nan, np.int64(2))})
        {'log': [0.5, '-inf'], '1': [None, 2]}
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
