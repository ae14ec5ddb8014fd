"""Kernels that make a training step fast and small: attention, gated MLPs, the head and its loss."""
