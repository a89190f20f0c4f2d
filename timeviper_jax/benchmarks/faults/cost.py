"""What it costs a run to be looked after: the loop of training beside the bare step.

python -m timeviper_jax.benchmarks.faults.cost UNBROKEN FOLDER --rounds 12

The demo's model learns by the loop (guard, watchdog, votes, metrics, state of the
input) and by nothing but a gradient and an update, on the same batches, a few steps
each in turn, in one process. Saves (files, SHA-256, manifest) are clocked apart and
count as often as the demo makes them, as if no step went on meanwhile.
"""

import argparse
import contextlib
import functools
import itertools
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from timeviper_jax import sharding
from timeviper_jax.benchmarks import paired
from timeviper_jax.benchmarks.faults.devices import apart
from timeviper_jax.benchmarks.faults.stage import GUARD, Stage
from timeviper_jax.benchmarks.faults.training import Run, Setting
from timeviper_jax.data.examples import Batch
from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.training import loop
from timeviper_jax.training.checkpoint import Checkpoints, Keep
from timeviper_jax.training.metrics import MetricsWriter
from timeviper_jax.training.phases import PHASES, Phases
from timeviper_jax.training.signals import StopRequest

_ROWS = 16  # A step then takes what it takes in the demo, a third of a second.
_STEPS = 6  # Of a turn.
_SAVE_EVERY = 100  # Steps, as in configs/needles.py.


class _Clock(NamedTuple):
    """Seconds of the world, and of all this process's threads."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> "_Clock":
        return cls(time.monotonic(), time.process_time())

    def to(self, end: "_Clock") -> "_Clock":
        return _Clock(end.wall - self.wall, end.cpu - self.cpu)


class _Saves(Checkpoints):
    """Checkpoints that are waited for until they are sealed, and clocked."""

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder, keep=Keep(last=2, best=0))
        self.each: list[_Clock] = []

    def save(self, *args: Any) -> None:
        began = _Clock.now()
        super().save(*args)
        self.wait()
        self.each.append(began.to(_Clock.now()))


class _Turns(NamedBatches[Batch]):
    """The loop's batches; where its turn is over, the bare steps have theirs.

    The loop comes here with nothing under way: it has just logged, and saved.
    """

    def __init__(
        self,
        source: NamedBatches,
        made: Sequence[Batch],
        bare: Callable[[], None],
        saves: _Saves,
    ):
        super().__init__(source)
        self._made, self._bare, self._saves, self._given = made, bare, saves, 0
        self._began, self.samples = _Clock.now(), source.samples
        self.taken: dict[str, list[_Clock]] = dict(bare=[], whole=[])

    def __next__(self) -> Batch:
        if self._given and self._given % _STEPS == 0:
            whole = self._began.to(_Clock.now())
            self.taken["whole"].append(self._saves.each[-1].to(whole))
            began = _Clock.now()
            self._bare()
            self.taken["bare"].append(began.to(_Clock.now()))
            self._began = _Clock.now()
        self._given += 1
        return self._made[self._given % len(self._made)]


def measure(
    unbroken: pathlib.Path, folder: pathlib.Path, rounds: int
) -> dict[str, Any]:
    """Shares of the clock and of processor time that the loop takes beyond the step."""
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage.of(unbroken, rows=_ROWS, preset="small")
    mesh, source = sharding.make_mesh(fsdp=-1), stage.batches()
    made = list(itertools.islice(source, _STEPS))
    bare = _bare_turn(stage, mesh, made)
    bare()  # Compiles.
    with contextlib.closing(_Saves(folder)) as saves:
        turns = _Turns(source, made, bare, saves)
        # The first turn compiles, and after the last there is none of the other.
        _train(stage, mesh, folder, turns, saves, steps=(rounds + 2) * _STEPS)
    taken = {name: clocks[1:] for name, clocks in turns.taken.items()}
    save = [statistics.median(kind) for kind in zip(*saves.each, strict=True)]
    found: dict[str, Any] = dict(rounds=rounds, steps_of_a_turn=_STEPS)
    for number, kind in enumerate(_Clock._fields):
        seconds = {name: [t[number] / _STEPS for t in taken[name]] for name in taken}
        step = statistics.median(seconds["bare"])
        extra = save[number] / (_SAVE_EVERY * step)
        found[kind] = dict(
            seconds_of_a_bare_step=round(step, 4),
            seconds_of_a_save=round(save[number], 4),
            share_of_saves=round(extra, 4),
            **paired.shares(seconds, "bare", extra=extra),
        )
    return found | dict(ok=found["wall"]["whole"]["ok"])


def _bare_turn(
    stage: Stage, mesh: Mesh, batches: Sequence[Batch]
) -> Callable[[], None]:
    """Learns from the batches, and waits for it."""
    state, places, frozen = stage.begin(mesh, {})
    step = jax.jit(
        stage.bare_step(state.params), donate_argnums=0, out_shardings=(places, None)
    )

    def turn() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            for batch in batches:
                state, _ = step(state, frozen, sharding.put(batch, mesh))
            jax.block_until_ready(state)

    return turn


def _train(
    stage: Stage,
    mesh: Mesh,
    folder: pathlib.Path,
    batches: NamedBatches,
    saves: Checkpoints,
    *,
    steps: int,
) -> None:
    """The same steps by the loop of training."""
    state, places, frozen = stage.begin(mesh, {})
    every = dict(log_every=_STEPS, checkpoint_every=_STEPS, max_redone=_STEPS)
    with (
        contextlib.closing(StopRequest()) as stop,
        contextlib.closing(Phases(dict.fromkeys(PHASES, 3600.0))) as phases,
        contextlib.closing(MetricsWriter(folder)) as writer,
    ):
        watch = loop.Watch(
            config=stage.config | every,
            mesh=mesh,
            checkpoints=saves,
            resumed=None,
            writer=writer,
            phases=phases,
            stop=stop,
        )
        plan = loop.Plan(
            name="cost",
            before=0,
            first=0,
            steps=steps,
            train_step=stage.step(state.params),
            flops=0,
            count=functools.partial(stage.stage.task.count, cfg=stage.cfg),
            places=places,
            frozen=frozen,
            batches=batches,
            place=lambda batch: sharding.put(batch, mesh),
            schedule=lambda _: 1e-3,
            guard=GUARD,
            validation=None,
        )
        loop.Loop(watch, plan, state).run()


def inject(setting: Setting, unbroken: Run) -> dict[str, Any]:
    """What is found in a process that nothing came before."""
    command = [__spec__.name, str(unbroken.folder), str(setting.work / "cost")]
    return apart(setting, command)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("unbroken", type=pathlib.Path, help="a finished run's folder")
    parser.add_argument("folder", type=pathlib.Path, help="where this one is kept")
    parser.add_argument("--rounds", type=int, default=12, help="of both in turn")
    args = parser.parse_args()
    print(json.dumps(measure(args.unbroken, args.folder, args.rounds)))


if __name__ == "__main__":
    main()
