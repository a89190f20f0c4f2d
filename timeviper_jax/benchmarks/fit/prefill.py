"""Whether inference fits one chip: a config's longest video, and a first question.

The language model and its caches are on one chip alone: only the encoder takes a mesh
(`inference.encode`), as frames are encoded apart. `benchmarks.prefill` compiles every
program of it; here is what they come to.
"""

import resource
from collections.abc import Mapping
from typing import Any

from timeviper_jax.benchmarks.fit import report
from timeviper_jax.benchmarks.prefill import ahead
from timeviper_jax.benchmarks.prefill import report as prefill_report

_FRAMES_AT_ONCE = 64


def setting_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `prefill.settings.make` for a config's last stage."""
    stage = config["stages"][config["stage_order"][-1]]
    return {
        "preset": config["model"]["preset"],
        "transv": stage["transv"],
        "frames": stage["task"]["num_frames"],
        "batch": _FRAMES_AT_ONCE,
        "viewer": {},
    }


def fit(config: Mapping[str, Any], topology: str) -> dict[str, Any]:
    """The keys of a training step's report that inference on one chip has.

    Raises:
      ValueError: The topology's chip is not known.
    """
    chip, name = report.chip_of(topology), topology.partition(":")[0]
    before = _cpu_seconds()
    setting = setting_of(config)
    calls = list(
        ahead.compile_apart(ahead.python_for(name), name, [setting], names=[""])
    )
    found = prefill_report.of_calls(calls, chip)
    tokens = sum(call["tokens"] for call in calls if call["part"] == "vision")
    flops = found["tera_flop"] * 1e12
    return {
        "topology": topology,
        "frames": setting["frames"],
        "gib_per_chip": found["gib"],
        "fits": found["fits"],
        "largest_program": found["at"],
        "flops_per_token": round(flops / tokens),
        "collective_bytes": {},
        "bound_seconds": found["bound_seconds"],
        "bound_mfu": round(flops / chip.peak / found["bound_seconds"], 3),
        "compile_cpu_seconds": round(_cpu_seconds() - before),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
