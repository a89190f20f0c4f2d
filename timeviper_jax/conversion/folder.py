"""A folder of converted parameters, of one published checkpoint or several.

FOLDER/model.json                  the model's sizes, see presets.py
FOLDER/FAMILY/params/              arrays by path, as orbax keeps them
FOLDER/FAMILY/published.json       names, dtypes and files as they were published
FOLDER/FAMILY/carried.safetensors  tensors that the model has no use for
FOLDER/FAMILY/beside/              config.json, tokenizer and the like

A language model and an encoder converted into one folder make a model to start from.
What was converted is written back to the byte.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from timeviper_jax import presets, sharding
from timeviper_jax.conversion import stream
from timeviper_jax.conversion.families import (
    LANGUAGE,
    VISION,
    Names,
    family_of,
    names_of,
    sized,
)
from timeviper_jax.conversion.files import (
    Abstract,
    TensorFiles,
    copy_side_files,
    open_files,
    read_header,
    write_file,
)
from timeviper_jax.conversion.rules import Rule, matches_any
from timeviper_jax.timeviper import TimeViper, TimeViperConfig

Params = dict[str, jax.Array]

_MODEL, _RECORD, _CARRIED = "model.json", "published.json", "carried.safetensors"


# Published checkpoints.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint as it was published, and the model that it is (a part) of."""

    path: pathlib.Path
    files: TensorFiles
    family: str
    cfg: TimeViperConfig

    @property
    def names(self) -> Names:
        return names_of(self.family, self.cfg)

    @property
    def folder(self) -> pathlib.Path:
        return self.path if self.path.is_dir() else self.path.parent


def open_published(
    path: str | os.PathLike,
    base: TimeViperConfig,
    *,
    family: str = "",
    allow_pickle: bool = False,
) -> Published:
    """Opens a checkpoint; its own `config.json`, if there is one, overrides `base`.

    `family` is found by the tensors' names where it is not given.
    """
    path = pathlib.Path(path)
    files = open_files(path, allow_pickle=allow_pickle)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    config = json.loads(beside.read_text()) if beside.is_file() else None
    family = family or family_of(files.entries, config)
    cfg = sized(family, base, config)
    return Published(path=path, files=files, family=family, cfg=cfg)


def load_published(
    published: Published, mesh: Mesh, *, parts: Sequence[str] = (), cast: bool = False
) -> Params:
    """The parameters that a checkpoint fills, by path.

    The others are left out: an encoder where the file is a language model, TransV where
    it has none. `parts` are patterns found in the paths that are wanted; none is all.
    """
    shapes, names = param_shapes(published.cfg), published.names
    beyond = [path for path in shapes if not reaches(names.rules, path)]
    if not any(".merge_modules." in name for name in published.files.entries):
        beyond += [path for path in shapes if path.startswith("llm/transv/")]
    return stream.load(
        published.files,
        shapes,
        names.rules,
        mesh,
        ignore=names.unused,
        keep=map(re.escape, beyond),
        only=parts,
        cast=cast,
    )


def reaches(rules: Iterable[Rule], path: str) -> bool:
    """Whether a table could fill this parameter, or a layer of it."""
    return any(rule.names(path) or rule.names(f"{path}[0]") for rule in rules)


def param_shapes(cfg: TimeViperConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The whole model's parameters by path; builds nothing."""
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    return {
        "/".join(map(str, path)): jax.ShapeDtypeStruct(param.shape, param.dtype)
        for path, param in nnx.to_flat_state(nnx.state(model))
    }


def natural_dtype(files: TensorFiles) -> str:
    """The narrowest dtype that holds every tensor of a checkpoint."""
    dtypes = {entry.dtype for entry in files.entries.values()}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return str(functools.reduce(jnp.promote_types, floats))


# Converted folders.


def write_converted(
    folder: str | os.PathLike, published: Published, params: Params
) -> None:
    """Keeps what was loaded, and what it takes to write it back."""
    folder = pathlib.Path(folder).absolute()
    own = folder / published.family
    if own.exists():
        raise FileExistsError(
            f"{own} is there already; remove it, or convert into another folder."
        )
    own.mkdir(parents=True)
    _write_config(folder, published)
    files = published.files
    unused = [n for n in files.entries if matches_any(published.names.unused, n)]
    about = {name: Abstract.of(files.entries[name]) for name in unused}
    write_file(own / _CARRIED, about, map(files.read, unused), {})
    copy_side_files(published.folder, own / "beside")
    kept = {*unused, *stream.plan(params, published.names.rules, {})[0]}
    (own / _RECORD).write_text(json.dumps(_record(files, kept), indent=1) + "\n")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(own / "params", params)


def _write_config(folder: pathlib.Path, published: Published) -> None:
    """The sizes; a second checkpoint adds its own to those of the first."""
    cfg = published.cfg
    if (folder / _MODEL).exists():
        there = presets.read_config(folder / _MODEL)
        if published.family in VISION:
            cfg = dataclasses.replace(there, vision=cfg.vision)
        elif published.family in LANGUAGE:
            cfg = dataclasses.replace(cfg, vision=there.vision)
    presets.write_config(folder / _MODEL, cfg)


def _record(files: TensorFiles, kept: set[str]) -> list[dict[str, Any]]:
    """How the tensors lay in their files; what was not converted is left out."""
    record = []
    for file in files.files:
        dtypes = {
            name: str(entry.dtype)
            for name, entry in files.entries.items()
            if entry.file == file and name in kept
        }
        safe = file.suffix == ".safetensors"
        metadata = read_header(file)[1] if safe else {}
        name = file.with_suffix(".safetensors").name
        record.append(dict(file=name, metadata=metadata, dtypes=dtypes))
    return [file for file in record if file["dtypes"]]


def is_converted(folder: str | os.PathLike) -> bool:
    return (pathlib.Path(folder) / _MODEL).is_file()


def converted_families(folder: str | os.PathLike) -> list[str]:
    """The checkpoints that were converted into a folder."""
    return sorted(
        path.parent.name for path in pathlib.Path(folder).glob(f"*/{_RECORD}")
    )


def read_converted(
    folder: str | os.PathLike, mesh: Mesh, *, parts: Sequence[str] = ()
) -> Params:
    """The parameters of a converted folder, where `sharding.py` puts them."""
    params: Params = {}
    for family in converted_families(folder):
        params |= read_params(pathlib.Path(folder) / family / "params", mesh, parts)
    return params


def read_params(
    path: str | os.PathLike, mesh: Mesh, parts: Sequence[str] = ()
) -> Params:
    """Parameters that orbax keeps by path, in a converted folder or in a run."""
    path = pathlib.Path(path).absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata.tree
        wanted = [
            p for p in metadata if not parts or any(re.search(q, p) for q in parts)
        ]
        places = sharding.shard_params(wanted, mesh)
        arguments = {p: ocp.ArrayRestoreArgs(sharding=places[p]) for p in wanted}
        return checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=dict.fromkeys(wanted, 0),
                restore_args=arguments,
                partial_restore=True,
            ),
        )


# Out again.


def save_published(
    folder: str | os.PathLike,
    params: Mapping[str, jax.Array],
    cfg: TimeViperConfig,
    family: str,
    *,
    like: str | os.PathLike = "",
    dtype: str = "",
) -> list[pathlib.Path]:
    """Writes parameters as a family publishes them; returns the files.

    Args:
      folder: Where to.
      params: By path; those that the family has no names for must not be among them.
      cfg: The whole model's sizes.
      family: Whose names.
      like: A converted folder: names, dtypes, files and carried tensors are as there.
      dtype: Of every tensor that `like` says nothing of; by default its parameter's.
    """
    folder, names = pathlib.Path(folder), names_of(family, cfg)
    _, tensors = stream.plan(params, names.rules, {})
    dtypes = {name: np.dtype(dtype) for name in tensors} if dtype else {}
    if not like:
        return stream.save(folder, params, names.rules, dtypes=dtypes)
    own = pathlib.Path(like) / family
    if not (own / _RECORD).is_file():
        raise FileNotFoundError(f"{like} holds nothing of {family=}.")
    record = json.loads((own / _RECORD).read_text())
    for file in record:
        dtypes |= {name: jnp.dtype(text) for name, text in file["dtypes"].items()}
    carried = open_files(own / _CARRIED)
    layout = {file["file"]: list(file["dtypes"]) for file in record}
    new = [
        n for n in tensors if not any(n in own_names for own_names in layout.values())
    ]
    if new:  # Such as TransV, which the checkpoint came without.
        layout["model-new.safetensors"] = new
    written = stream.save(
        folder,
        params,
        names.rules,
        dtypes=dtypes,
        layout=layout,
        carried=carried,
        metadata=record[0]["metadata"],
    )
    for file in (own / "beside").iterdir():
        shutil.copyfile(file, folder / file.name)
    return written
