"""Perturbations of parameters and optimizer state, pushed through the steps of a training."""
