"""Stability-constrained training for torch."""
