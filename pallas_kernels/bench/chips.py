"""The chips that programs are compiled for, and what their makers publish of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its smallest topology; bytes/s, hertz, bfloat16 flop/s, bytes.

    `links` is what it takes in from other chips over all its links, in bytes/s.
    """

    topology: str
    bandwidth: float
    clock: float
    peak: float
    memory: int
    links: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Clocks follow from the
# peak in bfloat16 and the size and number of matrix units; links are half of what is
# published for both directions.
CHIPS = {
    "v5e": Chip("v5e:2x4", 819e9, 1.503e9, 197e12, 16 * 2**30, 200e9),
    "v5p": Chip("v5p:2x2x1", 2765e9, 1.75e9, 459e12, 95 * 2**30, 600e9),
    "v6e": Chip("v6e:2x4", 1640e9, 1.75e9, 918e12, 32 * 2**30, 400e9),
}

# https://www.nvidia.com/en-us/data-center/h200: its peak without sparsity.
GPUS = {"h200": Chip("1x1x1", 4800e9, 1.98e9, 989e12, 141 * 10**9, 450e9)}
