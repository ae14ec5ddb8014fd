"""A search for the rates that suit a model and its data."""
