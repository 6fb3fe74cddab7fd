"""One file for each metric of `bifrost eval`."""
