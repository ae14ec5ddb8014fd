"""GGUF files: read, converted into mlx-lm folders, and written."""
