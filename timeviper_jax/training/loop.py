"""The steps of one stage: measure, save, take a batch, learn from it, look back.

One step is always under way on the devices while the host looks at the one before it,
so that skipped updates and requests to stop are known a step later and cost no wait.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.training.checkpoint import Checkpoints, RunRecord, versions
from timeviper_jax.training.guard import GuardConfig, SkipLog
from timeviper_jax.training.metrics import Means, MetricsWriter, summarise
from timeviper_jax.training.optimizer import updates_made
from timeviper_jax.training.parameters import Params
from timeviper_jax.training.phases import Phases
from timeviper_jax.training.signals import (
    STOPPED,
    Interrupted,
    StopRequest,
    Votes,
    exit_within,
)
from timeviper_jax.training.speed import Counts, Speed
from timeviper_jax.training.step import TrainState
from timeviper_jax.training.validation import Validation
from timeviper_jax.training.xprof import Trace

_PATIENCE = 3.0  # Seconds for a broken-off reader to come back.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What the stages of a run share: where it is written, and who is listened to."""

    config: Mapping[str, Any]  # The whole experiment, as JSON has it.
    mesh: Mesh
    checkpoints: Checkpoints
    resumed: RunRecord | None
    writer: MetricsWriter
    phases: Phases
    stop: StopRequest
    trace: Trace = Trace()

    def __post_init__(self):
        every, most = self.config["checkpoint_every"], self.config["max_redone"]
        if not 0 < every <= most:
            raise ValueError(
                f"A checkpoint each {every} steps cannot promise that at most {most}"
                " are made again; give max_redone at least checkpoint_every."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One stage. `train_step` is not compiled, `place` puts a batch on the devices.

    `flops` is a step's arithmetic, `count` says what a batch there holds. The stage has
    `steps` steps, `before` it the run had as many, and `first` of its own are done.
    """

    name: str
    before: int
    first: int
    steps: int
    train_step: Callable[[TrainState, Params, Any], tuple[TrainState, Means]]
    flops: int
    count: Callable[[Any], Counts]
    places: TrainState
    frozen: Params
    batches: NamedBatches
    place: Callable[[Any], Any]
    schedule: optax.Schedule
    guard: GuardConfig
    validation: Validation | None


class _Step(NamedTuple):
    """A step that the devices may still be at, and what to ask of it."""

    number: int
    samples: tuple[str, ...]
    skipped: jax.Array
    asked: jax.Array


class Loop:
    """A stage under way."""

    def __init__(self, watch: Watch, plan: Plan, state: TrainState):
        self._watch, self._plan, self._state = watch, plan, state
        self._alone = jax.process_count() == 1
        self._votes, self._asked = Votes(watch.mesh), False
        self._skips = SkipLog(plan.guard, in_row=int(state.guard.in_row))
        self._input_state = plan.batches.get_state()
        self._step, self._last = plan.first, None
        self._broke_off = False  # A wait for data.
        self._window: list[Means] = []
        self._speed = Speed(watch.phases, watch.mesh, plan.flops)
        whole = NamedSharding(watch.mesh, P())

        # Beside the step, every host learns whether any was asked to stop.
        def step(state, frozen, batch, votes):
            asked = Votes.counted(votes)
            return *plan.train_step(state, frozen, batch), plan.count(batch), asked

        self._train_step = jax.jit(
            step, donate_argnums=0, out_shardings=(plan.places, whole, whole, whole)
        )

    def run(self) -> TrainState:
        """The state after the last step; ends the program where it is asked to stop."""
        plan, checkpoints = self._plan, self._watch.checkpoints
        bar = tqdm(
            total=plan.steps,
            initial=plan.first,
            desc=plan.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )
        with jax.set_mesh(self._watch.mesh), bar, contextlib.closing(plan.batches):
            while True:
                # Before a batch is taken: a resumed run sees this very one.
                score = self._measure()
                leaving, ended = self._leaving(), self._step == plan.steps
                if leaving or ended or self._save_is_due():
                    self._save(score)
                checkpoints.check()
                if ended:
                    return self._state
                if leaving:
                    self._leave()
                self._keep_promise()
                self._watch.trace.before(self._here + 1)
                batch = self._take()
                if batch is not None:
                    self._learn(batch)
                    bar.update()
                    self._log(bar)

    @property
    def _here(self) -> int:
        return self._plan.before + self._step

    def _leaving(self) -> bool:
        return bool(self._watch.stop) if self._alone else self._asked

    def _measure(self) -> float | None:
        """The validation loss, where it is due and no signal breaks it off."""
        if not self._measuring_is_due():
            return None
        broken = lambda: self._alone and bool(self._watch.stop)
        with self._watch.phases.within("eval"):
            params = {**self._plan.frozen, **self._state.params}
            scalars = self._plan.validation.run(params, broken)
        if scalars is None:
            return None
        self._watch.writer.write(self._here, scalars, stage=self._plan.name)
        return scalars["validation_loss"]

    def _measuring_is_due(self) -> bool:
        every = self._watch.config["validation"]["every"]
        if self._plan.validation is None or not self._step or self._step % every:
            return False
        resumed = self._watch.resumed
        measured = resumed and resumed.step == self._here and resumed.score is not None
        return not measured and not self._leaving()

    def _save_is_due(self) -> bool:
        every = self._watch.config["checkpoint_every"]
        return self._step > self._plan.first and self._step % every == 0

    def _save(self, score: float | None) -> None:
        self._look_back()
        self._watch.phases.enter("save")
        record = RunRecord(
            step=self._here,
            stage=self._plan.name,
            stage_step=self._step,
            config=self._watch.config,
            versions=versions(),
            seconds=self._watch.phases.seconds(),
            score=score,
        )
        self._watch.checkpoints.save(
            record, self._state, self._plan.frozen, self._input_state
        )

    def _keep_promise(self) -> None:
        """Waits for the save under way if a kill might else cost one step too many."""
        checkpoints, most = self._watch.checkpoints, self._watch.config["max_redone"]
        if self._here + 1 - checkpoints.sealed > most:
            with self._watch.phases.within("save"):
                checkpoints.wait()

    def _leave(self) -> None:
        self._watch.checkpoints.close()
        logging.warning(
            "Stopped before step %d of %s.", self._step + 1, self._plan.name
        )
        if self._broke_off:
            # All is saved; a reader of data that never come would hold up the exit.
            exit_within(_PATIENCE, STOPPED)
        sys.exit(STOPPED)

    def _take(self) -> Any | None:
        """A batch, on the devices; None if a signal came first."""
        phases, stop = self._watch.phases, self._watch.stop
        phases.enter("data")
        began = time.monotonic()
        try:
            # Among several hosts the others may already wait for this one's batch.
            with stop.interrupting() if self._alone else contextlib.nullcontext():
                batch = next(self._plan.batches)
        except Interrupted:
            self._broke_off = True
            return None
        self._input_state = self._plan.batches.get_state()
        if self._last is not None and not self._last.asked.is_ready():
            phases.wait_was_free(began)
        return self._plan.place(batch)

    def _learn(self, batch: Any) -> None:
        phases = self._watch.phases
        phases.enter("compile" if self._step == self._plan.first else "step")
        with jax.profiler.StepTraceAnnotation("train", step_num=self._here + 1):
            self._state, means, counts, asked = self._train_step(
                self._state, self._plan.frozen, batch, self._votes.of(self._watch.stop)
            )
        phases.enter("step")
        self._look_back()
        self._step += 1
        skipped, samples = means["skipped"].total, self._plan.batches.samples
        self._last = _Step(self._here, samples, skipped, asked)
        self._window.append(means)
        self._speed.add(counts)
        self._watch.trace.after(self._here, asked)

    def _look_back(self) -> None:
        """Waits for the last step but one: was it skipped, was anyone asked to stop."""
        last, self._last = self._last, None
        if last is not None:
            self._skips.look(last.number, last.samples, bool(last.skipped))
            self._asked = self._asked or bool(last.asked)

    def _log(self, bar: tqdm) -> None:
        every = self._watch.config["log_every"]
        if self._step % every and self._step != self._plan.steps:
            return
        scalars = summarise(self._window)  # The host waits for the device here.
        updates = updates_made(self._state.opt_state)
        scalars["lr"] = float(self._plan.schedule(updates - 1))
        scalars |= self._speed.scalars()
        scalars["samples_replaced"] = self._plan.batches.skipped
        scalars |= self._watch.phases.scalars()
        self._watch.writer.write(self._here, scalars, stage=self._plan.name)
        bar.set_postfix(loss=f"{scalars['loss']:.3f}")
        self._window = []
