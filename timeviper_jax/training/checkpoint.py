"""Checkpoints: everything a run needs to go on as if it had never stopped.

One checkpoint of a run's directory holds, under `checkpoints/STEP/`:
  params     every parameter of the model by path, whether it moves or not
  optimizer  the optimizer's state and the step within the stage
  input      each host's input iterator
  run        which stage this is, and the whole config, as JSON
Randomness needs no place of its own: initial values follow from the config's seed, and
what the input draws from the iterator's state.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from timeviper_jax import sharding
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the latest checkpoint says of its run; `stage_step` steps are behind it."""

    step: int
    stage: str
    stage_step: int
    config: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int | None = None):
        path = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True
            ),
            item_handlers=dict(
                params=ocp.StandardCheckpointHandler(),
                optimizer=ocp.StandardCheckpointHandler(),
                input=grain.checkpoint.CheckpointHandler(),
                run=ocp.JsonCheckpointHandler(),
            ),
        )
        self.path = path

    def latest(self) -> RunRecord | None:
        """The record of the latest whole checkpoint, if there is one."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        return RunRecord(step=step, **self._manager.restore(step, args=args).run)

    def save(
        self,
        record: RunRecord,
        state: TrainState,
        frozen: Params,
        batches: grain.DatasetIterator,
    ) -> None:
        """Writes a checkpoint of this step, unless there is one already."""
        if record.step in self._manager.all_steps():
            return
        run = dict(
            stage=record.stage,
            stage_step=record.stage_step,
            config=dict(record.config),
        )
        self._manager.save(
            record.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave({**frozen, **state.params}),
                optimizer=ocp.args.StandardSave(
                    dict(opt_state=state.opt_state, step=state.step)
                ),
                input=grain.checkpoint.CheckpointSave(batches),
                run=ocp.args.JsonSave(run),
            ),
        )
        # On a CPU the writer reads the very memory that the next step is given.
        if jax.default_backend() == "cpu":
            self._manager.wait_until_finished()

    def restore_params(self, mesh: Mesh) -> Params:
        """The latest checkpoint's parameters, whatever model they are of."""
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self.path} holds no finished checkpoint.")
        metadata = self._manager.item_metadata(step).params.tree
        shardings = sharding.shard_params(metadata, mesh)
        shapes = {
            path: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=shardings[path])
            for path, m in metadata.items()
        }
        args = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
        return self._manager.restore(step, args=args).params

    def restore_state(
        self, state: TrainState, batches: grain.DatasetIterator
    ) -> TrainState:
        """The latest optimizer state, in `state`'s form; moves `batches` to its place.

        `state` already has the checkpoint's parameters.
        """
        here = dict(opt_state=state.opt_state, step=state.step)
        args = ocp.args.Composite(
            optimizer=ocp.args.StandardRestore(jax.tree.map(_abstract, here)),
            input=grain.checkpoint.CheckpointRestore(batches),
        )
        restored = self._manager.restore(self._manager.latest_step(), args=args)
        return state._replace(**restored.optimizer)

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def open_run(workdir: str | os.PathLike) -> Checkpoints:
    """The checkpoints of a run that was there before."""
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} holds no run; train.py makes one there.")
    return Checkpoints(workdir)


def load_params(workdir: str | os.PathLike, mesh: Mesh) -> Params:
    """The parameters of a run's latest checkpoint."""
    checkpoints = open_run(workdir)
    params = checkpoints.restore_params(mesh)
    checkpoints.close()
    return params


def load_model(workdir: str | os.PathLike, mesh: Mesh) -> TimeViper:
    """The model of a run's latest checkpoint, as the stage it stands in has it."""
    checkpoints = open_run(workdir)
    params = checkpoints.restore_params(mesh)
    record = checkpoints.latest()
    checkpoints.close()
    stage = StageConfig.from_dict(record.config["stages"][record.stage])
    cfg = model_config(**record.config["model"]).with_transv(stage.transv)
    graph, _ = describe(cfg)
    params = lora.merged(params, lora_config(record.config))
    return merge(graph, fill(cfg, params, record.config["seed"], mesh))
