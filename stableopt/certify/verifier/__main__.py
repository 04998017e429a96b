"""Run the verifier: ``python -m stableopt.certify.verifier model.cert.json``."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
