"""What a run leaves, and where it comes from."""
