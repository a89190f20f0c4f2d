"""The projector: merged vision features to the language model's width.

It sees one token at a time. Merging comes before it and is not part of it, so that
merged features of a frozen encoder can be stored.
"""

import dataclasses
from itertools import pairwise

import jax
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Widths of the MLP; `fused` is the release's deeper form, with 4 E inside."""

    vision_dim: int
    llm_dim: int
    fused: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def widths(self) -> tuple[int, ...]:
        inner = (4 * self.vision_dim,) if self.fused else ()
        return (self.vision_dim, *inner, self.llm_dim, self.llm_dim)


class Projector(nnx.Module):
    """Linear layers with exact GELU between them."""

    def __init__(self, cfg: ProjectorConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(
                width, out, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs
            )
            for width, out in pairwise(cfg.widths)
        )

    def __call__(self, tokens: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        first, *rest = self.layers
        x = first(tokens)
        for layer in rest:
            x = layer(jax.nn.gelu(x, approximate=False))
        return x
