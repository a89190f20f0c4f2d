"""The chips that programs are compiled for or run on, as their makers publish them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its smallest topology; bytes/s, hertz, bfloat16 flop/s, bytes.

    `links` is what it takes in from other chips over all its links, in bytes/s, and
    `kinds` what JAX calls it.
    """

    topology: str
    bandwidth: float
    clock: float
    peak: float
    memory: int
    links: float
    kinds: tuple[str, ...] = ()


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Clocks follow from the
# peak in bfloat16 and the size and number of matrix units; links are half of what is
# published for both directions.
CHIPS = {
    "v5e": Chip(
        *("v5e:2x4", 819e9, 1.503e9, 197e12, 16 * 2**30, 200e9),
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(
        *("v5p:2x2x1", 2765e9, 1.75e9, 459e12, 95 * 2**30, 600e9),
        kinds=("TPU v5", "TPU v5p"),
    ),
    "v6e": Chip(
        *("v6e:2x4", 1640e9, 1.75e9, 918e12, 32 * 2**30, 400e9),
        kinds=("TPU v6 lite", "TPU v6e"),
    ),
}

# https://www.nvidia.com/en-us/data-center/h200: its peak without sparsity.
GPUS = {
    "h200": Chip(
        *("1x1x1", 4800e9, 1.98e9, 989e12, 141 * 10**9, 450e9), kinds=("NVIDIA H200",)
    )
}

# The peaks of chips that nothing here is compiled for, from the same pages.
_OTHER_PEAKS = {
    "TPU v4": 275e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """The peak of a `jax.Device.device_kind` in bfloat16 flop/s; None if not known."""
    chips = (CHIPS | GPUS).values()
    known = {name: chip.peak for chip in chips for name in chip.kinds}
    return (known | _OTHER_PEAKS).get(kind)
