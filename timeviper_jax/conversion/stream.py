"""Checkpoints into sharded arrays and out again, one tensor at a time.

Beyond the arrays themselves the host holds one tensor and its converted parts, so that
the size of a model is limited by where its arrays live, not by the machine that reads.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from timeviper_jax import sharding
from timeviper_jax.conversion.files import (
    Abstract,
    TensorFiles,
    in_shards,
    write_file,
    write_index,
)
from timeviper_jax.conversion.rules import (
    WHOLE,
    Placement,
    Rule,
    assemble,
    place,
    write_plan,
)

Shapes = Mapping[str, jax.ShapeDtypeStruct]

SHARD_BYTES = 5 * 10**9  # Of a file that is written, as published ones have it.


def load(
    files: TensorFiles,
    shapes: Shapes,
    rules: Sequence[Rule],
    mesh: Mesh,
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
    only: Iterable[str] = (),
    cast: bool = False,
) -> dict[str, jax.Array]:
    """The parameters that these files fill, by path, where `sharding.py` puts them.

    Args:
      files: The published tensors.
      shapes: The model's parameters by path.
      rules: How names and layouts map.
      mesh: The devices.
      ignore: Patterns of published names that are deliberately unused.
      keep: Patterns of paths that no tensor needs to fill; they are left out.
      only: Patterns found in the paths that are wanted; none is all.
      cast: Allow dtypes that lose digits, such as float32 to bfloat16.

    Raises:
      ValueError: Names, shapes or dtypes do not fit; all of them are listed.
    """
    placements = place(
        files.shapes,
        {path: shape.shape for path, shape in shapes.items()},
        rules,
        ignore=ignore,
        keep=keep,
        only=only,
    )
    _check_dtypes(files, shapes, placements, cast)
    arrays: dict[str, jax.Array] = {}
    for name, fills in _by_name(placements).items():
        tensor = files.read(name)
        for fill in fills:
            part = fill.rule.load(tensor)
            own, spec = shapes[fill.path], sharding.spec_of(fill.path)
            if fill.layer == WHOLE:
                arrays[fill.path] = _put(part, own.dtype, NamedSharding(mesh, spec))
                continue
            if fill.path not in arrays:
                arrays[fill.path] = _zeros(own, NamedSharding(mesh, spec))
            layer = _put(part, own.dtype, NamedSharding(mesh, P(*spec[1:])))
            arrays[fill.path] = _set_layer(arrays[fill.path], layer, fill.layer)
    return arrays


def _by_name(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    fills: dict[str, list[Placement]] = {}
    for placement in placements:
        fills.setdefault(placement.name, []).append(placement)
    return fills


def _check_dtypes(
    files: TensorFiles, shapes: Shapes, placements: Iterable[Placement], cast: bool
) -> None:
    """Raises where a parameter cannot hold what its tensor says."""
    wrong = []
    for name, path, _, _ in placements:
        theirs, ours = files.entries[name].dtype, np.dtype(shapes[path].dtype)
        floats = jnp.issubdtype(theirs, jnp.floating)
        if not floats or theirs.itemsize == 1:
            wrong.append(f"{name} is {theirs}: quantised weights are not read")
        elif not cast and not _holds(ours, theirs):
            wrong.append(f"{name} is {theirs}, {path} is {ours}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors have another dtype than their parameters can hold;"
            " choose a wider param_dtype, or allow it with `cast` (--cast):\n  "
            + "\n  ".join(wrong)
        )


def _holds(ours: np.dtype, theirs: np.dtype) -> bool:
    """Whether every number of one dtype is one of the other."""
    return jnp.promote_types(ours, theirs) == ours


def _put(
    part: Shaped[np.ndarray, "..."], dtype: np.dtype, where: NamedSharding
) -> Shaped[Array, "..."]:
    """An array of which each device is given its own piece alone."""
    return jax.make_array_from_callback(
        part.shape, where, lambda index: np.asarray(part[index], dtype=dtype, order="C")
    )


def _zeros(shape: jax.ShapeDtypeStruct, where: NamedSharding) -> Shaped[Array, "..."]:
    make = lambda: jnp.zeros(shape.shape, shape.dtype)
    return jax.jit(make, out_shardings=where)()


# The old array's memory becomes the new one's.
@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(
    stack: Shaped[Array, "layers ..."],
    layer: Shaped[Array, "..."],
    index: int | Int[Array, ""],
) -> Shaped[Array, "layers ..."]:
    return stack.at[index].set(layer)


# Out again.


def plan(
    params: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    rules: Sequence[Rule],
    dtypes: Mapping[str, np.dtype],
) -> tuple[dict[str, list[Placement]], dict[str, Abstract]]:
    """What makes up each published tensor, and how it will be written.

    `dtypes` are of published names; a tensor that is not in it has its parameter's.
    """
    fills = write_plan({path: param.shape for path, param in params.items()}, rules)
    tensors = {}
    for name, own in fills.items():
        dtype = dtypes.get(name, np.dtype(params[own[0].path].dtype))
        parts = [
            np.broadcast_to(np.int8(0), _layer_shape(params[fill.path].shape, fill))
            for fill in own
        ]
        tensors[name] = Abstract(dtype=np.dtype(dtype), shape=_shape(own, parts))
    return fills, tensors


def _layer_shape(shape: tuple[int, ...], fill: Placement) -> tuple[int, ...]:
    return shape if fill.layer == WHOLE else shape[1:]


def _shape(
    fills: Sequence[Placement], parts: Sequence[Shaped[np.ndarray, "..."]]
) -> tuple[int, ...]:
    """The shape that `assemble` would give, without doing it."""
    shapes = [f.rule.save(part).shape for f, part in zip(fills, parts, strict=True)]
    if len(shapes) == 1:
        return shapes[0]
    axis = fills[0].rule.cut.axis
    length = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], length, *shapes[0][axis + 1 :])


def save(
    folder: pathlib.Path,
    params: Mapping[str, jax.Array],
    rules: Sequence[Rule],
    *,
    dtypes: Mapping[str, np.dtype] | None = None,
    layout: Mapping[str, Sequence[str]] | None = None,
    carried: TensorFiles | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Writes parameters as published tensors; returns the files.

    Args:
      folder: Where to; it is made.
      params: By path.
      rules: How names and layouts map.
      dtypes: Of published tensors, where not their parameter's.
      layout: Which names stand in which file, in order; by default files of 5 GB.
      carried: Tensors that the model has no parameters for, written as they are.
      metadata: What each file says of itself.

    Raises:
      ValueError: A parameter has no name, or `layout` names other tensors.
    """
    fills, tensors = plan(params, rules, dtypes or {})
    extra = carried.entries if carried else {}
    tensors |= {
        name: Abstract(dtype=entry.dtype, shape=entry.shape)
        for name, entry in extra.items()
    }
    layout = dict(layout or in_shards(tensors, SHARD_BYTES))
    _check_layout(layout, tensors)

    def one(name: str) -> Shaped[np.ndarray, "..."]:
        if name in extra:
            return carried.read(name)
        parts = [_part(params[fill.path], fill) for fill in fills[name]]
        return np.asarray(assemble(fills[name], parts), tensors[name].dtype)

    folder.mkdir(parents=True, exist_ok=True)
    for file, names in layout.items():
        about = {name: tensors[name] for name in names}
        write_file(folder / file, about, _each(one, names), metadata or {})
    write_index(folder, layout)
    return [folder / file for file in layout]


def _each(
    one: Callable[[str], Shaped[np.ndarray, "..."]], names: Iterable[str]
) -> Iterator[Shaped[np.ndarray, "..."]]:
    return (one(name) for name in names)


def _part(param: jax.Array, fill: Placement) -> Shaped[np.ndarray, "..."]:
    """One layer on the host, and no other."""
    return np.asarray(param if fill.layer == WHOLE else param[fill.layer])


def _check_layout(
    layout: Mapping[str, Sequence[str]], tensors: Mapping[str, Abstract]
) -> None:
    named = {name for names in layout.values() for name in names}
    missing, extra = sorted(named - {*tensors}), sorted({*tensors} - named)
    if missing or extra:
        lines = [f"{name}: no parameter makes it" for name in missing]
        lines += [f"{name} {tensors[name].shape}: it is in no file" for name in extra]
        raise ValueError(
            f"{len(lines)} tensors differ from those that were published:\n  "
            + "\n  ".join(lines)
        )
