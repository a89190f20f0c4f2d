"""What needs the devices themselves: other meshes, a batch of NaN, the cost of it all.

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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from timeviper_jax import sharding
from timeviper_jax.benchmarks.faults.training import Run, Setting
from timeviper_jax.data import pipeline
from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.training import experiment, guard, loop
from timeviper_jax.training.checkpoint import Checkpoints, Keep, RunRecord, open_run
from timeviper_jax.training.metrics import MetricsWriter
from timeviper_jax.training.optimizer import OptimizerConfig, make_optimizer
from timeviper_jax.training.parameters import Params, merge
from timeviper_jax.training.phases import PHASES, Phases
from timeviper_jax.training.signals import StopRequest
from timeviper_jax.training.step import TrainState, create_state, make_train_step

MESHES = (8, 4, 2, 1, 8)
_CLOSE = 1e-6
_GUARD = guard.GuardConfig(max_skips=10, spike_window=0, spike_deviations=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The one stage of a run, to go through again by hand."""

    config: dict[str, Any]
    cfg: experiment.TimeViperConfig
    stage: experiment.StageConfig
    rows: int

    @classmethod
    def of(cls, folder: pathlib.Path, rows: int, preset: str) -> "Stage":
        """The stage of the run in `folder`, with so many rows and that preset."""
        checkpoints = open_run(folder)
        record = checkpoints.latest()
        checkpoints.close()
        config = {
            **record.config,
            "model": {**record.config["model"], "preset": preset},
        }
        stage = experiment.StageConfig.from_dict(config["stages"][record.stage])
        cfg = experiment.model_config(**config["model"]).with_transv(stage.transv)
        return cls(config=config, cfg=cfg, stage=stage, rows=rows)

    def batches(self) -> NamedBatches:
        task, data = self.stage.task, self.config["data"]
        cfg = pipeline.DataConfig(
            manifest=data["manifest"],
            split=task.split,
            where=task.where,
            batch_size=self.rows,
            num_frames=task.num_frames,
            text_tokens=task.text_tokens,
            num_segments=task.num_segments,
            tokens_per_frame=self.cfg.tokens_per_frame,
            fit=self.cfg.fit,
            template=data["template"],
            num_threads=data["num_threads"],
        )
        return pipeline.make_batches(cfg, ByteTokenizer(), seed=self.config["seed"])

    def begin(
        self, mesh: Mesh, params: Params
    ) -> tuple[TrainState, TrainState, Params]:
        """The state before the first step, where it lives, and what stands still."""
        params = experiment.fill(self.cfg, params, self.config["seed"], mesh)
        moving = self.stage.moving(params)
        frozen = {path: a for path, a in params.items() if path not in moving}
        params = {path: a for path, a in params.items() if path in moving}
        state, places = create_state(params, self.optimizer(params), mesh, _GUARD)
        return state, places, frozen

    def optimizer(self, params: Params) -> optax.GradientTransformation:
        config = OptimizerConfig(**self.config["optimizer"])
        return make_optimizer(params, lambda _: 1e-3, config)

    def step(self, params: Params) -> Callable:
        """A step as training makes it, not compiled."""
        graph, _ = experiment.describe(self.cfg)
        objective = self.stage.task.objective(ByteTokenizer())
        return make_train_step(
            *(graph, objective, self.optimizer(params)), guard_config=_GUARD
        )

    def bare_step(self, params: Params) -> Callable:
        """The same gradient and update, and nothing that looks after them."""
        graph, _ = experiment.describe(self.cfg)
        objective, optimizer = self.stage.task.objective(None), self.optimizer(params)

        def step(state, frozen, batch):
            def loss(params):
                means = objective(merge(graph, {**frozen, **params}), batch)
                return means["loss"].total / means["loss"].count, means

            grads, means = jax.grad(loss, has_aux=True)(state.params)
            updates, memory = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return state._replace(params=params, opt_state=memory), means

        return step


def meshes(unbroken: pathlib.Path, folder: pathlib.Path, _: int) -> dict[str, Any]:
    """One step on each mesh, a checkpoint between; beside it the same on eight."""
    stage = Stage.of(unbroken, rows=max(MESHES), preset="tiny")
    want = _walk(stage, folder / "straight", [MESHES[0]] * len(MESHES))
    got = _walk(stage, folder / "changing", MESHES)
    pairs = list(zip(got, want, strict=True))
    far = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs]
    samples = [a["samples"] == b["samples"] for a, b in pairs]
    restored = [each["restored"] for each in got]
    return dict(
        devices=list(MESHES),
        same_samples=samples,
        restored_bitwise=restored,
        relative_loss_difference=far,
        ok=all(samples) and all(restored) and max(far) <= _CLOSE,
    )


def _walk(
    stage: Stage, workdir: pathlib.Path, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Restores on so many devices, makes a step, and saves, over and over."""
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
            step = jax.jit(stage.step(state.params), out_shardings=(places, None))
            batch = sharding.put(next(batches), mesh)
            state, means = step(state, frozen, batch)
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


def nan(unbroken: pathlib.Path, folder: pathlib.Path, _: int) -> dict[str, Any]:
    """A good batch, one of NaN, a good one: the second leaves no trace."""
    stage, mesh = Stage.of(unbroken, rows=2, preset="tiny"), sharding.make_mesh(fsdp=-1)
    state, _, frozen = stage.begin(mesh, {})
    step, skips = jax.jit(stage.step(state.params)), guard.SkipLog(_GUARD, in_row=0)
    states, skipped = [state], []
    with contextlib.closing(stage.batches()) as batches:
        for number in range(3):
            batch = next(batches)
            if number == 1:
                pixels = np.full(batch.frames.shape, np.nan, np.float32)
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


def cost(unbroken: pathlib.Path, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """Seconds a step of the whole loop with one save and of the bare step, in turn."""
    # As many rows as make a step take what it takes in the demo, on two cores.
    stage, mesh = (
        Stage.of(unbroken, rows=64, preset="tiny"),
        sharding.make_mesh(fsdp=-1),
    )
    seconds: dict[str, list[float]] = {"bare": [], "whole": []}
    for turn in range(6):
        name = ("bare", "whole")[turn % 2]
        run = _bare if name == "bare" else _whole
        seconds[name].append(run(stage, mesh, folder / f"cost_{turn}", steps) / steps)
    each = {name: min(values) for name, values in seconds.items()}
    share = each["whole"] / each["bare"] - 1
    return dict(
        steps=steps,
        seconds_per_step=seconds,
        share=round(share, 4),
        median_share=round(
            statistics.median(seconds["whole"]) / statistics.median(seconds["bare"])
            - 1,
            4,
        ),
        ok=share <= 0.03,
    )


def _bare(stage: Stage, mesh: Mesh, folder: pathlib.Path, steps: int) -> float:
    state, places, frozen = stage.begin(mesh, {})
    step = jax.jit(
        stage.bare_step(state.params), donate_argnums=0, out_shardings=(places, None)
    )
    with jax.set_mesh(mesh), contextlib.closing(stage.batches()) as batches:
        batch = sharding.put(next(batches), mesh)
        state, means = step(state, frozen, batch)
        jax.block_until_ready(state)
        began = time.monotonic()
        for _ in range(steps):
            batch = sharding.put(next(batches), mesh)
            state, means = step(state, frozen, batch)
        jax.block_until_ready(state)
        return time.monotonic() - began


def _whole(stage: Stage, mesh: Mesh, folder: pathlib.Path, steps: int) -> float:
    """The same steps by the loop of training, with its last one's checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    state, places, frozen = stage.begin(mesh, {})
    with (
        contextlib.closing(StopRequest()) as stop,
        contextlib.closing(Phases(dict.fromkeys(PHASES, 3600.0))) as phases,
        contextlib.closing(MetricsWriter(folder)) as writer,
        contextlib.closing(Checkpoints(folder, keep=Keep(last=2, best=0))) as kept,
    ):
        config = stage.config | dict(log_every=20, checkpoint_every=steps + 1)
        watch = loop.Watch(
            config=config,
            mesh=mesh,
            checkpoints=kept,
            resumed=None,
            writer=writer,
            phases=phases,
            stop=stop,
        )
        plan = loop.Plan(
            name="cost",
            before=0,
            first=0,
            steps=steps + 1,
            train_step=stage.step(state.params),
            places=places,
            frozen=frozen,
            batches=_Timed(stage.batches()),
            place=lambda batch: sharding.put(batch, mesh),
            schedule=lambda _: 1e-3,
            guard=_GUARD,
            validation=None,
        )
        loop.Loop(watch, plan, state).run()
        kept.wait()
        return time.monotonic() - plan.batches.began


class _Timed(NamedBatches):
    """Batches that know when the second was asked for: the first one compiles."""

    def __init__(self, batches: NamedBatches):
        super().__init__(batches)
        self._count, self.began = 0, 0.0

    def __next__(self) -> Any:
        self._count += 1
        if self._count == 2:
            self.began = time.monotonic()
        batch = next(self._parent)
        self.samples = self._parent.samples
        return batch


def inject(
    name: str, setting: Setting, unbroken: Run, *, devices: int = 1, steps: int = 0
) -> dict[str, Any]:
    """What one of the functions above finds, in a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    flags += f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", __spec__.name, name, str(unbroken.folder)]
    command += [str(setting.work / name), "--steps", str(steps)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(setting.work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        command,
        env=os.environ | cache | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("meshes", "nan", "cost"))
    parser.add_argument("unbroken", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=0)
    args = parser.parse_args()
    run = dict(meshes=meshes, nan=nan, cost=cost)[args.name]
    print(json.dumps(run(args.unbroken, args.folder, args.steps)))


if __name__ == "__main__":
    main()
