"""What it takes to watch hours of video: memory, seconds, and what is kept."""
