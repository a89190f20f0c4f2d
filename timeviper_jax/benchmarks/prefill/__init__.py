"""What it costs to watch a video and to answer the first question about it."""
