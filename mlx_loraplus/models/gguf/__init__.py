"""Read GGUF files, convert them into mlx-lm folders, and write them."""
