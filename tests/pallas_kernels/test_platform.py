"""The choice of kernel follows the machine that is compiled for."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.chips import peak_flops
from pallas_kernels.platform import target_platform


def test_without_a_mesh_it_is_this_process():
    assert target_platform() == jax.default_backend()


def test_a_mesh_of_another_machine_decides():
    chip = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh((4,), ("data",), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_platform() == "tpu"
    assert target_platform() == jax.default_backend()


def test_only_a_whole_chip_of_a_known_kind_has_a_peak():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H200 MIG 1g.18gb") is None
    assert peak_flops("cpu") is None
