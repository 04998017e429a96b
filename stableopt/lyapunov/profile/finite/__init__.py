"""Perturbations of a finite size: a second run beside the first."""
