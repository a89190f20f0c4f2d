"""Mamba-2's selective state space (state space duality, SSD)."""

from pallas_kernels.ssd.api import Implementation, ssd, ssd_step

__all__ = ["Implementation", "ssd", "ssd_step"]
