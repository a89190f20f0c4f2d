"""Names of published checkpoints, and how they map to ours."""
