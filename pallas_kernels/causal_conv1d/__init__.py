"""The short depthwise convolution that stands before the SSD."""

from pallas_kernels.causal_conv1d.api import Implementation, causal_conv1d

__all__ = ["Implementation", "causal_conv1d"]
