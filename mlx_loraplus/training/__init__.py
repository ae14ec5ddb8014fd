"""Batches become an adapter: the optimizer, the loss, the loop, and the run's record."""
