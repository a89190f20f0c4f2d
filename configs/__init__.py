"""Experiments: each file holds one, its command in the docstring."""
