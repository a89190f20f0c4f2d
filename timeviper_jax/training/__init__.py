"""Loss, optimizer, train step, checkpoints, metrics."""
