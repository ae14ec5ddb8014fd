"""What leaves the house: fused models, and adapters for other programs."""
