"""Encoders, token merging and projectors."""
