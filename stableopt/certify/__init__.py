"""Certificates: proved bounds of a network, radii that hold in floating point, and a verifier that stands alone.

:func:`certify` makes a certificate, :meth:`Certificate.save` writes it, :func:`stableopt.verify` and ``stableopt verify`` prove it
again, and :func:`write_verifier` writes the verifier as one file that needs numpy only.
"""

from stableopt.certify.attested import attest_run
from stableopt.certify.audit import Audit, Finding, audit
from stableopt.certify.certificate import Certificate, load
from stableopt.certify.deployed import CertifiedModel, Prediction
from stableopt.certify.evaluation import CertifiedAccuracy, certified_accuracy
from stableopt.certify.fold import fold
from stableopt.certify.produce import certify
from stableopt.certify.standalone import write_verifier

__all__ = [
    "Audit",
    "Certificate",
    "CertifiedAccuracy",
    "CertifiedModel",
    "Finding",
    "Prediction",
    "attest_run",
    "audit",
    "certified_accuracy",
    "certify",
    "fold",
    "load",
    "write_verifier",
]
