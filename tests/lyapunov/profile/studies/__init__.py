"""Tests of stableopt.lyapunov.profile.studies.steps."""
