"""The command line ``stableopt``; it needs the extra ``cli``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install.

    Examples:
        >>> import sys
        >>> sys.argv = ["stableopt", "--version"]
        >>> main()
        Traceback (most recent call last):
        SystemExit: 0
    """
    try:
        from stableopt.cli.app import run
    except ModuleNotFoundError as error:
        print(f"error: the command line needs '{error.name}': pip install 'stableopt[cli]'", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    run()
