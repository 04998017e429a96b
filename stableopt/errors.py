"""The exceptions of the package.

A wrong argument raises the built-in :class:`ValueError` or :class:`TypeError`. The classes here are for statements about
stability that do not hold, cannot be proved, or cannot be trusted. Every message says what was expected, what was found,
where, and what to do.
"""

from __future__ import annotations

__all__ = ["CertificateError", "InfeasibleError", "StabilityError", "StableoptError", "UncertifiableError"]


class StableoptError(Exception):
    """Base class of every exception that is particular to this package.

    Examples:
        >>> issubclass(UncertifiableError, StableoptError)
        True
    """


class StabilityError(StableoptError):
    """A stability condition is violated: a step beyond its limit, an energy that rises, a run that diverges.

    Examples:
        >>> raise StabilityError("step 0.50 exceeds the limit 0.31 of block 'layers.3'.")
        Traceback (most recent call last):
        stableopt.errors.StabilityError: step 0.50 exceeds the limit 0.31 of block 'layers.3'.
    """


class InfeasibleError(StableoptError):
    """A value does not lie in the set that constrains it, and cannot be moved there.

    Examples:
        >>> issubclass(InfeasibleError, StableoptError)
        True
    """


class UncertifiableError(StableoptError):
    """No proved bound is known for a module, an activation or an option of a layer.

    Examples:
        >>> issubclass(UncertifiableError, StableoptError)
        True
    """


class CertificateError(StableoptError):
    """A certificate file is malformed, does not belong to its weights, or claims what cannot be proved.

    Examples:
        >>> issubclass(CertificateError, StableoptError)
        True
    """
