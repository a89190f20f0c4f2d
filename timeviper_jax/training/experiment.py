"""A run's config as objects: the model it names, its stages and what each learns from.

Every field must be given and known; a name that is missing or misspelt is an error.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from timeviper_jax import presets, sharding
from timeviper_jax.data import pipeline
from timeviper_jax.data.examples import Batch, Role
from timeviper_jax.data.fetch import UrlConfig
from timeviper_jax.data.frames import FrameBatch
from timeviper_jax.data.media import MediaLimits
from timeviper_jax.data.tokenizer import Tokenizer
from timeviper_jax.data.workers import WorkerConfig
from timeviper_jax.layers.lora import LoraConfig, is_lora
from timeviper_jax.llm.transv import Stage as TransVStage
from timeviper_jax.timeviper import TimeViper, TimeViperConfig
from timeviper_jax.training import loss
from timeviper_jax.training.parameters import Params, Shapes, matching, merge, split
from timeviper_jax.training.speed import Counts
from timeviper_jax.training.step import Objective
from timeviper_jax.vision.pair import replace_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameTask:
    """Learn which word says what a frame shows; the first is for nothing.

    `per_record` frames come from one place, a share of them with something to see.
    """

    words: tuple[str, ...]
    per_record: int
    share: float

    reads = r"^(vision|projector|llm/embed)/"

    def objective(self, tokenizer: Tokenizer) -> Objective:
        ids = tuple(tokenizer.encode(f" {word}")[-1] for word in self.words)
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"words={self.words} end in the tokens {ids}; they must differ."
            )
        return functools.partial(loss.frame_objective, words=ids)

    def count(self, batch: FrameBatch, cfg: TimeViperConfig) -> Counts:
        """What a batch holds over all hosts: no frame is padding."""
        return {"frames": jnp.int32(len(batch.labels))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """Learn to answer. The first four are a row's capacities.

    `cached` takes the frozen encoder's features from the store instead of pixels;
    `where` chooses items by their notes, as in `manifest.select`.
    """

    num_frames: int
    text_tokens: int
    answer_tokens: int
    num_segments: int
    cached: bool
    split: str
    where: tuple[tuple[str, tuple[Any, ...]], ...]

    @property
    def reads(self) -> str:
        encoder = "" if self.cached else "vision|"
        return rf"^({encoder}projector|time|llm)/"

    def objective(self, _: Tokenizer) -> Objective:
        return lambda model, batch: loss.text_objective(
            model, batch, answer_tokens=self.answer_tokens
        )

    def count(self, batch: Batch, cfg: TimeViperConfig) -> Counts:
        """The tokens of a batch that are no padding, and the frames that they show."""
        vision = jnp.sum(batch.roles == Role.VISION)
        return {
            "tokens": jnp.sum(batch.roles != Role.PAD),
            "frames": vision // cfg.tokens_per_frame,
        }


TASKS = {"frames": FrameTask, "text": TextTask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training. `frozen` and `lr_multipliers` are patterns of paths.

    A step averages over `batch_size` rows, which go through in `accumulate` parts.
    """

    task: FrameTask | TextTask
    steps: int
    batch_size: int
    accumulate: int
    lr: float
    lr_multipliers: tuple[tuple[str, float], ...]
    frozen: tuple[str, ...]
    transv: tuple[TransVStage, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StageConfig":
        """The stage that a config's mapping says; JSON's lists become tuples."""
        values = {name: _tuples(value) for name, value in values.items()}
        task = dict(values.pop("task"))
        transv = tuple(TransVStage(**stage) for stage in values.pop("transv"))
        kind = task.pop("kind")
        if kind not in TASKS:
            raise ValueError(f"task.kind={kind!r} is not one of {sorted(TASKS)}.")
        return cls(task=TASKS[kind](**task), transv=transv, **values)

    def moving(self, paths: Iterable[str]) -> set[str]:
        """The paths that this stage trains: what it reads, less what is frozen.

        A matrix that LoRA changes stands still.
        """
        paths = list(paths)
        read = {path for path in paths if re.search(self.task.reads, path)}
        adapted = {path.rpartition("/")[0] for path in paths if is_lora(path)}
        return read - matching(paths, self.frozen) - adapted


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_tuples, value))
    return value


def model_config(
    preset: str,
    *,
    dtype: str,
    param_dtype: str,
    rolled: bool,
    remat: bool,
    remat_keeps: str = "inputs",
    encoder: str = "",
    arch: str = "tome_mlp-16",
    **changes: Any,
) -> TimeViperConfig:
    """A preset's sizes, computed as a run wants; `changes` are of the whole model.

    `preset` is a name, or a file of sizes that the conversion of a checkpoint left.
    `encoder` takes the place of its own, with the projector `arch` behind it: both in
    the words of `presets.with_encoder`.
    """
    cfg = presets.find_config(preset)
    if encoder:
        cfg = presets.with_encoder(cfg, presets.encoder(encoder), arch)
    dtypes = dict(dtype=dtype, param_dtype=param_dtype)
    return dataclasses.replace(
        cfg,
        vision=replace_each(cfg.vision, remat=remat, **dtypes),
        projector=replace_each(cfg.projector, **dtypes),
        llm=dataclasses.replace(
            cfg.llm, rolled=rolled, remat=remat, remat_keeps=remat_keeps, **dtypes
        ),
        **changes,
    )


def text_data(
    data: Mapping[str, Any], stage: StageConfig, cfg: TimeViperConfig
) -> pipeline.DataConfig:
    """What the pipeline is to make for a text stage; `data` is the config's."""
    task = stage.task
    return pipeline.DataConfig(
        manifest=data["manifest"],
        root=data["root"],
        split=task.split,
        where=task.where,
        batch_size=stage.batch_size,
        num_frames=task.num_frames,
        text_tokens=task.text_tokens,
        num_segments=task.num_segments,
        tokens_per_frame=cfg.tokens_per_frame,
        fit=cfg.fit,
        clip_frames=cfg.vision.clip_frames,
        template=data["template"],
        lanes=data["lanes"],
        num_threads=data["num_threads"],
        max_bad_share=data["max_bad_share"],
        media=MediaLimits(**data["media"]),
        workers=WorkerConfig(**data["workers"]),
        urls=UrlConfig(**{name: _tuples(v) for name, v in data["urls"].items()}),
    )


def lora_config(config: Mapping[str, Any]) -> LoraConfig:
    """What a run's config says of LoRA; runs from before it have none."""
    values = config.get("lora", dict(targets=(), rank=1, alpha=1.0))
    return LoraConfig(**{name: _tuples(value) for name, value in values.items()})


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by dotted name; an empty mapping is a value."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


@functools.lru_cache
def describe(cfg: TimeViperConfig) -> tuple[nnx.GraphDef, Shapes]:
    """The model's structure, and its parameters' shapes by path; builds nothing."""
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    return graph, {
        "/".join(map(str, path)): jax.ShapeDtypeStruct(param.shape, param.dtype)
        for path, param in flat
    }


def check_mesh(
    cfg: TimeViperConfig, stage: StageConfig, mesh: sharding.AnyMesh
) -> None:
    """Raises, in one line, where a mesh does not divide the model or its batches."""
    llm, task = cfg.llm, stage.task
    heads = {"*": ("num_heads", "num_kv_heads"), "M": ("ssm_heads", "ssm_groups")}
    for name in [name for kind in heads if kind in llm.pattern for name in heads[kind]]:
        sharding.check_divides(name, getattr(llm, name), mesh, "tensor")
    sharding.check_divides("embed_dim", llm.embed_dim, mesh, "tensor")
    if isinstance(task, TextTask):
        tokens = task.num_frames * cfg.tokens_per_frame + task.text_tokens
        sharding.check_divides("A row's tokens", tokens, mesh, "context")
    _, shapes = describe(cfg)
    sharding.check_params(shapes, mesh)
    rows, over = divmod(stage.batch_size, stage.accumulate)
    if over:
        raise ValueError(
            f"batch_size={stage.batch_size} does not divide into"
            f" accumulate={stage.accumulate} parts."
        )
    sharding.check_divides("batch_size / accumulate", rows, mesh, "data", "fsdp")


def fill(cfg: TimeViperConfig, params: Params, seed: int, mesh: Mesh) -> Params:
    """The model's parameters: those given, and initial values for the others.

    Those given take the dtype that the model has. New transfers of TransV start from
    the self-attention they stand before.
    """
    _, shapes = describe(cfg)
    known = {path: array for path, array in params.items() if path in shapes}
    _check_shapes(known, shapes)
    known = {path: array.astype(shapes[path].dtype) for path, array in known.items()}
    missing = [path for path in shapes if path not in known]
    if not missing:
        return known

    def initial(known):
        model = TimeViper(cfg, rngs=nnx.Rngs(seed))
        graph, params = split(model)
        model = merge(graph, {**params, **known})
        if any(path.startswith("llm/transv/") for path in missing):
            model.llm.init_transfers()
        _, params = split(model)
        return {path: params[path] for path in missing}

    shardings = sharding.shard_params(missing, mesh)
    # On a CPU, optimising a program that runs once takes longer than running it.
    quick = {"xla_backend_optimization_level": 0}
    initial = jax.jit(
        initial,
        out_shardings=shardings,
        compiler_options=quick if jax.default_backend() == "cpu" else None,
    )
    return {**known, **initial(known)}


def _check_shapes(params: Params, shapes: Shapes) -> None:
    wrong = [
        f"{path} is {array.shape}, the model wants {shapes[path].shape}"
        for path, array in params.items()
        if array.shape != shapes[path].shape
    ]
    if wrong:
        raise ValueError(
            "These parameters are another model's; use its preset:\n  "
            + "\n  ".join(wrong)
        )
