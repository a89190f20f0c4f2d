"""The chips that programs are compiled for, and what their makers publish of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its smallest topology; in bytes a second, hertz, bfloat16 flop/s."""

    topology: str
    bandwidth: float
    clock: float
    peak: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Clocks follow from the
# peak in bfloat16 and the size and number of matrix units.
CHIPS = {
    "v5e": Chip("v5e:2x4", 819e9, 1.503e9, 197e12),
    "v5p": Chip("v5p:2x2x1", 2765e9, 1.75e9, 459e12),
    "v6e": Chip("v6e:2x4", 1640e9, 1.75e9, 918e12),
}
