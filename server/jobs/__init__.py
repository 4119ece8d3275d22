"""Long work: accepted on disk, run in order, outlives the process."""
