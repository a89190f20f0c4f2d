r"""Fills a module with published tensors, by a table of names.

A rule is (pattern, path, transform). The pattern must match a tensor's whole name;
the path, which may use the pattern's groups, says which parameter it fills; the
transform turns the published layout into ours:

    (r"blocks\.(\d+)\.mlp\.fc1\.weight", r"blocks/up/kernel[\1]", np.transpose)

`[i]` addresses one layer of a stacked parameter. A tensor may match several rules,
each of which takes its part (a fused qkv fills q, k and v). All that does not fit is
reported at once, before anything is changed.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray]]

_WHOLE = -1  # The layer index of a parameter that is not addressed by layers.


def load_params(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> None:
    """Fills every parameter of `module` in place, or raises and changes nothing.

    Args:
      module: Its parameters keep their dtypes.
      tensors: By published name.
      rules: How names and layouts map.
      ignore: Patterns of published names that are deliberately unused.
      keep: Patterns of parameter paths that may stay as they are.
    """
    params = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    shapes = {"/".join(map(str, path)): p.shape for path, p in params.items()}
    parts, problems = _place(tensors, rules, tuple(ignore))
    for path, found in parts.items():
        problems += _misfits(path, found, shapes.get(path))
    problems += [
        f"{path} {shape}: no tensor fills it"
        for path, shape in shapes.items()
        if path not in parts and not _matches_any(tuple(keep), path)
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} names do not fit {type(module).__name__}; mend the rules,"
            " or list what is deliberate in `ignore` or `keep`:\n  "
            + "\n  ".join(sorted(problems))
        )
    filled = {}
    for path, param in params.items():
        if found := parts.get("/".join(map(str, path))):
            filled[path] = param.replace(jnp.asarray(_join(found), param.dtype))
    nnx.update(module, nnx.from_flat_state(filled))


def _place(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], ignore: tuple[str, ...]
) -> tuple[dict[str, dict[int, np.ndarray]], list[str]]:
    """Returns path -> layer -> array, and what found no place or a taken one."""
    parts, problems = defaultdict(dict), []
    # A deep model has more patterns than `re` remembers.
    rules = [(re.compile(pattern), *rest) for pattern, *rest in rules]
    for name, tensor in tensors.items():
        if _matches_any(ignore, name):
            continue
        matches = [(pattern.fullmatch(name), *rest) for pattern, *rest in rules]
        matches = [match for match in matches if match[0]]
        if not matches:
            problems.append(f"{name} {tensor.shape}: no rule matches it")
        for match, template, transform in matches:
            path, layer = _address(match.expand(template))
            if layer in parts[path]:
                problems.append(f"{name} {tensor.shape}: {path} is already filled")
            parts[path][layer] = transform(tensor)
    return dict(parts), problems


def _address(target: str) -> tuple[str, int]:
    """Splits `blocks/up/kernel[3]` into the path and the layer."""
    path, _, layer = target.removesuffix("]").partition("[")
    return path, int(layer) if layer else _WHOLE


def _misfits(
    path: str, found: dict[int, np.ndarray], shape: tuple[int, ...] | None
) -> list[str]:
    """Names what keeps the parts found from making up a parameter of this shape."""
    if shape is None:
        return [f"{path}: the module has no such parameter"]
    if _WHOLE in found:
        layers, want = {_WHOLE}, shape
    else:
        layers, want = set(range(shape[0] if shape else 0)), shape[1:]
    problems = [
        f"{path}[{layer}]: no tensor fills it" for layer in sorted(layers - set(found))
    ]
    problems += [
        f"{path}[{layer}]: outside {shape}" for layer in sorted(set(found) - layers)
    ]
    problems += [
        f"{path}{'' if layer == _WHOLE else f'[{layer}]'}:"
        f" got {part.shape}, want {want}"
        for layer, part in found.items()
        if part.shape != want
    ]
    return problems


def _join(found: dict[int, np.ndarray]) -> np.ndarray:
    if _WHOLE in found:
        return found[_WHOLE]
    return np.stack([found[layer] for layer in sorted(found)])


def _matches_any(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
