"""Predict whether a run fits: shapes of the model, memory of a step, and the plan for a machine."""
