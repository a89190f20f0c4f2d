"""One call of a compiled program: its shapes, its runs, the bytes that they move."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from timeviper_jax.inference.reader import ViewerConfig
from timeviper_jax.layers.cache import Cache
from timeviper_jax.llm.hybrid import HybridConfig
from timeviper_jax.timeviper import TimeViperConfig

Layers = tuple[int, int]
# The parts of a first answer, beside the stretches of layers; `DECODE` comes after it.
VISION, PROJECTOR, TRANSV, QUESTION = "vision", "projector", "transv", "first token"
DECODE = "decode"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One video, one question, and the sizes that they go through."""

    sizes: TimeViperConfig
    viewer: ViewerConfig
    frames: int
    batch: int  # Frames encoded at once.
    prefix: int = 64  # Tokens of text before the video.
    question: int = 192
    answer: int = 128

    @property
    def vision_tokens(self) -> int:
        return self.frames * self.sizes.tokens_per_frame

    @property
    def tokens(self) -> int:
        return self.prefix + self.vision_tokens + self.question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted function and the shapes it is compiled for, between static arguments."""

    function: Callable
    args: tuple
    before: tuple = ()
    after: tuple = ()

    def trace(self) -> jax.stages.Traced:
        return self.function.trace(*self.before, *self.args, *self.after)

    def outputs(self) -> Any:
        return self.function.eval_shape(*self.before, *self.args, *self.after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A program that runs `times` times, and what its runs take together.

    `tokens` are those that go through it, padding not counted. `moved` bytes are read
    or written at the least: weights, inputs, outputs, and of a cache what is filled.
    `values(i)` are what decides in run i: arguments by the end of their path. `alive`
    is all that stays on the device while it runs, its own arguments or not.
    """

    part: str
    name: str
    program: Program
    times: int
    tokens: int
    moved: int
    alive: tuple
    values: Callable[[int], dict[str, Any]] = lambda i: {}


def num_bytes(tree: Any) -> int:
    """Of all arrays, or of their shapes."""
    return sum(math.prod(z.shape) * z.dtype.itemsize for z in jax.tree.leaves(tree))


def part_of(layers: Layers) -> str:
    """The name of a stretch of layers in the reports."""
    return f"layers {layers[0]}-{layers[1] - 1}"


def layers_bytes(llm: HybridConfig, params: nnx.State, layers: Layers) -> int:
    """The weights of a stretch of layers."""
    kinds = [kind for kind, _ in llm.layers]
    return sum(
        num_bytes(params["llm"][kind]) // kinds.count(kind)
        for kind in kinds[slice(*layers)]
    )


def filled_bytes(cache: Cache, used: int, size: int, times: int = 1) -> int:
    """What chunks of `size` read and write of a cache that holds `used` tokens before.

    A state is read and written; keys and values are written once, and read as far as
    they are filled.
    """
    slot = num_bytes(cache.attention) // cache.capacity
    ends = used * times + size * times * (times + 1) // 2
    return 2 * times * num_bytes(cache.mamba) + slot * (ends + size * times)


def filled(path: str, cache: Cache, used: int) -> dict[str, Any]:
    """Values of the slots of a cache, by their path, when `used` of them are."""
    return {
        f"{path}.slots.used": np.int32(used),
        f"{path}.slots.valid": np.arange(cache.capacity)[None] < used,
    }
