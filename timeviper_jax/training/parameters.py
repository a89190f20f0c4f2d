"""A model's parameters as one flat dict: "llm/norm/scale" → array.

What moves, how fast, how it decays and where it lives is said by path, so training
works on paths; the module is put together again inside the traced step.
"""

import re
from collections.abc import Iterable, Mapping

import jax
from flax import nnx

Params = dict[str, jax.Array]
Shapes = Mapping[str, jax.Array | jax.ShapeDtypeStruct]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The module's structure, and its parameters by path."""
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    strangers = sorted({type(v).__name__ for _, v in flat if type(v) is not nnx.Param})
    if strangers:
        raise ValueError(f"A model holds parameters only; found {strangers}.")
    return graph, {"/".join(map(str, path)): param[...] for path, param in flat}


def merge(graph: nnx.GraphDef, params: Mapping[str, jax.Array]) -> nnx.Module:
    """The module that `split` took apart, with these parameters in it."""
    flat = {
        tuple(int(part) if part.isdigit() else part for part in path.split("/")): array
        for path, array in params.items()
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def matching(paths: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The paths in which any of the patterns is found; one that finds none is wrong."""
    paths, found = list(paths), set()
    for pattern in patterns:
        hits = {path for path in paths if re.search(pattern, path)}
        if not hits:
            raise ValueError(
                f"{pattern!r} names no parameter; the paths begin with"
                f" {sorted({path.split('/')[0] for path in paths})}."
            )
        found |= hits
    return found
