"""Which tokens of a call are real, and which belong together.

Every mixer takes one: attention masks with it, the convolution and the state space
stop at its boundaries. Rows are right-padded: real tokens first, padding after.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Segments of a batch of rows.

    `segment_ids` counts a row's samples from 1; 0 is padding. `packed` says that a
    row may hold more than one sample, which only training does. `before` says how many
    tokens of each row came before this call, where that is not what a cache holds.
    Where these are shards of longer rows, `axis` is the mesh axis that cuts them, in
    order, and `seen` holds the `counts()` of the whole rows.
    """

    segment_ids: Int[Array, "B T"]
    packed: bool = dataclasses.field(metadata=dict(static=True), default=False)
    before: Int[Array, "B"] | None = None
    axis: str | None = dataclasses.field(metadata=dict(static=True), default=None)
    seen: Int[Array, "B T"] | None = None

    @property
    def valid(self) -> Bool[Array, "B T"]:
        return self.segment_ids > 0

    @property
    def lengths(self) -> Int[Array, "B"]:
        return jnp.sum(self.valid, axis=1, dtype=jnp.int32)

    @property
    def boundaries(self) -> Int[Array, "B T"] | None:
        """Segment ids where they can cut anything, else None."""
        return self.segment_ids if self.packed else None

    def counts(self) -> Int[Array, "B T"]:
        """How many tokens of its own sample each token sees, itself included."""
        if self.seen is not None:
            return self.seen
        T = self.segment_ids.shape[1]
        index = jnp.arange(T, dtype=jnp.int32)[None]
        if not self.packed:
            return jnp.broadcast_to(index + 1, self.segment_ids.shape)
        before = jnp.pad(self.segment_ids, ((0, 0), (1, 0)))[:, :T]
        starts = jnp.where(self.segment_ids != before, index, 0)
        return index - jax.lax.cummax(starts, axis=1) + 1

    def cut(self, axis: str | None) -> "Layout":
        """The same rows, about to be cut into shards along a mesh axis."""
        if axis is None:
            return self
        return dataclasses.replace(self, axis=axis, seen=self.counts())
