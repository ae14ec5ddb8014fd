"""Kernels that save time and memory in a training step: attention, gated MLPs, head and loss."""
