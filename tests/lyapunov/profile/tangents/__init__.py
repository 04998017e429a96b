"""Tests of stableopt.lyapunov.profile.tangents."""
