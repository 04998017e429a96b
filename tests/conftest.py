"""What every test shares: one thread, float64, a seed, warnings as errors, a derandomised hypothesis, a device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_warn_always(True)  # else some warnings come once a process, and which test fails depends on the order


def pytest_collection_finish() -> None:
    """Tell the garbage collector that what is there now stays: else each collection walks through all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic_float64() -> Iterator[None]:
    """Run each test on one thread, in float64, from the same seed, and leave nothing behind."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # not manual_seed, which formats the stack for devices that are not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine on which the code must be right."""
    return torch.device(request.param)
