"""Tests of stableopt.lyapunov.profile.nonsmooth."""
