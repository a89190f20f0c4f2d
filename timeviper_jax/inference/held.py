"""The residual before a stage of TransV that waits for a question.

It is all that is held between two stretches of layers, a chunk after another.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from timeviper_jax.data.examples import Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldChunk:
    """Consecutive tokens of rows, of which `rows` are meant."""

    x: Shaped[Any, "_ C D"]  # On the host or the device.
    roles: Int[np.ndarray, "_ C"]
    rows: Int[np.ndarray, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Chunks of right-padded rows. A value: its arrays are shared, never written."""

    on_host: bool
    rows: int
    chunks: tuple[HeldChunk, ...] = ()

    def append(self, x: Float[Array, "B C D"], roles: Int[np.ndarray, "B C"]) -> "Held":
        """With one chunk more; only now the one before it has to be on the host."""
        before = self.chunks
        if self.on_host:
            x.copy_to_host_async()
            if before:
                last = dataclasses.replace(before[-1], x=np.asarray(before[-1].x))
                before = (*before[:-1], last)
        chunk = HeldChunk(x=x, roles=roles, rows=np.arange(len(roles)))
        return dataclasses.replace(self, chunks=(*before, chunk))

    def __iter__(
        self,
    ) -> Iterator[tuple[Shaped[Any, "B C D"], Int[np.ndarray, "B C"]]]:
        """(residual, roles) of the rows that are meant."""
        for chunk in self.chunks:
            yield chunk.x[chunk.rows], chunk.roles[chunk.rows]

    @property
    def roles(self) -> Int[np.ndarray, "B T"]:
        none = np.full((self.rows, 0), Role.PAD, np.int32)
        mine = [chunk.roles[chunk.rows] for chunk in self.chunks]
        return np.concatenate([none, *mine], axis=1)

    @property
    def num_bytes(self) -> int:
        return sum(chunk.x.nbytes for chunk in self.chunks)

    def take(self, rows: Sequence[int]) -> "Held":
        """The same arrays, of which other rows are meant."""
        chunks = tuple(
            dataclasses.replace(chunk, rows=chunk.rows[list(rows)])
            for chunk in self.chunks
        )
        return dataclasses.replace(self, rows=len(rows), chunks=chunks)


def host(parts: Sequence[Float[Array, "B _ D"]]) -> Float[np.ndarray, "B T D"]:
    """Consecutive pieces of rows, put together on the host."""
    return np.concatenate(jax.device_get(list(parts)), axis=1)
