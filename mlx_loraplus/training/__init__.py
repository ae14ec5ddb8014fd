"""Training: the optimizer, the loss, the loop, and the run's record."""
