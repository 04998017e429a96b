"""Sensitivities of the representations of a model: to one another, and to its parameters."""
