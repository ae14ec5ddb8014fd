"""Find and load a model and its tokenizer by name: short names, hub ids, folders, GGUF files."""
