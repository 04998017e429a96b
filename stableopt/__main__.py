"""Run the command line with ``python -m stableopt``."""

from stableopt.cli import main

if __name__ == "__main__":
    main()
