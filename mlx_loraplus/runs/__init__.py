"""What a run leaves and shows: history, report, plots, trackers, and runs side by side."""
