"""The learning stability profile: how perturbations of a learning system grow along training."""
