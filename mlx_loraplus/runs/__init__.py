"""What a run records and shows: history, report, plots, trackers, and comparisons of runs."""
