"""A model at work: generate and chat."""
