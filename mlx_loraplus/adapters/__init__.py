"""What is trained: adapter layers, how they are put on a model, and the folder they are kept in."""
