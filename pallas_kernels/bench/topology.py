"""Chips that are not there, as JAX sees them when it compiles for them.

A TPU needs libtpu and the environment of `compiled`, an H200 the packages of
`gpu_compiled`, before JAX starts.
"""

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from pallas_kernels.chips import CHIPS, GPUS

# An H200 (sm_90), as XLA describes one to itself.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  device_memory_size: 150754820096
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


def one_chip(name: str) -> Mesh:
    """A mesh of one chip, by its name in `chips`: arrays and programs can be its."""
    if name in CHIPS:
        found = topologies.get_topology_desc(CHIPS[name].topology, platform="tpu")
    else:
        size = GPUS[name].topology
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=size, topology=size, target_config=_H200
        )
    return Mesh(np.array(found.devices[:1]), ("device",))
