"""Read rows from files, render them to tokens, and lay them out in batches."""
