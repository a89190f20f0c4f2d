"""Compiles the calls of a plan for one chip, in a process of its own.

No chip is needed: see `pallas_kernels.bench.topology`. Options are read from the
environment when JAX starts, and what a compiler takes of memory is given back only
when it ends: hence the process. It prints a line of JSON for each call.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pallas_kernels.bench import compiled, gpu_compiled, venvs
from pallas_kernels.chips import CHIPS, GPUS

# What a GPU's programs are compiled with, beside the compilers themselves.
GPU_PACKAGES = (*gpu_compiled.PACKAGES, "flax==0.12.8", "tokenizers", "pillow")


def python_for(chip: str) -> pathlib.Path:
    """An interpreter that has the chip's compiler; for a GPU in a venv of its own."""
    if chip in GPUS:
        return venvs.python_with("cuda-12-prefill", GPU_PACKAGES)
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("The TPU compiler is not installed: pip install libtpu.")
    return pathlib.Path(sys.executable)


def compile_apart(
    python: pathlib.Path, chip: str, settings: Sequence[dict], *, names: Sequence[str]
) -> Iterator[dict]:
    """What the compiler says of each call of each setting, as it says it.

    Args:
      python: Of an environment with libtpu, or with `GPU_PACKAGES`.
      chip: A name of `CHIPS` or `GPUS`.
      settings: The arguments of `settings.make`, or of `throughput.step`.
      names: Only calls whose names begin with one of these are compiled; of the others
        the arithmetic is counted.

    Raises:
      RuntimeError: A program does not compile; the end of what the compiler said.
    """
    environment = os.environ | compiled.ENVIRONMENT
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[3])
    command = [str(python), "-m", __name__, chip, json.dumps([settings, names])]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            yield json.loads(line)
        error = process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"{chip}: {error[-2000:]}")


def _compile_here(chip: str, settings: list[dict], names: list[str]) -> Iterator[dict]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.bench import topology
    from timeviper_jax.benchmarks import throughput
    from timeviper_jax.benchmarks.prefill import settings as all_settings
    from timeviper_jax.benchmarks.prefill.plan import plan

    def calls(options):
        if "rows" in options:
            return [throughput.step(**options, place=place)]
        return plan(all_settings.make(**options), place)

    mesh = topology.one_chip(chip)
    place = NamedSharding(mesh, PartitionSpec())
    known: dict[tuple, dict] = {}  # Settings share programs.
    for index, options in enumerate(settings):
        for call in calls(options):
            with jax.set_mesh(mesh):
                traced = call.program.trace()
            key = call.name, call.times, str(traced.in_avals)
            if key not in known:
                known[key] = _counted(call, traced)
                if call.name.startswith(tuple(names)):
                    with jax.set_mesh(mesh):
                        known[key] |= _compiled(traced)
            yield {"setting": index} | _described(call, traced) | known[key]


def _described(call: Any, traced: Any) -> dict:
    from timeviper_jax.benchmarks.prefill.calls import num_bytes

    return {
        "part": call.part,
        "name": call.name,
        "times": call.times,
        "tokens": call.tokens,
        "moved": call.moved,
        "resident": num_bytes(_others(call, traced)),
    }


def _counted(call: Any, traced: Any) -> dict:
    """The arithmetic of all runs of a call; nothing is compiled."""
    from timeviper_jax import flops

    runs = [flops.count(traced.jaxpr, values) for values in _values(call)]
    return {
        "flops": sum(run.flops for run in runs) * call.times // len(runs),
        "exact": all(run.exact for run in runs),
    }


def _values(call: Any) -> list[list[Any]]:
    """For each run, or for one of them all, the arguments whose values decide."""
    import jax

    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree.leaves_with_path(call.program.args)
    ]
    # Runs differ by what their cache holds; without one they are alike.
    times = call.times if any("attention" in path for path in paths) else 1
    return [[call.values(i).get(path) for path in paths] for i in range(times)]


def _others(call: Any, traced: Any) -> list[Any]:
    """Arrays on the chip that the program is not given."""
    import jax
    from jax.interpreters.partial_eval import dce_jaxpr

    jaxpr = traced.jaxpr.jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    args = jax.tree.leaves(call.program.args)
    own = {id(leaf) for leaf, use in zip(args, used, strict=True) if use}
    return [z for z in jax.tree.leaves(call.alive) if id(z) not in own]


def _compiled(traced: Any) -> dict:
    """Bytes on the chip while the program runs, as its compiler lays them out."""
    start = time.perf_counter()
    memory = traced.lower().compile().memory_analysis()
    return {
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def chip_of(name: str) -> Any:
    """What a chip's maker says of it."""
    return (CHIPS | GPUS)[name]


if __name__ == "__main__":
    for line in _compile_here(sys.argv[1], *json.loads(sys.argv[2])):
        print(json.dumps(line), flush=True)
