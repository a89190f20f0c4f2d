"""How fast a stage goes: what a line of metrics says of the steps since the one before.

Rates are over all the time between two lines, whatever held up the steps in it. What
they count is real and of all hosts: tokens that are no padding, frames that are shown.
"""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pallas_kernels.chips import peak_flops
from timeviper_jax.training.phases import Phases

Counts = Mapping[str, Int[Array, ""]]

# How those scalars begin that the clock or the machine decides, and not the config.
OF_THE_MACHINE = (
    *("seconds_", "goodput", "input_bound", "hbm_", "mfu"),
    *("steps_per_second", "tokens_per_second", "frames_per_second"),
)


class Speed:
    """The steps since the last line; what earlier processes made is no part of them.

    A step takes `flops` of arithmetic, over all devices of the mesh.
    """

    def __init__(self, phases: Phases, mesh: Mesh, flops: int):
        self._phases, self._flops = phases, flops
        self._devices = mesh.local_devices
        self._peak = peak_flops(self._devices[0].device_kind)
        self._num_devices = mesh.size
        self._counts: list[Counts] = []
        self._before = phases.seconds()

    def add(self, counts: Counts) -> None:
        """A step was made; what it counted may still be on its way."""
        self._counts.append(counts)

    def scalars(self) -> dict[str, float]:
        """What the steps so far came to; the next line's begin now.

        Call it once the devices are done with them.
        """
        now = self._phases.seconds()
        passed = {name: now[name] - self._before[name] for name in now}
        seconds, steps = sum(passed.values()), len(self._counts)
        counts = jax.device_get(self._counts)
        told = {"steps_per_second": steps / seconds}
        for name in counts[-1]:
            total = sum(int(count[name]) for count in counts)
            told[f"{name}_per_second"] = total / seconds
        if self._peak is not None:
            peak = self._peak * self._num_devices
            told["mfu"] = self._flops * steps / seconds / peak
        self._counts, self._before = [], now
        return told | {"input_bound": passed["data"] / seconds} | self._memory()

    def _memory(self) -> dict[str, float]:
        """GiB of the fullest device of this host, where the backend tells."""
        stats = [device.memory_stats() or {} for device in self._devices]
        names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
        return {
            name: max(one[key] for one in stats) / 2**30
            for name, key in names.items()
            if all(key in one for one in stats)
        }
