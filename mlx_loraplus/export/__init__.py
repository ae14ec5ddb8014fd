"""Write fused models, and adapters in the formats of other programs."""
