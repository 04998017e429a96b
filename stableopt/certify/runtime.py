r"""The arithmetic that a network is run in: its formats, and the flags of the process that decide which one torch uses."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from stableopt.errors import CertificateError

__all__ = ["RUNTIMES", "Format", "Runtime", "check", "current", "find_runtime", "require"]


@dataclass(frozen=True)
class Format:
    r"""A floating-point format: a number :math:`x` is stored as one within :math:`u|x| + t` of it.

    Args:
        unit: :math:`u`, half the distance of the numbers above 1 when rounding to nearest, the whole distance otherwise.
        tiny: :math:`t`; the smallest normal number where small numbers may be flushed to zero.
        largest: the largest finite number.

    Examples:
        >>> RUNTIMES["float32"].wide
        Format(unit=5.960464477539063e-08, tiny=1.1754943508222875e-38, largest=3.4028234663852886e+38)
    """

    unit: float
    tiny: float
    largest: float

    def __or__(self, other: Format) -> Format:
        """Return what covers both formats."""
        return Format(max(self.unit, other.unit), max(self.tiny, other.tiny), min(self.largest, other.largest))


@dataclass(frozen=True)
class Runtime:
    r"""How a network is run: every number is stored in one format, and products may use another.

    A matrix product rounds its operands to the format ``operands``, sums the products in any order and with or without fused
    multiply-add, each addition within ``sums`` (relative to its result), and stores the result in the format ``results``. All
    other operations are computed in ``wide``, and stored in the format of their input.

    Args:
        name: what to call it.
        dtype: dtype of the parameters and of the inputs.
        wide: format of the dtype.
        operands: format of the operands of a product.
        sums: unit roundoff of the sums of a product.
        results: format of the results of a product.
        autocast: the dtype of :class:`torch.autocast`, None without.
        device: the type of the device, ``"cpu"`` or ``"cuda"``.

    Examples:
        >>> RUNTIMES["bfloat16"].results.unit == 2.0**-8
        True
    """

    name: str
    dtype: torch.dtype
    wide: Format
    operands: Format
    sums: float
    results: Format
    autocast: torch.dtype | None = None
    device: str = "cpu"

    def on(self, device: str) -> Runtime:
        """Return the same arithmetic on another kind of device.

        The matrix units of a GPU add the products of half precision with truncation, in float32 with a few bits aligned to the
        largest: a unit roundoff of 2^-22 for the sums covers them.

        Raises:
            ValueError: for another device than ``"cpu"`` and ``"cuda"``.

        Examples:
            >>> RUNTIMES["float16"].on("cuda").sums == 2.0**-22
            True
        """
        if device not in {"cpu", "cuda"}:
            raise ValueError(f"a runtime is known for 'cpu' and 'cuda', got {device!r}.")
        coarse = device == "cuda" and self.operands != self.wide
        return dataclasses.replace(self, device=device, sums=max(self.sums, 2.0**-22) if coarse else self.sums)

    def record(self) -> dict[str, Any]:
        """Return what a certificate says about the runtime: its numbers as hexadecimal floats, and the flags that it needs.

        Examples:
            >>> record = RUNTIMES["bfloat16"].record()
            >>> record["name"], record["u_in"], record["requires"]["half sums"]
            ('bfloat16', '0x1.0000000000000p-8', ['float32'])
        """
        numbers = {"u": self.wide.unit, "u_in": self.operands.unit, "u_acc": self.sums, "u_out": self.results.unit}
        numbers |= {"tiny": self.results.tiny, "largest": self.results.largest}
        words = {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "device": self.device}
        words |= {"autocast": "off" if self.autocast is None else str(self.autocast).removeprefix("torch.")}
        words |= {"products": "plain sums in any order", "convolutions": "as matrix products"}
        requires = {flag: list(values) for flag, values in self.limits().items()}
        return words | {key: value.hex() for key, value in numbers.items()} | {"requires": requires}

    def limits(self) -> dict[str, tuple[str, ...]]:
        """Return which values of the flags of :func:`current` are within this runtime.

        Examples:
            >>> RUNTIMES["bfloat16"].limits()
            {'float32 products': ('ieee',), 'emulation': ('off',), 'half sums': ('float32',)}
        """
        if self.dtype == torch.float64:
            return {"emulation": ("off",)}
        rest = {"emulation": ("off",)} | ({} if self.autocast is None else {"half sums": ("float32",)})
        return {"float32 products": ("ieee", "tf32") if self.name == "tf32" else ("ieee",)} | rest


_DOUBLE = Format(2.0**-53, 2.0**-1022, torch.finfo(torch.float64).max)
_SINGLE = Format(2.0**-24, 2.0**-126, torch.finfo(torch.float32).max)
_TF32 = Format(2.0**-10, 2.0**-126, torch.finfo(torch.float32).max)  # truncated by the hardware, not rounded to nearest
_HALF = Format(2.0**-11, 2.0**-24, 65504.0)  # its small numbers are not flushed
_BRAIN = Format(2.0**-8, 2.0**-126, torch.finfo(torch.bfloat16).max)

RUNTIMES: dict[str, Runtime] = {
    "float64": Runtime("float64", torch.float64, _DOUBLE, _DOUBLE, _DOUBLE.unit, _DOUBLE),
    "float32": Runtime("float32", torch.float32, _SINGLE, _SINGLE, _SINGLE.unit, _SINGLE),
    "tf32": Runtime("tf32", torch.float32, _SINGLE, _TF32, 2.0**-22, _SINGLE),
    "float16": Runtime("float16", torch.float32, _SINGLE, _HALF, _SINGLE.unit, _HALF, torch.float16),
    "bfloat16": Runtime("bfloat16", torch.float32, _SINGLE, _BRAIN, _SINGLE.unit, _BRAIN, torch.bfloat16),
}
"""The runtimes that radii can be computed for, by name; half precision is that of :class:`torch.autocast`."""


def find_runtime(runtime: str | Runtime) -> Runtime:
    """Return a runtime by its name.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> find_runtime("float32").dtype
        torch.float32
    """
    if isinstance(runtime, Runtime):
        return runtime
    if runtime not in RUNTIMES:
        raise ValueError(f"the runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}.")
    return RUNTIMES[runtime]


def current(device: str = "cpu") -> dict[str, str]:
    """Read the flags of this process that decide about its arithmetic.

    Args:
        device: the type of the device that products run on.

    Returns:
        ``"float32 products"``: ``"ieee"``, ``"tf32"`` or ``"bf16"``, the coarsest format that a flag allows for their operands;
        ``"half sums"``: the format that sums of half precision may be kept in; ``"emulation"`` of float32 and float64 by other
        formats; and what no radius depends on: the autocast around the call, the default dtype and whether small numbers are
        flushed to zero.

    Examples:
        >>> current()["float32 products"]
        'ieee'
    """
    words = _cuda_precision() if device == "cuda" else _cpu_precision()
    coarsest = next((name for name in ("bf16", "tf32") if name in words), "ieee")
    return {
        "float32 products": coarsest,
        "half sums": "half" if _reduced_sums(device) else "float32",
        "emulation": "on" if any(_is_set(name) for name in _EMULATION) else "off",
        "autocast": "on" if torch.is_autocast_enabled(device) else "off",
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "small numbers": "kept"
        if bool(torch.full((8,), 2.0**-1022, dtype=torch.float64).mul(0.5).all())
        else "flushed",
    }


def check(runtime: Runtime, device: str = "cpu") -> list[str]:
    """Say in what the arithmetic of this process goes beyond a runtime; an empty list if it is within it.

    Args:
        runtime: the runtime wanted.
        device: the type of the device that products run on.

    Examples:
        >>> check(RUNTIMES["float32"]), check(RUNTIMES["float32"], "cuda")
        ([], ["the runtime is for 'cpu', not for 'cuda'"])
    """
    if device != runtime.device:
        return [f"the runtime is for '{runtime.device}', not for '{device}'"]
    found = current(device)
    return [
        f"{flag}: this process has '{found[flag]}', the runtime {runtime.name} allows {' and '.join(map(repr, allowed))}"
        for flag, allowed in runtime.limits().items()
        if found[flag] not in allowed
    ]


_EMULATION = ("CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION", "CUBLAS_EMULATION_STRATEGY")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in {"", "0"}


def _cpu_precision() -> set[str]:
    """Read what oneDNN may compute a float32 product in; the flags of both generations count."""
    backends: Any = torch.backends
    words = {_word(backends.mkldnn.matmul, "fp32_precision"), _word(backends.mkldnn.conv, "fp32_precision")}
    words |= {_word(backends.mkldnn, "fp32_precision"), _word(backends, "fp32_precision")}
    return words | {_older_word()}


def _cuda_precision() -> set[str]:
    backends: Any = torch.backends
    words = {_word(backends.cuda.matmul, "fp32_precision"), _word(backends, "fp32_precision")}
    return words | {_older_word()}


def _older_word() -> str:
    """Read the older flag; torch refuses to, once the newer flags differ from it, and then those alone count."""
    try:
        return {"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "ieee")
    except RuntimeError:
        return "none"


def _word(owner: Any, name: str) -> str:
    return str(getattr(owner, name, "none"))


def _reduced_sums(device: str) -> bool:
    """Return whether sums of half precision may be kept in half precision; what a version does not have is off."""
    if device == "cpu":
        cpu: Any = getattr(torch.backends, "cpu", None)
        return bool(getattr(cpu, "allow_fp16_reduced_precision_reduction", False))
    matmul: Any = torch.backends.cuda.matmul
    names = (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
    values = [getattr(matmul, name, False) for name in names]
    return any(bool(value[0] if isinstance(value, tuple) else value) for value in values)


def require(runtime: Runtime, device: str) -> None:
    """Refuse a process whose arithmetic is not that of the runtime.

    Raises:
        CertificateError: if it is not; the message says in what it differs.

    Examples:
        >>> require(RUNTIMES["float32"], "cpu")
    """
    if differences := check(runtime, device):
        raise CertificateError(f"this process does not run in {runtime.name}: {'; '.join(differences)}.")
