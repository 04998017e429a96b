"""Stability-constrained training for torch: enforced while training, measured, and proved in a file that anyone can check.

The names that most programs need are here; each room has more: :mod:`stableopt.linalg` (numbers with a guarantee),
:mod:`stableopt.theory` (the laws), :mod:`stableopt.constraints`, :mod:`stableopt.nn`, :mod:`stableopt.optim`,
:mod:`stableopt.lyapunov` (the monitor and the profile) and :mod:`stableopt.certify`.

Note:
    ``stableopt.certify`` is the function; the room of that name is imported with ``from stableopt.certify import …``.

Examples:
    >>> import torch, stableopt as so
    >>> model = so.stabilize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
    >>> so.certify(model.eval(), input_shape=(4,)).lipschitz <= 1.0
    True
"""

from stableopt import constraints, linalg, lyapunov, nn, optim, theory
from stableopt._version import __version__
from stableopt.certify import Certificate, certify, load
from stableopt.certify.verifier import verify
from stableopt.errors import CertificateError, InfeasibleError, StabilityError, StableoptError, UncertifiableError
from stableopt.linalg import Bound
from stableopt.lyapunov import Monitor, Profile
from stableopt.lyapunov.profile import profile
from stableopt.nn import constrain, lipschitz, parameter_groups, stabilize

__all__ = [
    "Bound",
    "Certificate",
    "CertificateError",
    "InfeasibleError",
    "Monitor",
    "Profile",
    "StabilityError",
    "StableoptError",
    "UncertifiableError",
    "__version__",
    "certify",
    "constrain",
    "constraints",
    "linalg",
    "lipschitz",
    "load",
    "lyapunov",
    "nn",
    "optim",
    "parameter_groups",
    "profile",
    "stabilize",
    "theory",
    "verify",
]
