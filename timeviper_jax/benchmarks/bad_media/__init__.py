"""Malformed media, hostile manifests and prompts, and what becomes of each."""
