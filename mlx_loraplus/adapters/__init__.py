"""The trainable part: adapter layers, attaching them to a model, saving and loading them."""
