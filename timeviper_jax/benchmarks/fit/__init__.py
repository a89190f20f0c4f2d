"""Whether a training step fits chips that are not there; see `__main__`."""
