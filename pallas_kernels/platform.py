"""The platform a program is being compiled for, on which the choice of kernel rests."""

import jax
from jax.sharding import AxisType


def target_platform() -> str:
    """The platform of the mesh in force ("cpu", "gpu", "tpu"), else of this process.

    A program compiled ahead of time for a TPU is traced where the default backend is
    "cpu"; its mesh knows better.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_device_kind() -> str:
    """The kind of device, as in "TPU v6 lite", of the mesh in force or this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def require_local(name: str) -> None:
    """Raises NotImplementedError where XLA would have to cut a kernel up: it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    split = [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and mesh.shape[axis] > 1
    ]
    if split:
        raise NotImplementedError(
            f"{name!r} runs on the arrays of one device, and the mesh has axes {split}:"
            " call it under jax.shard_map."
        )
