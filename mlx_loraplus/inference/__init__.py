"""Use a model: generate and chat."""
