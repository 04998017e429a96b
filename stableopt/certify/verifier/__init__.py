"""The verifier of certificates, apart from the rest of the package: copy the folder and run it."""

from .checking import ASSUMPTIONS, PREDICATE_TYPE, Result, check, verify
from .command import main
from .files import parse_weights
from .numbers import RejectedError

__all__ = ["ASSUMPTIONS", "PREDICATE_TYPE", "RejectedError", "Result", "check", "main", "parse_weights", "verify"]
