"""Kinks: the set of derivatives that a piecewise linear model has, and bounds for all of it."""
