"""The Learning Stability Profile: how perturbations of a learning system grow along training, and how well that is known."""

from __future__ import annotations

from stableopt.lyapunov.profile.clarke import ClarkeReading, clarke_bounds, update_reach
from stableopt.lyapunov.profile.data import DataSensitivity, replace_one
from stableopt.lyapunov.profile.depth import DepthGrowth, ForwardProfile
from stableopt.lyapunov.profile.energies import EnergyCheck, EnergySynthesis, synthesize
from stableopt.lyapunov.profile.exponents import Exponent, exponent, mean_square_exponent, spectrum
from stableopt.lyapunov.profile.factors import Factors
from stableopt.lyapunov.profile.forward import forward_profile, growth_along
from stableopt.lyapunov.profile.gains import CoupledGains, GainCheck, coupled_gains
from stableopt.lyapunov.profile.identities import IdentityCheck, check_identities
from stableopt.lyapunov.profile.limit import LimitStudy, limit_study
from stableopt.lyapunov.profile.looks import Look
from stableopt.lyapunov.profile.mixed import RepresentationTangents, representation_tangents
from stableopt.lyapunov.profile.offline import profile, profile_ensemble
from stableopt.lyapunov.profile.push import Pushed, push, tangent_names
from stableopt.lyapunov.profile.reading import FiniteSize, ProfileReading
from stableopt.lyapunov.profile.responses import ErrorResponses, HyperResponse
from stableopt.lyapunov.profile.studies import StepStudy, depth_study, lr_study
from stableopt.lyapunov.profile.training import Profile
from stableopt.lyapunov.profile.twin import Twin
from stableopt.lyapunov.profile.verdicts import Verdict, judge
from stableopt.lyapunov.profile.windows import Windows, measure_windows

__all__ = [
    "ClarkeReading",
    "CoupledGains",
    "DataSensitivity",
    "DepthGrowth",
    "EnergyCheck",
    "EnergySynthesis",
    "ErrorResponses",
    "Exponent",
    "Factors",
    "FiniteSize",
    "ForwardProfile",
    "GainCheck",
    "HyperResponse",
    "IdentityCheck",
    "LimitStudy",
    "Look",
    "Profile",
    "ProfileReading",
    "Pushed",
    "RepresentationTangents",
    "StepStudy",
    "Twin",
    "Verdict",
    "Windows",
    "check_identities",
    "clarke_bounds",
    "coupled_gains",
    "depth_study",
    "exponent",
    "forward_profile",
    "growth_along",
    "judge",
    "limit_study",
    "lr_study",
    "mean_square_exponent",
    "measure_windows",
    "profile",
    "profile_ensemble",
    "push",
    "replace_one",
    "representation_tangents",
    "spectrum",
    "synthesize",
    "tangent_names",
    "update_reach",
]
