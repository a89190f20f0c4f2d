"""What needs the devices themselves: other meshes, a batch of NaN, the cost of it all.

python -m timeviper_jax.benchmarks.faults.devices meshes UNBROKEN FOLDER

Each runs in a process of its own, with as many simulated devices as it needs, on the
model and data of a run that came to its end; it prints what it found as JSON.
"""

import argparse
import contextlib
import dataclasses
import functools
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
from typing import Any, NamedTuple

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

_CLOSE = 1e-6
_COST_ROWS = 16
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
        # Which layers TransV stands before is said of the run's own model.
        own = preset == record.config["model"]["preset"]
        cfg = experiment.model_config(**config["model"])
        cfg = cfg.with_transv(stage.transv if own else ())
        return cls(config=config, cfg=cfg, stage=stage, rows=rows)

    def batches(self) -> NamedBatches:
        cfg = experiment.text_data(self.config["data"], self.stage, self.cfg)
        cfg = dataclasses.replace(cfg, batch_size=self.rows)
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


def nan(unbroken: pathlib.Path, folder: pathlib.Path, _: int) -> dict[str, Any]:
    """A good batch, one of NaN, a good one: the second leaves no trace."""
    stage, mesh = Stage.of(unbroken, rows=2, preset="tiny"), sharding.make_mesh(fsdp=-1)
    state, _, frozen = stage.begin(mesh, {})
    step, skips = jax.jit(stage.step(state.params)), guard.SkipLog(_GUARD, in_row=0)
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


def cost(unbroken: pathlib.Path, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """Seconds a step of the whole loop with one save and of the bare step, in turn."""
    # The demo's model, and as many rows as make a step take what it takes there.
    stage = Stage.of(unbroken, rows=_COST_ROWS, preset="small")
    mesh = sharding.make_mesh(fsdp=-1)
    runs = dict(bare=_bare, whole=_whole)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    # What else a machine does drifts: neither is always the later one.
    for name in ("bare", "whole", "whole", "bare", "bare", "whole"):
        taken = runs[name](stage, mesh, folder, steps)
        wall[name].append(taken.wall / steps)
        cpu[name].append(taken.cpu / steps)
    share = _share(wall)
    return dict(
        steps=steps,
        wall_seconds_per_step=wall,
        cpu_seconds_per_step=cpu,
        wall_share=share,
        cpu_share=_share(cpu),
        ok=share["of_the_least"] <= 0.03,
    )


def _share(seconds: dict[str, list[float]]) -> dict[str, float]:
    """What the whole loop takes beyond the bare step, as a share of that."""
    kinds = dict(of_the_least=min, of_the_medians=statistics.median)
    return {
        name: round(kind(seconds["whole"]) / kind(seconds["bare"]) - 1, 4)
        for name, kind in kinds.items()
    }


class _Clock(NamedTuple):
    """Seconds of the world, and of all this process's threads."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "_Clock":
        return cls(time.monotonic(), time.process_time())

    def until_now(self) -> "_Clock":
        now = _Clock.now()
        return _Clock(now.wall - self.wall, now.cpu - self.cpu)


def _bare(stage: Stage, mesh: Mesh, folder: pathlib.Path, steps: int) -> _Clock:
    state, places, frozen = stage.begin(mesh, {})
    step = jax.jit(
        stage.bare_step(state.params), donate_argnums=0, out_shardings=(places, None)
    )
    with jax.set_mesh(mesh), contextlib.closing(stage.batches()) as batches:
        batch = sharding.put(next(batches), mesh)
        state, means = step(state, frozen, batch)
        jax.block_until_ready(state)
        began = _Clock.now()
        for _ in range(steps):
            batch = sharding.put(next(batches), mesh)
            state, means = step(state, frozen, batch)
        jax.block_until_ready(state)
        return began.until_now()


def _whole(stage: Stage, mesh: Mesh, folder: pathlib.Path, steps: int) -> _Clock:
    """The same steps by the loop of training, with its last one's checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    state, places, frozen = stage.begin(mesh, {})
    with (
        contextlib.closing(StopRequest()) as stop,
        contextlib.closing(Phases(dict.fromkeys(PHASES, 3600.0))) as phases,
        contextlib.closing(MetricsWriter(folder)) as writer,
        contextlib.closing(Checkpoints(folder, keep=Keep(last=2, best=0))) as kept,
    ):
        config = stage.config | dict(
            log_every=20, checkpoint_every=steps + 1, max_redone=steps + 1
        )
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
            flops=0,
            count=functools.partial(stage.stage.task.count, cfg=stage.cfg),
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
        return plan.batches.began.until_now()


class _Timed(NamedBatches):
    """Batches that know when the second was asked for: the first one compiles."""

    def __init__(self, batches: NamedBatches):
        super().__init__(batches)
        self._count, self.began = 0, _Clock.now()

    def __next__(self) -> Any:
        self._count += 1
        if self._count == 2:
            self.began = _Clock.now()
        batch = next(self._parent)
        self.samples = self._parent.samples
        return batch


def inject(
    name: str, setting: Setting, unbroken: Run, *, devices: int = 1, steps: int = 0
) -> dict[str, Any]:
    """What one of the functions above finds, in a process with so many devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name != "cost":  # Which is about the time that a step takes.
        flags += " --xla_backend_optimization_level=0"
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
