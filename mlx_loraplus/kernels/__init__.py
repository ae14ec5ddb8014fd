"""Kernels that make a training step fast and small: attention, gated MLPs, head and loss."""
