"""The platform a program is being compiled for, on which the choice of kernel rests."""

import jax


def target_platform() -> str:
    """The platform of the mesh in force ("cpu", "gpu", "tpu"), else of this process.

    A program compiled ahead of time for a TPU is traced where the default backend is
    "cpu"; its mesh knows better.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
