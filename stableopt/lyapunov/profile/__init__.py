"""The Learning Stability Profile: how perturbations of a learning system grow along training, and how well that is known."""

from __future__ import annotations

from stableopt.lyapunov.profile.finite.twin import Twin
from stableopt.lyapunov.profile.growth.energies import EnergyCheck, EnergySynthesis, synthesize
from stableopt.lyapunov.profile.growth.exponents import Exponent, exponent, mean_square_exponent, spectrum
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.gains import CoupledGains, GainCheck, coupled_gains
from stableopt.lyapunov.profile.growth.verdicts import Verdict, judge
from stableopt.lyapunov.profile.growth.windows import Windows, measure_windows
from stableopt.lyapunov.profile.nonsmooth.clarke import ClarkeReading, clarke_bounds, update_reach
from stableopt.lyapunov.profile.offline import profile, profile_ensemble
from stableopt.lyapunov.profile.reading import FiniteSize, ProfileReading
from stableopt.lyapunov.profile.representations.depth import DepthGrowth, ForwardProfile
from stableopt.lyapunov.profile.representations.forward import forward_profile, growth_along
from stableopt.lyapunov.profile.representations.looks import Look
from stableopt.lyapunov.profile.representations.mixed import RepresentationTangents, representation_tangents
from stableopt.lyapunov.profile.studies.data import DataSensitivity, replace_one
from stableopt.lyapunov.profile.studies.identities import IdentityCheck, check_identities
from stableopt.lyapunov.profile.studies.limit import LimitStudy, limit_study
from stableopt.lyapunov.profile.studies.steps import StepStudy, depth_study, lr_study
from stableopt.lyapunov.profile.tangents.push import Pushed, push, tangent_names
from stableopt.lyapunov.profile.tangents.responses import ErrorResponses, HyperResponse
from stableopt.lyapunov.profile.training import Profile

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
