"""The command line: ``python verify_stableopt.pyz model.cert.json [--exact] [--replay data.npz] [--json]``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from .checking import verify

__all__ = ["main"]

_USAGE = "usage: verify model.cert.json [--exact] [--replay data.npz] [--json]\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 verified, 1 rejected, 2 error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {word for word in words if word in {"--json", "--exact"}}
    words = [word for word in words if word not in flags]
    data = None
    if "--replay" in words[:-1]:
        place = words.index("--replay")
        data = words[place + 1]
        del words[place : place + 2]
    if len(words) != 1 or words[0].startswith("-"):
        sys.stderr.write(_USAGE)
        return 2
    try:
        result = verify(words[0], exact="--exact" in flags, data=data)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if "--json" in flags:
        sys.stdout.write(json.dumps(asdict(result), indent=1) + "\n")
    elif result.verified:
        last = f"verified: Lipschitz constant in {result.norm} <= {result.lipschitz!r}"
        sys.stdout.write("\n".join([*result.assumptions, *result.layers, last, *result.replayed]) + "\n")
    else:
        sys.stdout.write(f"rejected: {result.reason}\n")
    return 0 if result.verified else 1
