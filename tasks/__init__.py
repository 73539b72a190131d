"""One module a stage: read, compute, write."""
