"""Comparisons with recordings of the PyTorch release, one file a part of the model."""
