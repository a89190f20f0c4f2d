"""Attention maps, and the maps that Mamba-2 layers amount to, read tile by tile.

A map says how much token i takes of token j <= i. Of an attention layer it is the
softmax. A Mamba-2 layer is the same kind of sum over values (arXiv 2405.21060,
section 3; 2403.01590), y_i = sum_j M_ij x_j + D x_i, with

    M_ij = C_i . B_j * exp(sum_{j < k <= i} dt_k A) * dt_j

which may be negative and adds up to anything. No array of T x T is ever made: rows and
columns come out of tiles here, sums by region in `regions.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int

TILE = 512
Read = Callable[[Int[np.ndarray, "C"]], Float[Array, "N R C"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """Softmax of the scaled products of queries and keys, for each head.

    Consecutive heads share one of the K.
    """

    q: Float[Array, "T N H"]
    k: Float[Array, "T K H"]

    @property
    def length(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    def heads(self, index: Sequence[int]) -> "AttentionMap":
        """The map of these heads alone."""
        index = jnp.asarray(index)
        shared = self.num_heads // self.k.shape[1]
        return AttentionMap(q=self.q[:, index], k=self.k[:, index // shared])

    def logits(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "N R C"]:
        """Before the softmax; -inf for what comes later, and for columns below 0."""
        K, R = self.k.shape[1], len(rows)
        # Plain products of matrices, head by head: 4 times as fast on CPU.
        q = rearrange(self.q[rows], "R (K n) H -> K (n R) H", K=K)
        k = rearrange(self.k[columns], "C K H -> K C H")
        logits = jnp.einsum("KRH,KCH->KRC", q, k, preferred_element_type=jnp.float32)
        logits = rearrange(logits, "K (n R) C -> (K n) R C", R=R)
        seen = (columns <= rows[:, None]) & (columns >= 0)
        return jnp.where(seen, logits * q.shape[-1] ** -0.5, -jnp.inf)

    def read(self, rows: Int[np.ndarray, "R"], *, tile: int) -> Read:
        """What the tokens `rows` take of the tokens it is called with."""
        totals = jnp.full((self.num_heads, len(rows)), -jnp.inf, jnp.float32)
        for columns in tiles(int(rows.max()) + 1, tile):
            totals = _add_logits(self, totals, rows, columns)
        return lambda columns: _softmax(self, totals, rows, columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateMap:
    """The implicit attention of a Mamba-2 layer, for each head.

    Consecutive heads share a group. A decay between two tokens is the difference of
    two sums over all tokens before them, which float32 alone could not tell apart:
    `decays` is (sum rounded, rest).
    `steps` is the factor dt_j, or 1 where the map is wanted without.
    """

    b: Float[Array, "T G S"]
    c: Float[Array, "T G S"]
    steps: Float[Array, "T N"]
    decays: tuple[Float[Array, "T N"], Float[Array, "T N"]]

    @property
    def length(self) -> int:
        return self.b.shape[0]

    @property
    def num_heads(self) -> int:
        return self.steps.shape[1]

    def heads(self, index: Sequence[int]) -> "StateMap":
        """The map of these heads alone."""
        index = jnp.asarray(index)
        groups = index // (self.num_heads // self.b.shape[1])
        return StateMap(
            b=self.b[:, groups],
            c=self.c[:, groups],
            steps=self.steps[:, index],
            decays=tuple(part[:, index] for part in self.decays),
        )

    def weights(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "N R C"]:
        """What the tokens `rows` take of the tokens `columns`."""
        seen = (columns <= rows[:, None]) & (columns >= 0)
        decay = jnp.exp(jnp.where(seen, self.log_decays(rows, columns), -jnp.inf))
        products = self.products(rows, columns)
        shared = self.num_heads // products.shape[0]
        products = repeat(products, "G R C -> (G n) R C", n=shared)
        return products * decay * self.steps[columns].T[:, None]

    def products(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "G R C"]:
        """C_i . B_j."""
        c, b = self.c[rows].swapaxes(0, 1), self.b[columns].swapaxes(0, 1)
        return jnp.einsum("GRS,GCS->GRC", c, b, preferred_element_type=jnp.float32)

    def log_decays(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "N R C"]:
        """Of what the tokens `columns` leave in the state, until `rows` read it."""
        high, low = (
            part[rows].T[:, :, None] - part[columns].T[:, None] for part in self.decays
        )
        return high + low

    def read(self, rows: Int[np.ndarray, "R"], *, tile: int) -> Read:
        """What the tokens `rows` take of the tokens it is called with."""
        return lambda columns: _weights(self, rows, columns)


Map = AttentionMap | StateMap


def state_map(
    b: Float[Array, "T G S"],
    c: Float[Array, "T G S"],
    dt: Float[Array, "T N"],
    a: Float[Array, "N"],
    *,
    with_dt: bool = True,
) -> StateMap:
    """The map of a state space; without dt it is what is read, not what was written."""
    sums = np.cumsum(np.asarray(dt, np.float64) * np.asarray(a, np.float64), axis=0)
    high = sums.astype(np.float32)
    return StateMap(
        b=b,
        c=c,
        steps=dt if with_dt else jnp.ones_like(dt),
        decays=(jnp.asarray(high), jnp.asarray((sums - high).astype(np.float32))),
    )


def rows(
    map_: Map, index: Sequence[int], *, tile: int = TILE
) -> Float[np.ndarray, "N R T"]:
    """What chosen tokens take of every token."""
    read = map_.read(np.asarray(index, np.int32), tile=tile)
    parts = [
        np.asarray(read(columns))[:, :, columns >= 0]
        for columns in tiles(map_.length, tile)
    ]
    return np.concatenate(parts, axis=2)


def columns(
    map_: Map, index: Sequence[int], *, tile: int = TILE
) -> Float[np.ndarray, "N T C"]:
    """What every token takes of chosen tokens."""
    index = np.asarray(index, np.int32)
    parts = [
        np.asarray(map_.read(rows, tile=tile)(index))[:, rows >= 0]
        for rows in tiles(map_.length, tile)
    ]
    return np.concatenate(parts, axis=1)


def tiles(length: int, tile: int) -> Iterator[Int[np.ndarray, "L"]]:
    """The tokens of each tile; -1 after the last one."""
    for start in range(0, length, tile):
        index = np.arange(start, start + tile, dtype=np.int32)
        yield np.where(index < length, index, -1)


_weights = jax.jit(lambda map_, rows, columns: map_.weights(rows, columns))


@jax.jit
def _add_logits(
    map_: AttentionMap,
    totals: Float[Array, "N R"],
    rows: Int[Array, "R"],
    columns: Int[Array, "C"],
) -> Float[Array, "N R"]:
    """The logarithm of a row's sum so far, with a tile of exponentials."""
    tile = jax.nn.logsumexp(map_.logits(rows, columns), axis=2)
    return jnp.logaddexp(totals, tile)


@jax.jit
def _softmax(
    map_: AttentionMap,
    totals: Float[Array, "N R"],
    rows: Int[Array, "R"],
    columns: Int[Array, "C"],
) -> Float[Array, "N R C"]:
    return jnp.exp(map_.logits(rows, columns) - totals[:, :, None])
