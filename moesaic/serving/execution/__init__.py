"""One step of a model over a paged key-value cache, on any number of ranks."""
