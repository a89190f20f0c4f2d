"""Where every array lives on the mesh. Model code knows nothing of this.

Parameters are named by path ("llm/mlp/mixer/up/kernel"); a table of patterns says how
each is split. Matrices are split on the dimension that is not the model's width: its
shards stay whole rows, and their sizes suit every mesh. Stacked parameters keep their
leading axis of layers whole, as every device runs every layer.

Under a mesh, modules run on each device's shards (`on_shards`): rows are split over
data and fsdp, their tokens over context, heads and channels over tensor; parameters
are gathered over fsdp and context where they are used, in the dtype of computation.
The encoder's are split over fsdp and tensor alone: its widths have few powers of two.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh  # The latter has sizes, and no devices.

# `data` replicates parameters, the others split them; `context` splits time as well.
AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"))
TOKENS = P(("data", "fsdp"), "context")
FRAMES = P(("data", "fsdp"), ("context", "tensor"))
_SPLIT = ("tensor", "fsdp")
_ALL = ("tensor", "fsdp", "context")
_GATHERED = ("fsdp", "context")  # Of a module's parameters, where it runs.

_ONE_OF_TWO = "(?:(?:first|second)/)?"
_VISION = f"vision/{_ONE_OF_TWO}"

# A pattern matches a whole path, and every path matches exactly one pattern.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    # Stacked on a leading axis of layers.
    (r"llm/attention/mixer/[qkv]/kernel", P(None, "context", "tensor", "fsdp")),
    (r"llm/attention/mixer/out/kernel", P(None, "tensor", "fsdp", "context")),
    (r"llm/attention/mixer/[qkv]/bias", P(None, "tensor", "fsdp")),  # N H
    # Few powers of two are in an MLP's width, so that context takes the model's.
    (r"llm/mlp/mixer/(up|gate)/kernel", P(None, "context", _SPLIT)),  # D M
    (r"llm/mlp/mixer/down/kernel", P(None, _SPLIT, "context")),  # M D
    (r"llm/mamba/mixer/in_[zxbc]/kernel", P(None, "context", _SPLIT)),
    (r"llm/mamba/mixer/out/kernel", P(None, _ALL, None)),
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
    (r"llm/embed/embedding", P(("tensor", "context"), "fsdp")),  # vocab D
    (r"llm/head/kernel", P(None, _ALL)),  # D vocab
    (r"llm/norm/scale", P()),
    (r"llm/transv/\d+/[qkv]/kernel", P("context", "tensor", "fsdp")),
    (r"llm/transv/\d+/[qkv]/bias", P("tensor", "fsdp")),
    (r"llm/transv/\d+/out/kernel", P("tensor", "fsdp", "context")),
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
    # Pods are tori of few dimensions: 64 x 4 of 16 x 16 chips cuts one of them.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def spec_of(path: str) -> P:
    """How the parameter named `path` is split."""
    found = [(rule, spec) for rule, spec in PARAM_RULES if re.fullmatch(rule, path)]
    if len(found) != 1:
        rules = [rule for rule, _ in found]
        raise ValueError(
            f"{len(found)} sharding rules match parameter {path!r} ({rules}); one must."
        )
    return found[0][1]


def shard_params(paths: Iterable[str], mesh: AnyMesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter, by the path that names it."""
    return {path: NamedSharding(mesh, spec_of(path)) for path in paths}


def shard_like_params(state: Tree, paths: Iterable[str], mesh: AnyMesh) -> Tree:
    """Shardings of an optimizer's state: its moments live where their parameters do.

    A moment is known by the dict of paths it is kept in; what has no path (a count of
    steps) is replicated.
    """
    shardings, whole = shard_params(paths, mesh), NamedSharding(mesh, P())

    def one(keys, _):
        names = [getattr(key, "key", None) for key in keys]
        return next((shardings[name] for name in names if name in shardings), whole)

    return jax.tree_util.tree_map_with_path(one, state)


@functools.lru_cache
def feed(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this host makes, and how many parts there are.

    Hosts that share rows, because context or tensor cuts them, make the same part.
    """
    split = NamedSharding(mesh, BATCH)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    of_host: dict[int, set[int]] = {}
    for device, (place,) in split.devices_indices_map((rows,)).items():
        of_host.setdefault(device.process_index, set()).add(place.start or 0)
    parts = sorted({tuple(sorted(places)) for places in of_host.values()})
    if sum(map(len, parts)) != rows:
        raise ValueError(
            f"Hosts share some of their rows and not others: {parts}; make data x fsdp"
            " a multiple of the hosts, or context x tensor one of a host's devices."
        )
    return parts.index(tuple(sorted(of_host[jax.process_index()]))), len(parts)


def put(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this host's rows of a batch on its devices.

    They are split over the batch; the frames of a row, where they divide, over the
    devices that share it.
    """
    _, parts = feed(mesh)

    def one(path, array: Shaped[np.ndarray, "B ..."]) -> jax.Array:
        whole = (len(array) * parts, *array.shape[1:])
        place = NamedSharding(mesh, batch_spec(path, whole, mesh))
        return jax.make_array_from_process_local_data(place, array, whole)

    return jax.tree_util.tree_map_with_path(one, batch)


def place(shapes: Tree, places: Tree) -> Tree:
    """Arrays without values where `places` says, for a program that is not run."""
    return jax.tree.map(
        lambda z, at: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=at),
        shapes,
        places,
    )


def batch_spec(path: tuple, shape: Sequence[int], mesh: AnyMesh) -> P:
    """How one array of a batch is split; `path` is its place in the batch's tree."""
    if _FRAMES_OF_ROWS.get(_name(path)) == len(shape) and divides(shape, FRAMES, mesh):
        return FRAMES
    return BATCH


# Arrays of B rows of F frames, by name and number of axes.
_FRAMES_OF_ROWS = {"frames": 5, "features": 4}


def _name(path: tuple) -> str:
    return getattr(path[-1], "name", "") if path else ""


def divides(shape: Sequence[int], spec: P, mesh: AnyMesh) -> bool:
    """Whether all shards of such an array are of one size."""
    return all(
        size % math.prod(mesh.shape[name] for name in _names(entry)) == 0
        for size, entry in zip(shape, spec, strict=False)
    )


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh that split one axis of an array."""
    return (entry,) if isinstance(entry, str) else entry or ()


def check_divides(name: str, size: int, mesh: AnyMesh, *axes: str) -> None:
    """Raises unless `size` things are as many on every device along these axes."""
    if not divides((size,), P(axes), mesh):
        sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise ValueError(
            f"{name}={size} does not divide over the mesh's {sizes}; use a multiple of"
            f" {math.prod(mesh.shape[axis] for axis in axes)}, or another mesh."
        )


def check_params(shapes: Mapping[str, Shaped[Any, "..."]], mesh: AnyMesh) -> None:
    """Raises unless the mesh divides every parameter."""
    for path, array in shapes.items():
        if not divides(array.shape, spec_of(path), mesh):
            raise ValueError(
                f"The mesh {dict(mesh.shape)} does not divide {path} {array.shape},"
                f" which is split as {spec_of(path)}; use smaller axes."
            )


# Within a program.


def active_mesh() -> AbstractMesh | None:
    """The mesh in force, if it splits arrays here: not where each device has its own.

    `jax.set_mesh` puts one in force.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def axis_size(name: str) -> int:
    """How many shards an axis of the mesh in force makes: 1 without a mesh."""
    mesh = active_mesh()
    return 1 if mesh is None else mesh.shape[name]


def constrain_params(params: dict[str, Array]) -> dict[str, Array]:
    """Keeps these, such as gradients by path, where the parameters are."""
    mesh = active_mesh()
    if mesh is None:
        return params
    return {
        path: lax.with_sharding_constraint(array, NamedSharding(mesh, spec_of(path)))
        for path, array in params.items()
    }


def context_axis() -> str | None:
    """The axis that splits a row's tokens, where there is more than one shard."""
    return "context" if axis_size("context") > 1 else None


def on_shards(
    run: Callable,
    modules: Mapping[str, nnx.Module],
    *args: Any,
    in_specs: tuple,
    out_specs: Any,
    dtype: str,
    stacked: bool = False,
    gathered: tuple[str, ...] = _GATHERED,
) -> Any:
    """`run(*modules, *args)` on every device, each with its shards of all arrays.

    `modules` are named by the beginning of their parameters' paths; `stacked` ones
    were taken out of their stack. Parameters arrive whole but for the axes that are
    not `gathered`, cast to `dtype` before they travel.
    """
    graphs, params, specs = [], [], []
    for name, module in modules.items():
        graph, state = nnx.split(module)
        flat = dict(nnx.to_flat_state(state))
        graphs.append(graph)
        params.append({path: param[...] for path, param in flat.items()})
        specs.append({path: _local_spec(name, path, stacked) for path in flat})

    def shard(params, *args):
        whole = []
        for graph, arrays, spec in zip(graphs, params, specs, strict=True):
            flat = {
                path: nnx.Param(_gather(array, spec[path], gathered, dtype))
                for path, array in arrays.items()
            }
            whole.append(nnx.merge(graph, nnx.from_flat_state(flat)))
        return run(*whole, *args)

    return jax.shard_map(
        shard,
        mesh=active_mesh(),
        in_specs=(specs, *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )(params, *args)


def _local_spec(name: str, path: tuple, stacked: bool) -> P:
    spec = spec_of("/".join(map(str, (name, *path))))
    return P(*spec[1:]) if stacked else spec


def _gather(
    array: Shaped[Array, "..."], spec: P, axes: tuple[str, ...], dtype: str
) -> Shaped[Array, "..."]:
    """Joins a parameter's shards along these axes of the mesh, the innermost first.

    Programs name it "parameters", and no other exchange.
    """
    for dim, names in enumerate(spec):
        for name in reversed([name for name in _names(names) if name in axes]):
            with jax.named_scope("parameters"):
                array = lax.all_gather(array.astype(dtype), name, axis=dim, tiled=True)
    return array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_shards(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """The sum over an axis of the mesh, as the last thing that `on_shards` runs.

    What leaves is then the same on all its devices. Each gets its part of one gradient
    back, and the whole is that many times as much: no need to sum it over devices.
    """
    return lax.psum(x, axis)


def _sum_forward(x, axis):
    return sum_shards(x, axis), None


def _sum_backward(axis, _, gradient):
    return (gradient * lax.axis_size(axis),)


sum_shards.defvjp(_sum_forward, _sum_backward)
