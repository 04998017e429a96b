"""Tests of stableopt.lyapunov.profile.finite."""
