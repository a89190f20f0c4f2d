"""What needs the devices themselves: other meshes, a batch of NaN.

python -m timeviper_jax.benchmarks.faults.devices meshes UNBROKEN FOLDER

Each runs in a process of its own, with as many simulated devices as it needs, on the
model and data of a run that came to its end; it prints what it found as JSON.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from timeviper_jax import sharding
from timeviper_jax.benchmarks.faults.stage import GUARD, Stage
from timeviper_jax.benchmarks.faults.training import Run, Setting
from timeviper_jax.training import guard
from timeviper_jax.training.checkpoint import Checkpoints, Keep, RunRecord
from timeviper_jax.training.step import TrainState

_CLOSE = 1e-6


def meshes(unbroken: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """One step on each mesh, a checkpoint between; beside it the same on the first.

    Half of the devices at a time, down to one, and then all of them.
    """
    most = jax.device_count()
    counts = [most >> n for n in range(most.bit_length())] + [most]
    stage = Stage.of(unbroken, rows=most, preset="tiny")
    compiled: dict[int, Callable] = {}
    want = _walk(stage, folder / "straight", [most] * len(counts), compiled)
    got = _walk(stage, folder / "changing", counts, compiled)
    pairs = list(zip(got, want, strict=True))
    far = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs]
    samples = [a["samples"] == b["samples"] for a, b in pairs]
    restored = [each["restored"] for each in got]
    return dict(
        devices=counts,
        same_samples=samples,
        restored_bitwise=restored,
        relative_loss_difference=far,
        ok=all(samples) and all(restored) and max(far) <= _CLOSE,
    )


def _walk(
    stage: Stage,
    workdir: pathlib.Path,
    counts: Sequence[int],
    compiled: dict[int, Callable],
) -> list[dict[str, Any]]:
    """Restores on so many devices, makes a step, and saves, over and over.

    The step for each number of devices is kept in `compiled`.
    """
    shutil.rmtree(workdir, ignore_errors=True)
    kept: dict[str, np.ndarray] = {}
    told = []
    for number, count in enumerate(counts):
        mesh = sharding.make_mesh(fsdp=count, devices=jax.devices()[:count])
        checkpoints = Checkpoints(workdir, keep=Keep(last=2, best=0))
        params = checkpoints.restore_params(mesh) if number else {}
        batches = stage.batches()
        state, places, frozen = stage.begin(mesh, params)
        if number:
            state = checkpoints.restore_state(state, batches)
        here = _flat(state)
        restored = all(np.array_equal(here[name], kept[name]) for name in kept)
        with jax.set_mesh(mesh), contextlib.closing(batches):
            if count not in compiled:
                step = stage.step(state.params)
                compiled[count] = jax.jit(step, out_shardings=(places, None))
            batch = sharding.put(next(batches), mesh)
            state, means = compiled[count](state, frozen, batch)
            record = RunRecord(
                step=number + 1, stage="", stage_step=number + 1, config=stage.config
            )
            checkpoints.save(record, state, frozen, batches.get_state())
            told.append(
                dict(
                    samples=batches.samples,
                    restored=restored,
                    loss=float(means["loss"].total / means["loss"].count),
                )
            )
        checkpoints.close()
        kept = _flat(state)
    return told


def _flat(state: TrainState) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def nan(unbroken: pathlib.Path, _: pathlib.Path) -> dict[str, Any]:
    """A good batch, one of NaN, a good one: the second leaves no trace."""
    stage, mesh = Stage.of(unbroken, rows=2, preset="tiny"), sharding.make_mesh(fsdp=-1)
    state, _, frozen = stage.begin(mesh, {})
    step, skips = jax.jit(stage.step(state.params)), guard.SkipLog(GUARD, in_row=0)
    states, skipped = [state], []
    with contextlib.closing(stage.batches()) as batches:
        for number in range(3):
            batch = next(batches)
            pixels = batch.frames.astype(np.float32)
            if number == 1:
                pixels.fill(np.nan)
            batch = dataclasses.replace(batch, frames=pixels)
            state, means = step(state, frozen, sharding.put(batch, mesh))
            skipped.append(bool(means["skipped"].total))
            skips.look(number + 1, batches.samples, skipped[-1])
            states.append(state)
    learned = [_flat(state._replace(step=0, guard=0)) for state in states]
    same = [
        all(np.array_equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(learned)
    ]
    expected = [False, True, False]
    return dict(skipped=skipped, unchanged=same, ok=skipped == same == expected)


def inject(
    name: str, setting: Setting, unbroken: Run, *, devices: int = 1
) -> dict[str, Any]:
    """What one of the functions above finds, in a process with so many devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    flags += f" --xla_force_host_platform_device_count={devices}"
    command = [__spec__.name, name, str(unbroken.folder), str(setting.work / name)]
    return apart(setting, command, XLA_FLAGS=flags)


def apart(setting: Setting, command: Sequence[str], **environment: str) -> Any:
    """What a module prints as JSON, in a process of its own."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(setting.work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | cache | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("meshes", "nan"))
    parser.add_argument("unbroken", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    run = dict(meshes=meshes, nan=nan)[args.name]
    print(json.dumps(run(args.unbroken, args.folder)))


if __name__ == "__main__":
    main()
