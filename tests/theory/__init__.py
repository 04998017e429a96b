"""Laws of the theory: every limit on both sides and at a witness, every trap as a counterexample."""
