"""Studies of a learning system: steps to zero, identities, and one sample replaced."""
