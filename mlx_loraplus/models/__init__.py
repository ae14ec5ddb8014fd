"""A name becomes a model and its tokenizer: names, the hub, folders and GGUF files."""
