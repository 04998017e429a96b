"""Tests of stableopt.lyapunov.profile.representations."""
