"""Grouped-query attention, dense or over a cache."""

from pallas_kernels.attention.api import Implementation, attention

__all__ = ["Implementation", "attention"]
