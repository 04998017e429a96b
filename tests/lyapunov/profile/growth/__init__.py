"""Tests of stableopt.lyapunov.profile.growth."""
