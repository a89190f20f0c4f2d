"""Prefill, decoding, and answering questions about a video."""
