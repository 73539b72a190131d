"""Order and parallelism of the stages, and the command line."""
