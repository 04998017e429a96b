"""What the growth of perturbations says: windows, exponents, verdicts, energies and gains, from numbers alone."""
