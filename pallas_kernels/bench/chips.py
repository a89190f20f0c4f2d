"""The chips that programs are compiled for, and what their makers publish of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its smallest topology; bandwidth in bytes a second, clock in hertz."""

    topology: str
    bandwidth: float
    clock: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Clocks follow from the
# peak in bfloat16 and the size and number of matrix units.
CHIPS = {
    "v5e": Chip("v5e:2x4", 819e9, 1.503e9),
    "v5p": Chip("v5p:2x2x1", 2765e9, 1.75e9),
    "v6e": Chip("v6e:2x4", 1640e9, 1.75e9),
}
