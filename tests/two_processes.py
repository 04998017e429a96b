"""Two processes that run checks together, started once: what they run, what each found, and how they end.

A module of checks has ``CHECKS``, functions by name. Its tests ask ``shared_outcomes`` what both processes found. A script that
both processes run goes through ``in_two_processes``, meets with ``join`` and ends with ``leave``.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 300
"""Seconds after which two processes that have not ended are killed."""


# --- in each of the two processes ---


def join(rank: int | str, store: str) -> None:
    """Meet the other process, on one thread."""
    torch.set_num_threads(1)
    # no backend is named: that of the device is taken
    dist.init_process_group(init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timedelta(seconds=60))


def leave(code: int = 0) -> NoReturn:
    """End the process once the other one has come here too.

    Wrappers of models keep the group of processes alive, with its threads. When an interpreter shuts down with such a wrapper, it
    is undefined whether the threads or what they use goes first, and a process whose work is done may end by ``abort``. So nothing
    is destroyed after the group: the process ends at once.
    """
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(module: str, rank: int, store: str, report: str, *names: str) -> NoReturn:
    """Run checks of a module as one of two processes; ``DTYPE`` of the module is torch's default type of numbers."""
    warnings.simplefilter("ignore")
    join(rank, store)
    checks = importlib.import_module(module)
    dtype = getattr(checks, "DTYPE", torch.get_default_dtype())
    outcomes: dict[str, str] = {}
    for name in names:
        torch.set_default_dtype(dtype)
        try:
            checks.CHECKS[name]()
            outcomes[name] = ""
        except (
            Exception,
            pytest.fail.Exception,
        ):  # the other process goes on with the next check, so this one must as well
            outcomes[name] = traceback.format_exc()
            sys.stdout.write(f"{name}\n{outcomes[name]}")  # to be seen if the processes no longer find to each other
        Path(report).write_text(json.dumps(outcomes))
    leave()


# --- in the test ---


def in_two_processes(code: str, folder: Path, *arguments: str) -> list[str]:
    """Run Python code in two processes, and return what each of them printed.

    The code finds its rank, the place to meet and the arguments in ``sys.argv[1:]``.

    Raises:
        AssertionError: with all that was printed, if one of them ends with an error or does not end.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    printed = [
        folder / f"printed{rank}.txt" for rank in range(2)
    ]  # one who waits for a full pipe to be read stops both
    both = []
    for rank, output in enumerate(printed):
        command = [sys.executable, "-W", "ignore", "-c", code, str(rank), str(folder / "store"), *arguments]
        with output.open("w") as file:
            both.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + TIMEOUT
    while any(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    codes = [process.poll() for process in both]
    for process in both:
        process.kill()
        process.wait()
    texts = [output.read_text(errors="replace") for output in printed]
    assert codes == [0, 0], "\n".join(
        f"process {rank} {'did not end' if code is None else f'ended with {code}'}:\n{_shortened(text)}"
        for rank, (code, text) in enumerate(zip(codes, texts, strict=True))
    )
    return texts


def _shortened(text: str) -> str:
    """Return the beginning, where the first error is, and the end."""
    return text if len(text) <= 8000 else f"{text[:4000]}\n...\n{text[-4000:]}"


def outcomes_of(module: str, names: list[str], folder: Path) -> list[dict[str, str]]:
    """Run checks in two processes, and return what each of them found."""
    code = (
        "import sys; from tests.two_processes import main; rank, store, folder, module, *names = sys.argv[1:]; "
        "main(module, int(rank), store, f'{folder}/report{rank}.json', *names)"
    )
    in_two_processes(code, folder, str(folder), module, *names)
    outcomes = [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(2)]
    assert all(list(outcome) == names for outcome in outcomes), [set(names) - set(outcome) for outcome in outcomes]
    return outcomes


def shared_outcomes(module: str, names: list[str], factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Run the checks once, whichever worker of a parallel test run asks first; the others wait for what it finds."""
    folder = factory.mktemp("processes")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return outcomes_or_failure(module, names, folder)
    which = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    found = factory.getbasetemp().parent / f"{module}-{which}.json"
    try:
        os.close(os.open(found.with_suffix(".lock"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + 3 * TIMEOUT
        while not found.exists():
            assert time.monotonic() < deadline, "the worker that runs the processes has not finished"
            time.sleep(0.2)
        return json.loads(found.read_text())
    outcomes = outcomes_or_failure(module, names, folder)
    found.with_suffix(".part").write_text(json.dumps(outcomes))
    found.with_suffix(".part").replace(found)
    return outcomes


def outcomes_or_failure(module: str, names: list[str], folder: Path) -> list[dict[str, str]]:
    """Run the checks; if the processes fail, every check fails, and the first one says why."""
    try:
        return outcomes_of(module, names, folder)
    except Exception as error:
        return [dict.fromkeys(names, "the processes failed") | {names[0]: f"the processes failed: {error}"}]
