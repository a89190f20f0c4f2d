"""Checkpoints: everything a run needs to go on as if it had never stopped.

One checkpoint of a run's directory holds, under `checkpoints/STEP/`:
  params           every parameter of the model by path, whether it moves or not
  optimizer        the optimizer's state, the guard's and the step within the stage
  input            each host's input iterator, by lanes (`data.lanes`)
  run              stage, whole config, versions and seconds so far, as JSON
  manifest.sha256  what the files are, written last of all (`checksums`)
Randomness needs no place of its own: initial values follow from the config's seed, and
what the input draws from the iterator's state.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import grain.checkpoint
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from timeviper_jax import checksums, sharding
from timeviper_jax.data import lanes
from timeviper_jax.layers import lora
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training.experiment import (
    StageConfig,
    describe,
    fill,
    lora_config,
    model_config,
)
from timeviper_jax.training.parameters import Params, merge
from timeviper_jax.training.step import TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """How many checkpoints stay: the newest, and those of the lowest scores.

    The newest counts only once its manifest is written, so two is the least.
    """

    last: int
    best: int

    def __post_init__(self):
        if self.last < 2 or self.best < 0:
            raise ValueError(
                f"keep_last={self.last} must be 2 or more, keep_best={self.best} 0 or"
                " more."
            )

    def of(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of those that have these scores (or none)."""
        scored = [step for step in scores if scores[step] is not None]
        best = sorted(scored, key=lambda step: (scores[step], step))[: self.best]
        return {*sorted(scores)[-self.last :], *best}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a checkpoint says of its run; `stage_step` steps of the stage are behind it.

    `seconds` is where the time went so far, `score` the validation loss, if any.
    """

    step: int
    stage: str
    stage_step: int
    config: Mapping[str, Any]
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    score: float | None = None


def versions() -> dict[str, str]:
    """What computes here, and by what it may differ from another run."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


class Checkpoints:
    """The checkpoints of one run, to read, or with `keep` to write as well.

    Only what agrees with its manifest is read; whoever writes takes what is newer and
    does not agree out of the way first.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: Keep | None = None):
        self.path = pathlib.Path(workdir).absolute() / "checkpoints"
        self._keep = keep
        self._step = self._sealed = self._find()
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                create=keep is not None, cleanup_tmp_directories=keep is not None
            ),
            item_handlers=dict(
                params=ocp.StandardCheckpointHandler(),
                optimizer=ocp.StandardCheckpointHandler(),
                input=grain.checkpoint.CheckpointHandler(),
                run=ocp.JsonCheckpointHandler(),
            ),
        )
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "finish_checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def _find(self) -> int | None:
        """The newest whole step, as the first host sees it."""
        step = -1
        if jax.process_index() == 0:
            folder, problems = checksums.newest(self.path)
            for newer, problem in problems.items():
                logging.warning("Checkpoint %s is not read: %s.", newer, problem)
                if self._keep is not None:
                    shutil.rmtree(newer)
            step = -1 if folder is None else int(folder.name)
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(step))
        return None if step < 0 else step

    @property
    def sealed(self) -> int:
        """The step that a kill now would lead back to; 0 without a checkpoint."""
        return self._sealed or 0

    def latest(self) -> RunRecord | None:
        """The record of the newest whole checkpoint, if there was one to begin with."""
        if self._step is None:
            return None
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        run = self._manager.restore(self._step, args=args).run
        return RunRecord(step=self._step, **run)

    def save(
        self,
        record: RunRecord,
        state: TrainState,
        frozen: Params,
        batches: Mapping[str, Any],
    ) -> None:
        """Begins to write a checkpoint, `batches` being the input's state, as JSON.

        Returns when the arrays are free to change; one that is being written is waited
        for first. Does nothing where this very step was restored, or saved last.

        Raises:
          SaveError: This one, or the one before, could not be written.
        """
        if record.step == self._step:
            return
        self.wait()
        # On a CPU the writer reads the very memory that the next step is given.
        if jax.default_backend() == "cpu":
            state = _copy(state)
        run = dataclasses.asdict(record)
        del run["step"]
        args = ocp.args.Composite(
            params=ocp.args.StandardSave({**frozen, **state.params}),
            optimizer=ocp.args.StandardSave(_beside_params(state)),
            input=grain.checkpoint.CheckpointSave(_InputState(batches)),
            run=ocp.args.JsonSave(run),
        )
        with self._told(record.step):
            self._manager.save(record.step, args=args)
        self._step = record.step
        self._saving = self._finisher.submit(self._finish, record.step)

    def _finish(self, step: int) -> None:
        """Waits for the files, seals them, and only then lets older ones go."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            checksums.write(self.path / str(step))
            scores = {int(p.name): _score(p) for p in checksums.steps(self.path)}
            for other in scores.keys() - self._keep.of(scores):
                shutil.rmtree(self.path / str(other))
        # Other hosts are here before it is sealed, but step only with the first.
        self._sealed = step

    def check(self) -> None:
        """Raises `SaveError` if the last save is known to have failed."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until what is being written is written, or raises `SaveError`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._told(self._step):
                saving.result()

    @contextlib.contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        """Says which checkpoint could not be written, whatever the writer raises."""
        try:
            yield
        # Its errors of the file system come as ValueError, too.
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SaveError(
                f"Checkpoint {self.path}/{step} could not be written; those before it"
                f" are whole: {reason}"
            ) from error

    def restore_params(self, mesh: Mesh) -> Params:
        """The newest whole checkpoint's parameters, whatever model they are of."""
        if self._step is None:
            raise FileNotFoundError(f"{self.path} holds no finished checkpoint.")
        metadata = self._manager.item_metadata(self._step).params.tree
        shardings = sharding.shard_params(metadata, mesh)
        shapes = {
            path: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=shardings[path])
            for path, m in metadata.items()
        }
        args = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
        return self._manager.restore(self._step, args=args).params

    def restore_state(
        self, state: TrainState, batches: grain.DatasetIterator
    ) -> TrainState:
        """All else of that checkpoint, in `state`'s form; moves `batches` to its place.

        `state` already has the checkpoint's parameters.
        """
        here = jax.tree.map(_abstract, _beside_params(state))
        args = ocp.args.Composite(optimizer=ocp.args.StandardRestore(here))
        restored = self._manager.restore(self._step, args=args)
        batches.set_state(self._input_state())
        batches.start_prefetch()
        return state._replace(**restored.optimizer)

    def _input_state(self) -> dict[str, Any]:
        """What this host's input goes on with, whichever hosts saved it."""
        folder, count = self.path / str(self._step) / "input", jax.process_count()
        saved = sorted(folder.glob("process_*-of-*.json"), key=_process)
        states = [json.loads(path.read_bytes()) for path in saved]
        return lanes.dealt(states, jax.process_index(), count)

    def close(self) -> None:
        """Waits for what is still being written."""
        self.wait()
        self._finisher.shutdown()
        self._manager.close()


class _InputState:
    """An input's state where the handler looks for an iterator."""

    def __init__(self, state: Mapping[str, Any]):
        self._state = state

    def get_state(self) -> bytes:
        return json.dumps(self._state, indent=1).encode()


@jax.jit
def _copy(tree: Any) -> Any:
    """The same values elsewhere, by one program instead of one for each shape."""
    return jax.tree.map(jnp.copy, tree)


def _beside_params(state: TrainState) -> dict[str, Any]:
    return dict(opt_state=state.opt_state, step=state.step, guard=state.guard)


def _process(path: pathlib.Path) -> int:
    return int(path.name.split("-")[0].removeprefix("process_"))


def _score(folder: pathlib.Path) -> float | None:
    try:
        return json.loads((folder / "run" / "metadata").read_bytes()).get("score")
    except (OSError, ValueError):
        return None  # It is damaged: only its age counts.


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def open_run(workdir: str | os.PathLike) -> Checkpoints:
    """The checkpoints of a run that was there before, to read."""
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} holds no run; train.py makes one there.")
    return Checkpoints(workdir)


def load_params(workdir: str | os.PathLike, mesh: Mesh) -> Params:
    """The parameters of a run's latest checkpoint."""
    checkpoints = open_run(workdir)
    params = checkpoints.restore_params(mesh)
    checkpoints.close()
    return params


def load_model(checkpoints: Checkpoints, mesh: Mesh) -> TimeViper:
    """The model of the newest whole checkpoint, as the stage it stands in has it."""
    params = checkpoints.restore_params(mesh)
    record = checkpoints.latest()
    stage = StageConfig.from_dict(record.config["stages"][record.stage])
    cfg = model_config(**record.config["model"]).with_transv(stage.transv)
    graph, _ = describe(cfg)
    params = lora.merged(params, lora_config(record.config))
    return merge(graph, fill(cfg, params, record.config["seed"], mesh))
