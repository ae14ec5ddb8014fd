"""Files become batches: rows are read, rendered to tokens with their supervised positions, and laid out in batches."""
