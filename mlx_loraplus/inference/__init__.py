"""Generate answers and chat with a model."""
