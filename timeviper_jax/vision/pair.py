"""Two encoders of one video: their tokens side by side, each with its own projector.

Frames are of one size, and each encoder normalises them its own way. A feature carries
in its last channel which encoder made it, and the narrower ones are filled up with
zeros: so features of a pair are kept and projected, a token at a time, like any other.
"""

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from timeviper_jax.vision.projector import Projector, ProjectorConfig
from timeviper_jax.vision.vit import VitConfig

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Two encoders for frames of the same size; `names` are theirs in checkpoints."""

    first: VitConfig
    second: VitConfig
    names: tuple[str, str] = ("first", "second")

    def __post_init__(self):
        sizes = (self.first.image_size, self.second.image_size)
        if len(set(sizes)) > 1:
            raise ValueError(
                f"The encoders take frames of {sizes} pixels; give both one image_size"
                " (the positions are resized when weights are loaded)."
            )

    @property
    def encoders(self) -> tuple[VitConfig, VitConfig]:
        return self.first, self.second

    @property
    def image_size(self) -> int:
        return self.first.image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """The first one's."""
        return self.first.mean

    @property
    def dtype(self) -> str:
        """The first one's."""
        return self.first.dtype

    @property
    def clip_frames(self) -> int:
        return max(encoder.clip_frames for encoder in self.encoders)

    @property
    def num_tokens(self) -> int:
        return sum(encoder.num_tokens for encoder in self.encoders)

    @property
    def embed_dim(self) -> int:
        """Channels of a feature, the one that says whose it is included."""
        return max(encoder.embed_dim for encoder in self.encoders) + 1

    def shares(self, tokens: int) -> tuple[int, int]:
        """How many of a frame's merged tokens each encoder gives: half, or all."""
        if tokens == self.num_tokens:
            return self.first.num_tokens, self.second.num_tokens
        if tokens % 2:
            raise ValueError(
                f"{tokens} tokens a frame do not halve between two encoders; use an"
                f" even number, or {self.num_tokens} to merge none."
            )
        return tokens // 2, tokens // 2


def side_by_side(
    first: Float[Array, "*B V E"], second: Float[Array, "*B W X"]
) -> Float[Array, "*B V+W _"]:
    """Marked tokens of two encoders: in turn if there are as many, else in a row."""
    width = max(first.shape[-1], second.shape[-1])
    first, second = (
        _mark(tokens, width, number) for number, tokens in enumerate((first, second))
    )
    if first.shape != second.shape:
        return jnp.concatenate([first, second], axis=-2)
    both = jnp.stack([first, second], axis=-2)
    return rearrange(both, "... V two E -> ... (V two) E")


def _mark(
    tokens: Float[Array, "*B V E"], width: int, number: int
) -> Float[Array, "*B V {width+1}"]:
    fill = [(0, 0)] * (tokens.ndim - 1)
    tokens = jnp.pad(tokens, [*fill, (0, width - tokens.shape[-1])])
    return jnp.pad(tokens, [*fill, (0, 1)], constant_values=number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairProjectorConfig:
    """A projector for each encoder's tokens."""

    first: ProjectorConfig
    second: ProjectorConfig

    def __post_init__(self):
        if self.first.llm_dim != self.second.llm_dim:
            raise ValueError(
                f"The projectors lead to widths {self.first.llm_dim} and"
                f" {self.second.llm_dim}; both must be the language model's."
            )

    @property
    def vision_dim(self) -> int:
        return max(self.first.vision_dim, self.second.vision_dim) + 1

    @property
    def llm_dim(self) -> int:
        return self.first.llm_dim


class PairProjector(nnx.Module):
    """Sends each token through the projector of the encoder it is from.

    Both are computed for every token, a thousandth of the language model's work.
    """

    def __init__(self, cfg: PairProjectorConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.first = Projector(cfg.first, rngs=rngs)
        self.second = Projector(cfg.second, rngs=rngs)

    def __call__(self, tokens: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        first = self.first(tokens[..., : self.cfg.first.vision_dim])
        second = self.second(tokens[..., : self.cfg.second.vision_dim])
        return jnp.where(tokens[..., -1:] > 0.5, second, first)


def replace_each(cfg: Config, **changes: object) -> Config:
    """`cfg` with these fields changed; of a pair, both of its configs."""
    if not isinstance(cfg, PairConfig | PairProjectorConfig):
        return dataclasses.replace(cfg, **changes)
    return dataclasses.replace(
        cfg,
        first=dataclasses.replace(cfg.first, **changes),
        second=dataclasses.replace(cfg.second, **changes),
    )
