"""The ops under the model: SSD, causal convolution and attention on plain arrays.

Each op is a folder. `api.py` checks the arguments and picks an implementation,
`reference.py` states the mathematics, and every other file is one implementation of
it. Nothing here knows of modules, configs or parameters.
"""

from pallas_kernels.attention import attention
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.ssd import ssd, ssd_step

__all__ = ["attention", "causal_conv1d", "ssd", "ssd_step"]
