"""Will it fit: a model's shapes, a step's memory, and the plan for a machine."""
