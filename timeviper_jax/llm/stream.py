"""The tokens on their way through the language model, and what each of them is.

TransV shortens the stream between layers, so everything that must stay aligned with
the tokens travels with them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from timeviper_jax.data.examples import Role
from timeviper_jax.layers.layout import Layout

_static = dict(static=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """A batch of rows of tokens; real tokens first, padding after.

    `positions` says where in the original row each token stood, -1 for padding.
    `vision_counts[b, s]` is how many vision tokens sample s of row b had at first. A
    row now holds at most `vision_capacity` vision tokens, and held at most
    `original_capacity`.
    """

    x: Float[Array, "B T D"]
    roles: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    vision_counts: Int[Array, "B Z"]
    num_segments: int = dataclasses.field(metadata=_static)
    vision_capacity: int = dataclasses.field(metadata=_static)
    original_capacity: int = dataclasses.field(metadata=_static)

    @property
    def layout(self) -> Layout:
        return Layout(segment_ids=self.segment_ids, packed=self.num_segments > 1)

    @property
    def is_vision(self) -> Bool[Array, "B T"]:
        return self.roles == Role.VISION

    @property
    def is_text(self) -> Bool[Array, "B T"]:
        return (self.roles != Role.VISION) & (self.roles != Role.PAD)


def make_stream(
    x: Float[Array, "B T D"],
    roles: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    num_segments: int,
    vision_capacity: int,
) -> Stream:
    """A stream that nothing has left yet."""
    T = roles.shape[1]
    vision = (roles == Role.VISION).astype(jnp.int32)
    counts = jax.vmap(
        lambda v, s: jax.ops.segment_sum(v, s, num_segments=num_segments + 1)
    )(vision, segment_ids)
    return Stream(
        x=x,
        roles=roles,
        segment_ids=segment_ids,
        positions=jnp.where(segment_ids > 0, jnp.arange(T, dtype=jnp.int32), -1),
        vision_counts=counts,
        num_segments=num_segments,
        vision_capacity=vision_capacity,
        original_capacity=vision_capacity,
    )


def where_true(
    mask: Bool[Array, "B T"], size: int
) -> tuple[Int[Array, "B {size}"], Bool[Array, "B {size}"]]:
    """Indices of the first `size` true entries of each row, and which are real."""
    T = mask.shape[1]
    index = jnp.where(mask, jnp.arange(T, dtype=jnp.int32), T)
    index = jnp.sort(index, axis=1)[:, :size]
    return jnp.minimum(index, T - 1), index < T


def take(
    values: Shaped[Array, "B T *rest"], index: Int[Array, "B U"]
) -> Shaped[Array, "B U *rest"]:
    """`values[b, index[b, u]]`."""
    return jax.vmap(lambda row, i: row[i])(values, index)
