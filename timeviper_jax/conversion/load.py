"""Fills a module with published tensors, and names its parameters as published.

For what fits in memory: tests, small models, gradients under their published names.
Checkpoints on disk go through conversion/checkpoint.py, one tensor at a time.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from timeviper_jax.conversion.rules import WHOLE, Rule, assemble, place, write_plan

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]


def load_params(
    module: nnx.Module,
    tensors: Tensors,
    rules: Sequence[Rule],
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> None:
    """Fills every parameter of `module` in place, or raises and changes nothing.

    Parameters keep their dtypes; the other arguments are `rules.place`'s.
    """
    params = _by_path(module)
    placements = place(
        {name: tensor.shape for name, tensor in tensors.items()},
        {path: param.shape for path, param in params.items()},
        rules,
        ignore=ignore,
        keep=keep,
        what=type(module).__name__,
    )
    parts = defaultdict(dict)
    for name, path, layer, rule in placements:
        parts[path][layer] = rule.load(tensors[name])
    flat = [
        (path, param.replace(jnp.asarray(_join(found), param.dtype)))
        for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))
        if (found := parts.get("/".join(map(str, path))))
    ]
    nnx.update(module, nnx.from_flat_state(flat))


def save_params(
    module: nnx.Module, rules: Sequence[Rule]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Every parameter of `module` under its published name, in that layout."""
    params = {p: np.asarray(param[...]) for p, param in _by_path(module).items()}
    shapes = {path: param.shape for path, param in params.items()}
    plan = write_plan(shapes, rules, what=type(module).__name__)
    return {
        name: assemble(
            fills,
            [
                params[f.path] if f.layer == WHOLE else params[f.path][f.layer]
                for f in fills
            ],
        )
        for name, fills in plan.items()
    }


def _by_path(module: nnx.Module) -> dict[str, nnx.Param]:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): param for path, param in flat}


def _join(found: dict[int, np.ndarray]) -> np.ndarray:
    if WHOLE in found:
        return found[WHOLE]
    return np.stack([found[layer] for layer in sorted(found)])
