"""Where every array lives on the mesh. Model code knows nothing of this.

Parameters are named by path ("llm/mlp/mixer/up/kernel"); a table of patterns says how
each is split. Matrices are split on the dimension that is not the model's width: its
shards stay whole rows, and their sizes suit every mesh. Stacked parameters keep their
leading axis of layers whole, as every device runs every layer.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped

Tree = TypeVar("Tree")

# `data` replicates parameters; `fsdp` and `tensor` split them; `context` splits time.
AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"))
_SPLIT = ("tensor", "fsdp")

_ONE_OF_TWO = "(?:(?:first|second)/)?"
_VISION = f"vision/{_ONE_OF_TWO}"

# A pattern matches a whole path, and every path matches exactly one pattern.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    # Stacked on a leading axis of layers.
    (r"llm/attention/mixer/[qkv]/kernel", P(None, None, "tensor", "fsdp")),  # D N H
    (r"llm/attention/mixer/out/kernel", P(None, "tensor", "fsdp", None)),  # N H D
    (r"llm/attention/mixer/[qkv]/bias", P(None, "tensor", "fsdp")),  # N H
    (r"llm/mlp/mixer/(up|gate)/kernel", P(None, None, _SPLIT)),  # D M
    (r"llm/mlp/mixer/down/kernel", P(None, _SPLIT, None)),  # M D
    (r"llm/mamba/mixer/in_[zxbc]/kernel", P(None, None, _SPLIT)),
    (r"llm/mamba/mixer/out/kernel", P(None, _SPLIT, None)),
    # One number a head: too small to gather again in every layer.
    (r"llm/mamba/mixer/in_dt/kernel", P(None, None, "tensor")),
    (r"llm/mamba/mixer/(a_log|d|dt_bias)", P(None, "tensor")),
    (r"llm/mamba/mixer/conv_[xbc]/kernel", P(None, None, "tensor")),
    (r"llm/mamba/mixer/conv_[xbc]/bias", P(None, "tensor")),
    (r"llm/mamba/mixer/norm/scale", P(None, "tensor")),
    (r"llm/(mamba|attention|mlp)/norm/scale", P()),
    (rf"{_VISION}blocks/attn/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (rf"{_VISION}blocks/attn/out/kernel", P(None, "tensor", None, "fsdp")),
    (rf"{_VISION}blocks/mlp/up/kernel", P(None, "fsdp", "tensor")),
    (rf"{_VISION}blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (rf"{_VISION}blocks/.*/(bias|scale)", P()),
    # Not stacked.
    (r"llm/embed/embedding", P(_SPLIT, None)),  # vocab D
    (r"llm/head/kernel", P(None, _SPLIT)),  # D vocab
    (r"llm/norm/scale", P()),
    (r"llm/transv/\d+/[qkv]/kernel", P(None, "tensor", "fsdp")),
    (r"llm/transv/\d+/[qkv]/bias", P("tensor", "fsdp")),
    (r"llm/transv/\d+/out/kernel", P("tensor", "fsdp", None)),
    (r"llm/transv/\d+/alpha", P()),
    (rf"projector/{_ONE_OF_TWO}layers/\d+/kernel", P("fsdp", "tensor")),
    (rf"projector/{_ONE_OF_TWO}layers/\d+/bias", P()),
    (rf"{_VISION}patch/kernel", P(None, "fsdp")),
    (rf"{_VISION}(positions|image_positions|registers)", P(None, "fsdp")),
    (rf"{_VISION}(patch/bias|class_token)", P()),
    (r"time/embedding", P()),
    # Small beside the matrices that they change.
    (r".*/lora_[ab]", P()),
)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh, in the one place that builds it; -1 takes every device that is left."""
    sizes = [data, fsdp, tensor, context]
    devices = jax.devices() if devices is None else devices
    if sizes.count(-1) > 1:
        raise ValueError(f"Only one axis can take what is left, not {sizes}.")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    left, over = divmod(len(devices), fixed)
    sizes = [left if size == -1 else size for size in sizes]
    if over or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"A mesh of {dict(zip(AXES, sizes, strict=True))} does not take all of"
            f" {len(devices)} devices; give one axis -1."
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def spec_of(path: str) -> P:
    """How the parameter named `path` is split."""
    found = [(rule, spec) for rule, spec in PARAM_RULES if re.fullmatch(rule, path)]
    if len(found) != 1:
        rules = [rule for rule, _ in found]
        raise ValueError(
            f"{len(found)} sharding rules match parameter {path!r} ({rules}); one must."
        )
    return found[0][1]


def shard_params(paths: Iterable[str], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter, by the path that names it."""
    return {path: NamedSharding(mesh, spec_of(path)) for path in paths}


def shard_like_params(state: Tree, paths: Iterable[str], mesh: Mesh) -> Tree:
    """Shardings of an optimizer's state: its moments live where their parameters do.

    A moment is known by the dict of paths it is kept in; what has no path (a count of
    steps) is replicated.
    """
    shardings, whole = shard_params(paths, mesh), NamedSharding(mesh, P())

    def one(keys, _):
        names = [getattr(key, "key", None) for key in keys]
        return next((shardings[name] for name in names if name in shardings), whole)

    return jax.tree_util.tree_map_with_path(one, state)


def put(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this host's rows of a batch on its devices, split over the batch."""
    sharding = NamedSharding(mesh, BATCH)

    def one(array: Shaped[np.ndarray, "B ..."]) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(one, batch)
