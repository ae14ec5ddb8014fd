"""What leaves the house: fused models."""
