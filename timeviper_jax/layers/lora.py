"""Low-rank changes to matrices, as parameters beside those that they change.

https://arxiv.org/abs/2106.09685. `KERNEL/lora_a` and `KERNEL/lora_b` stand for the
matrix KERNEL + (alpha / rank) A B. B starts at zero, so nothing changes at first. A
model is always put together from whole matrices: in training the sum is part of the
step, so that gradients reach A and B alone; for use and export it is taken once.

This is by hand because a library such as qwix wraps the layers that it sees called.
Here a layer is cut out of its stack within the scan that runs it, and its matrices are
a stack's slice by then; by path, a stack of matrices gets a stack of pairs.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = Mapping[str, jax.Array]
Shape = tuple[int, ...]

# Kernels by path -> their leading axes of layers, and their axes that are inputs.
_KERNELS = (
    (r"llm/(attention|mamba|mlp)/mixer/(q|k|v|in_\w+|gate|up|down)/kernel", 1, 1),
    (r"llm/mamba/mixer/out/kernel", 1, 1),
    (r"llm/attention/mixer/out/kernel", 1, 2),
    (r"llm/transv/\d+/[qkv]/kernel", 0, 1),
    (r"llm/transv/\d+/out/kernel", 0, 2),
    (r"llm/head/kernel", 0, 1),
    (r"projector/.*layers/\d+/kernel", 0, 1),
    (r"vision/.*blocks/(attn/[qkv]|mlp/(up|down))/kernel", 1, 1),
    (r"vision/.*blocks/attn/out/kernel", 1, 2),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels change, by patterns found in their paths; none is no LoRA."""

    targets: tuple[str, ...]
    rank: int
    alpha: float

    def __post_init__(self):
        if self.targets and self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_lora(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def adapted(paths: Iterable[str], cfg: LoraConfig) -> list[str]:
    """The kernels that the targets name.

    Raises:
      ValueError: A target names nothing, or something that is no matrix.
    """
    paths = [path for path in paths if not is_lora(path)]
    found = set()
    for target in cfg.targets:
        hits = [path for path in paths if re.search(target, path)]
        if not hits:
            raise ValueError(f"LoRA's target {target!r} names no parameter.")
        if wrong := [path for path in hits if _axes(path) is None]:
            raise ValueError(
                f"LoRA's target {target!r} names {wrong[:3]}, which are no matrices;"
                " name kernels of projections."
            )
        found.update(hits)
    return sorted(found)


def init(
    shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array], cfg: LoraConfig, seed: int
) -> dict[str, jax.Array]:
    """The pairs of all adapted kernels: A drawn, B zero."""
    pairs = {}
    for number, path in enumerate(adapted(shapes, cfg)):
        stack, inputs, outputs = _split(path, shapes[path].shape)
        key = jax.random.fold_in(jax.random.key(seed), number)
        dtype, width = shapes[path].dtype, math.prod(inputs)
        drawn = jax.random.normal(key, (*stack, *inputs, cfg.rank), dtype)
        pairs[f"{path}/lora_a"] = drawn / math.sqrt(width)
        pairs[f"{path}/lora_b"] = jnp.zeros((*stack, cfg.rank, *outputs), dtype)
    return pairs


def merged(params: Params, cfg: LoraConfig) -> dict[str, jax.Array]:
    """Whole matrices in place of pairs; parameters without any stay as they are."""
    whole = {path: array for path, array in params.items() if not is_lora(path)}
    for path in [p.removesuffix("/lora_a") for p in params if p.endswith("/lora_a")]:
        a, b = params[f"{path}/lora_a"], params[f"{path}/lora_b"]
        change = cfg.scale * _product(path, whole[path].shape, a, b)
        whole[path] = (whole[path].astype(jnp.float32) + change).astype(
            whole[path].dtype
        )
    return whole


def _product(
    path: str, shape: Shape, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
    stack, inputs, outputs = _split(path, shape)
    a = a.astype(jnp.float32).reshape(*stack, math.prod(inputs), -1)
    b = b.astype(jnp.float32).reshape(*stack, -1, math.prod(outputs))
    return jnp.matmul(a, b).reshape(shape)


def _axes(path: str) -> tuple[int, int] | None:
    """A kernel's axes of layers, and of inputs."""
    found = (rest for pattern, *rest in _KERNELS if re.fullmatch(pattern, path))
    return next(map(tuple, found), None)


def _split(path: str, shape: Shape) -> tuple[Shape, Shape, Shape]:
    stack, inputs = _axes(path)
    return shape[:stack], shape[stack : stack + inputs], shape[stack + inputs :]
