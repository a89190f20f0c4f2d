"""A run's training step as a program that nobody runs: arguments without values."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from timeviper_jax import sharding
from timeviper_jax.data.examples import Batch
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.layers.lora import init as init_lora
from timeviper_jax.layers.lora import merged
from timeviper_jax.timeviper import TimeViperConfig
from timeviper_jax.training import experiment, guard
from timeviper_jax.training.experiment import StageConfig, TextTask
from timeviper_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from timeviper_jax.training.parameters import Params
from timeviper_jax.training.step import TrainState, describe_state, make_train_step

GIB = 2**30


class Arguments(NamedTuple):
    """What a step is given, as shapes with their shardings."""

    state: TrainState
    frozen: Params
    batch: Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A step before anything is traced: its model, its stage and its arguments."""

    cfg: TimeViperConfig
    stage: StageConfig
    mesh: sharding.AnyMesh
    arguments: Arguments
    run: Any

    def trace(self) -> jax.stages.Traced:
        """The step's jaxpr, ready to be lowered under the same mesh."""
        whole = NamedSharding(self.mesh, P())
        places = jax.tree.map(lambda z: z.sharding, self.arguments.state)
        step = jax.jit(self.run, donate_argnums=0, out_shardings=(places, whole))
        with jax.set_mesh(self.mesh):
            return step.trace(*self.arguments)


def read_config(name: str) -> dict[str, Any]:
    """A config file's values; what follows a colon is its argument.

    Raises:
      ValueError: There is no such file.
    """
    path, _, arg = name.partition(":")
    if not os.path.exists(path):
        raise ValueError(f"There is no config {path!r}; give a file such as FILE.py.")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return json.loads(json.dumps(module.get_config(arg).to_dict()))


def make(
    config: Mapping[str, Any],
    mesh: sharding.AnyMesh,
    *,
    rows: int = 0,
    remat: bool | None = None,
) -> Program:
    """The step of a config's last stage.

    Args:
      config: As `read_config` returns it.
      mesh: Of a topology's devices.
      rows: Takes the place of the stage's `batch_size`, unless it is 0.
      remat: Takes the place of the model's, unless it is None.

    Raises:
      ValueError: The mesh does not divide the model or its batches.
    """
    stage = StageConfig.from_dict(config["stages"][config["stage_order"][-1]])
    stage = dataclasses.replace(stage, batch_size=rows or stage.batch_size)
    if not isinstance(stage.task, TextTask):
        raise ValueError("Only a stage of text can be compiled; this one is of frames.")
    model = config["model"] if remat is None else config["model"] | {"remat": remat}
    cfg = experiment.model_config(**model).with_transv(stage.transv)
    experiment.check_mesh(cfg, stage, mesh)
    graph, shapes = experiment.describe(cfg)
    lora = experiment.lora_config(config)
    pairs = jax.eval_shape(lambda: init_lora(shapes, lora, 0))
    shapes = {**shapes, **pairs}
    moving = stage.moving(shapes)
    params = {path: shapes[path] for path in shapes if path in moving}
    frozen = {path: shapes[path] for path in shapes if path not in moving}
    optimizer_cfg = OptimizerConfig(**config["optimizer"])
    guard_cfg = guard.GuardConfig(**config["guard"])
    optimizer = make_optimizer(
        params,
        make_schedule(stage.lr, stage.steps, optimizer_cfg),
        optimizer_cfg,
        stage.lr_multipliers,
    )
    return Program(
        cfg=cfg,
        stage=stage,
        mesh=mesh,
        arguments=Arguments(
            state=describe_state(params, optimizer, mesh, guard_cfg),
            frozen=sharding.place(frozen, sharding.shard_params(frozen, mesh)),
            batch=make_batch(cfg, stage, mesh),
        ),
        run=make_train_step(
            *(graph, stage.task.objective(ByteTokenizer()), optimizer),
            accumulate=stage.accumulate,
            adapt=functools.partial(merged, cfg=lora),
            guard_config=guard_cfg,
        ),
    )


def make_batch(
    cfg: TimeViperConfig, stage: StageConfig, mesh: sharding.AnyMesh
) -> Batch:
    """A batch as the pipeline makes it, of pixels or of stored features."""
    task, rows = stage.task, stage.batch_size
    text = (rows, task.num_frames * cfg.tokens_per_frame + task.text_tokens)
    frames = (rows, task.num_frames)
    size = cfg.vision.image_size
    arrays = {
        "tokens": (text, jnp.int32),
        "roles": (text, jnp.int32),
        "segment_ids": (text, jnp.int32),
        "loss_mask": (text, jnp.bool_),
        "frame_times": (frames, jnp.float32),
    }
    if task.cached:
        features = (*frames, cfg.tokens_per_frame, cfg.vision.embed_dim)
        arrays["features"] = features, jnp.float16
    else:
        arrays["frames"] = (*frames, size, size, 3), jnp.uint8

    def place(name, shape, dtype):
        path = (jax.tree_util.GetAttrKey(name),)
        at = NamedSharding(mesh, sharding.batch_spec(path, shape, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

    placed = {name: place(name, *array) for name, array in arrays.items()}
    return Batch(**placed, num_segments=task.num_segments)


def bytes_of_a_chip(tree: Any) -> int:
    """What a chip holds of these arrays."""
    return sum(
        jnp.dtype(z.dtype).itemsize * math.prod(z.sharding.shard_shape(z.shape))
        for z in jax.tree.leaves(tree)
    )


def segment_tokens(cfg: TimeViperConfig, stage: StageConfig) -> Sequence[int]:
    """How many tokens of a row each segment of layers between TransV's stages sees."""
    vision = stage.task.num_frames * cfg.tokens_per_frame
    shares = [1.0, *(stage.keep for stage in cfg.llm.transv)]
    return [int(vision * share) + stage.task.text_tokens for share in shares]
