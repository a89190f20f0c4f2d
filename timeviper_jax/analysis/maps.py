"""Attention maps, and the maps that Mamba-2 layers amount to, read tile by tile.

A map says how much token i takes of token j <= i. Of an attention layer it is the
softmax. A Mamba-2 layer is the same kind of sum over values (arXiv 2405.21060,
section 3; 2403.01590), y_i = sum_j M_ij x_j + D x_i, with

    M_ij = C_i . B_j * exp(sum_{j < k <= i} dt_k A) * dt_j

which may be negative and adds up to anything. No array of T x T is ever made: rows,
columns and sums by region come out of tiles, in memory that T alone decides.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

TILE = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """Softmax of the scaled products of queries and keys, for each head.

    `log_totals` is the logarithm of each row's sum before it is divided by it.
    """

    q: Float[Array, "T N H"]
    k: Float[Array, "T K H"]
    kv_heads: Int[Array, "N"]  # Which of the K each head reads.
    log_totals: Float[Array, "T N"]

    @property
    def length(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    def heads(self, index: Sequence[int]) -> "AttentionMap":
        """The map of these heads alone."""
        index = jnp.asarray(index)
        return dataclasses.replace(
            self,
            q=self.q[:, index],
            kv_heads=self.kv_heads[index],
            log_totals=self.log_totals[:, index],
        )

    def weights(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "N R C"]:
        """What the tokens `rows` take of the tokens `columns`."""
        logits = self.logits(rows, columns)
        weights = jnp.exp(logits - self.log_totals[rows].T[:, :, None])
        return jnp.where(columns <= rows[:, None], weights, 0)

    def logits(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "N R C"]:
        q, k = self.q[rows], self.k[columns][:, self.kv_heads]
        logits = jnp.einsum("RNH,CNH->NRC", q, k, preferred_element_type=jnp.float32)
        return logits * q.shape[-1] ** -0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateMap:
    """The implicit attention of a Mamba-2 layer, for each head.

    A decay between two tokens is the difference of two sums over all tokens before
    them, which float32 alone could not tell apart: `decays` is (sum rounded, rest).
    `steps` is the factor dt_j, or 1 where the map is wanted without.
    """

    b: Float[Array, "T G S"]
    c: Float[Array, "T G S"]
    groups: Int[Array, "N"]  # Which of the G each head uses.
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
        return dataclasses.replace(
            self,
            groups=self.groups[index],
            steps=self.steps[:, index],
            decays=tuple(part[:, index] for part in self.decays),
        )

    def weights(
        self, rows: Int[Array, "R"], columns: Int[Array, "C"]
    ) -> Float[Array, "N R C"]:
        """What the tokens `rows` take of the tokens `columns`."""
        products = jnp.einsum(
            "RGS,CGS->GRC",
            self.c[rows],
            self.b[columns],
            preferred_element_type=jnp.float32,
        )
        high, low = (
            part[rows].T[:, :, None] - part[columns].T[:, None] for part in self.decays
        )
        seen = columns <= rows[:, None]
        decay = jnp.exp(jnp.where(seen, high + low, -jnp.inf))
        return products[self.groups] * decay * self.steps[columns].T[:, None]


Map = AttentionMap | StateMap


def attention_map(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], *, tile: int = TILE
) -> AttentionMap:
    """The causal map of queries and keys; logits are divided by the root of H."""
    (T, N, _), K = q.shape, k.shape[1]
    bare = AttentionMap(
        q=q,
        k=k,
        kv_heads=jnp.arange(N) // (N // K),
        log_totals=jnp.zeros((T, N), jnp.float32),
    )
    parts = []
    for rows in _tiles(T, tile):
        total = jnp.full((N, tile), -jnp.inf, jnp.float32)
        for columns in _tiles(int(rows.max()) + 1, tile):
            total = _add_logits(bare, total, rows, columns)
        parts.append(total.T[: np.count_nonzero(rows >= 0)])
    return dataclasses.replace(bare, log_totals=jnp.concatenate(parts))


def state_map(
    b: Float[Array, "T G S"],
    c: Float[Array, "T G S"],
    dt: Float[Array, "T N"],
    a: Float[Array, "N"],
    *,
    with_dt: bool = True,
) -> StateMap:
    """The map of a state space; without dt it is what is read, not what was written."""
    N, G = dt.shape[1], b.shape[1]
    sums = np.cumsum(np.asarray(dt, np.float64) * np.asarray(a, np.float64), axis=0)
    high = sums.astype(np.float32)
    return StateMap(
        b=b,
        c=c,
        groups=jnp.arange(N) // (N // G),
        steps=dt if with_dt else jnp.ones_like(dt),
        decays=(jnp.asarray(high), jnp.asarray((sums - high).astype(np.float32))),
    )


def rows(
    map_: Map, index: Sequence[int], *, tile: int = TILE
) -> Float[np.ndarray, "N R T"]:
    """What chosen tokens take of every token."""
    index = jnp.asarray(index, jnp.int32)
    parts = [
        np.asarray(_weights(map_, index, columns))[:, :, columns >= 0]
        for columns in _tiles(map_.length, tile)
    ]
    return np.concatenate(parts, axis=2)


def columns(
    map_: Map, index: Sequence[int], *, tile: int = TILE
) -> Float[np.ndarray, "N T C"]:
    """What every token takes of chosen tokens."""
    index = jnp.asarray(index, jnp.int32)
    parts = [
        np.asarray(_weights(map_, rows, index))[:, rows >= 0]
        for rows in _tiles(map_.length, tile)
    ]
    return np.concatenate(parts, axis=1)


def region_sums(
    map_: Map,
    row_ids: Int[np.ndarray, "T"],
    column_ids: Int[np.ndarray, "T"],
    *,
    absolute: bool = False,
    tile: int = TILE,
) -> Float64[np.ndarray, "N Y X"]:
    """The map, or its `absolute` values, summed over regions of rows and columns.

    Args:
      map_: Of T tokens.
      row_ids: The region of each token that takes, from 0; -1 leaves it out.
      column_ids: The same of each token that is taken of.
      absolute: Sums of |M|, in which what is added and what is taken away count alike.
      tile: Tokens of a tile's side.
    """
    sizes = tuple(int(ids.max()) + 1 for ids in (row_ids, column_ids))
    sums = np.zeros((map_.num_heads, *sizes))
    for rows in _tiles(map_.length, tile):
        # What one row of tiles adds up to is exact enough in float32.
        strip = jnp.zeros(sizes[::-1] + (map_.num_heads,), jnp.float32)
        for columns in _tiles(int(rows.max()) + 1, tile):
            strip = _add_regions(
                map_,
                strip,
                (rows, _ids(row_ids, rows)),
                (columns, _ids(column_ids, columns)),
                absolute=absolute,
            )
        sums += np.asarray(strip).T
    return sums


def region_means(
    map_: Map,
    row_ids: Int[np.ndarray, "T"],
    column_ids: Int[np.ndarray, "T"],
    *,
    tile: int = TILE,
) -> Float64[np.ndarray, "N Y X"]:
    """The mean entry of each pair of regions, entries above the diagonal included."""
    sums = region_sums(map_, row_ids, column_ids, tile=tile)
    counts = (np.bincount(ids[ids >= 0]) for ids in (row_ids, column_ids))
    return sums / np.maximum(np.multiply.outer(*counts), 1)


def _tiles(length: int, tile: int) -> Iterator[Int[np.ndarray, "L"]]:
    """The tokens of each tile; -1 after the last one."""
    for start in range(0, length, tile):
        index = np.arange(start, start + tile, dtype=np.int32)
        yield np.where(index < length, index, -1)


def _ids(ids: Int[np.ndarray, "T"], index: Int[np.ndarray, "L"]) -> np.ndarray:
    """The regions of a tile's tokens; what has none goes beyond the last region."""
    here = np.where(index >= 0, ids[index], -1)
    return np.where(here >= 0, here, np.iinfo(np.int32).max).astype(np.int32)


_weights = jax.jit(lambda map_, rows, columns: map_.weights(rows, columns))


@jax.jit
def _add_logits(
    map_: AttentionMap,
    total: Float[Array, "N R"],
    rows: Int[Array, "R"],
    columns: Int[Array, "C"],
) -> Float[Array, "N R"]:
    """The logarithm of a row's sum so far, with a tile of exponentials."""
    seen = (columns <= rows[:, None]) & (columns >= 0)
    logits = jnp.where(seen, map_.logits(rows, columns), -jnp.inf)
    return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=2))


@functools.partial(jax.jit, static_argnames="absolute", donate_argnums=1)
def _add_regions(
    map_: Map,
    sums: Float[Array, "X Y N"],
    rows: tuple[Int[Array, "R"], Int[Array, "R"]],
    columns: tuple[Int[Array, "C"], Int[Array, "C"]],
    *,
    absolute: bool,
) -> Float[Array, "X Y N"]:
    """Sums by region with a tile's, whose sides are given as (tokens, regions)."""
    weights = map_.weights(rows[0], columns[0])
    weights = jnp.abs(weights) if absolute else weights
    X, Y, _ = sums.shape
    by_row = jax.ops.segment_sum(weights.transpose(1, 2, 0), rows[1], num_segments=Y)
    by_both = jax.ops.segment_sum(by_row.transpose(1, 0, 2), columns[1], num_segments=X)
    return sums + by_both
