"""Several examples share a row."""
