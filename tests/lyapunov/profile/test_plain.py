"""Plain data for JSON."""

import json
import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.plain import plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float64(-np.inf), "-inf"),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(-np.inf), "-inf"),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (np.array([1, 2]), [1, 2]),
        ((1, (2.0, math.inf)), [1, [2.0, "inf"]]),
        ({1: {0.5: (math.nan,)}}, {"1": {"0.5": [None]}}),
        ("text", "text"),
        (True, True),
        (None, None),
    ],
)
def test_what_json_has_no_number_for_is_a_text_or_nothing(value, expected):
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == expected
