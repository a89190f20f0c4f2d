"""Encoding, watching and answering."""
