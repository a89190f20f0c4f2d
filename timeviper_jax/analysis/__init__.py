"""What happens inside a checkpoint: maps of its layers, and how information flows."""
