"""Certificates: a proved Lipschitz bound of a network, certified radii, and a stand-alone verifier of the two files.

:func:`certify` makes a certificate, :meth:`Certificate.save` writes it, ``verify.py`` (one file, numpy only) checks it.
"""

from stableopt.certify.certificate import Certificate, load
from stableopt.certify.fold import fold
from stableopt.certify.produce import certify

__all__ = ["Certificate", "certify", "fold", "load"]
