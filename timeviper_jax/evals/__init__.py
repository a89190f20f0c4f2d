"""What a checkpoint is scored on."""
