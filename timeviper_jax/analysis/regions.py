"""Maps of layers added up by region, in memory that the number of tokens decides.

Rows are taken a strip at a time, and columns before them tile by tile. A tile touches
few regions, so that adding up is a small product of matrices. Of attention every
weight is made, once. A state space needs none: before a strip's first row r,

    M_ij = exp(sum_{r < k <= i} dt_k A) * C_i . (exp(sum_{j < k <= r} dt_k A) dt_j B_j)

whose factors are at most 1, so what is taken of a region is read from that region's own
state. Magnitudes |M_ij| need |C_i . B_j|, but one exponential a token, not one a pair.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Float64, Int

from timeviper_jax.analysis.maps import TILE, AttentionMap, Map, StateMap, tiles

_LOWEST = float(np.finfo(np.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
    """The tokens by tiles, and for each the region of columns that it is of.

    A tile's regions are `regions`, and `local` says which of those. Tokens that are in
    no region are in one behind the last; what fills `regions` up is beyond that.
    """

    index: Int[Array, "Z C"]  # -1 after the last token.
    local: Int[Array, "Z C"]
    regions: Int[Array, "Z U"]
    count: int = dataclasses.field(metadata=dict(static=True))

    def one_hot(self, tile: Int[Array, ""]) -> Float[Array, "C U"]:
        return jax.nn.one_hot(self.local[tile], self.regions.shape[1])

    def add(
        self,
        sums: Float[Array, "N R X"],
        tile: Int[Array, ""],
        local: Float[Array, "N R U"],
    ) -> Float[Array, "N R X"]:
        """Sums by region with what a tile has of its own regions."""
        return sums.at[:, :, self.regions[tile]].add(local, mode="drop")


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
    columns = _tiles_of(column_ids, tile)
    if isinstance(map_, AttentionMap):
        strips = _strips(_attention_strip, map_, columns)
    elif absolute:
        strips = _strips(_magnitude_strip, map_, columns)
    else:
        strips = _state_strips(map_, columns)
    sums = np.zeros((map_.num_heads, int(row_ids.max()) + 1, columns.count))
    for rows, strip in zip(tiles(map_.length, tile), strips, strict=True):
        ids = np.where(rows >= 0, row_ids[rows], -1)
        for region in np.unique(ids[ids >= 0]):
            sums[:, region] += strip[:, ids == region].sum(axis=1, dtype=np.float64)
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


def _tiles_of(ids: Int[np.ndarray, "T"], tile: int) -> _Tiles:
    count = int(ids.max()) + 1
    index = np.stack(list(tiles(len(ids), tile)))
    there = np.where((index >= 0) & (ids[index] >= 0), ids[index], count)
    found = [np.unique(row, return_inverse=True) for row in there]
    regions = np.full((len(index), max(len(r) for r, _ in found)), count + 1)
    for row, (names, _) in zip(regions, found, strict=True):
        row[: len(names)] = names
    return _Tiles(
        index=jnp.asarray(index),
        local=jnp.asarray(np.stack([local for _, local in found])),
        regions=jnp.asarray(regions),
        count=count,
    )


def _strips(strip, map_: Map, columns: _Tiles) -> Iterator[Float[np.ndarray, "N R X"]]:
    for tile in range(len(columns.index)):
        yield np.asarray(strip(map_, columns, jnp.int32(tile)))


@jax.jit
def _attention_strip(
    map_: AttentionMap, columns: _Tiles, strip: Int[Array, ""]
) -> Float[Array, "N R X"]:
    """What one tile of rows takes of each region; the softmax as its sums come."""
    rows = columns.index[strip]

    def add(tile, carry):
        highest, sums = carry
        logits = map_.logits(rows, columns.index[tile])
        higher = jnp.maximum(highest, logits.max(axis=2))
        weights = jnp.exp(logits - higher[:, :, None])
        sums = sums * jnp.exp(highest - higher)[:, :, None]
        return higher, columns.add(sums, tile, weights @ columns.one_hot(tile))

    shape = map_.num_heads, len(rows)
    start = jnp.full(shape, _LOWEST), jnp.zeros((*shape, columns.count + 1))
    _, sums = jax.lax.fori_loop(0, strip + 1, add, start)
    return (sums / sums.sum(axis=2, keepdims=True))[:, :, :-1]


@jax.jit
def _magnitude_strip(
    map_: StateMap, columns: _Tiles, strip: Int[Array, ""]
) -> Float[Array, "N R X"]:
    """What one tile of rows takes of each region, or takes away from it."""
    rows = columns.index[strip]
    G = map_.b.shape[1]

    def add(tile, sums):
        products = jnp.abs(map_.products(rows, columns.index[tile]))
        left = _left(map_, columns.index[tile], rows[0])
        left = rearrange(left, "(G n) C -> G n C", G=G)
        left = jnp.einsum("GnC,CU->GCnU", left, columns.one_hot(tile))
        taken = products @ rearrange(left, "G C n U -> G C (n U)")
        taken = rearrange(taken, "G R (n U) -> (G n) R U", U=left.shape[3])
        return columns.add(sums, tile, taken)

    sums = jnp.zeros((map_.num_heads, len(rows), columns.count + 1))
    sums = jax.lax.fori_loop(0, strip, add, sums) * _until(map_, rows)[:, :, None]
    own = jnp.abs(map_.weights(rows, rows)) @ columns.one_hot(strip)
    return columns.add(sums, strip, own)[:, :, :-1]


def _state_strips(
    map_: StateMap, columns: _Tiles
) -> Iterator[Float[np.ndarray, "N R X"]]:
    """What each tile of rows takes of each region, from states of the regions."""
    state = jnp.zeros((map_.num_heads, map_.b.shape[2], columns.count + 1))
    for tile in range(len(columns.index)):
        strip, state = _state_strip(map_, columns, jnp.int32(tile), state)
        yield np.asarray(strip)


@functools.partial(jax.jit, donate_argnums=3)
def _state_strip(
    map_: StateMap,
    columns: _Tiles,
    strip: Int[Array, ""],
    state: Float[Array, "N S X"],
) -> tuple[Float[Array, "N R X-1"], Float[Array, "N S X"]]:
    """One strip, and the state of each region before the next strip's first row."""
    rows, one_hot = columns.index[strip], columns.one_hot(strip)
    shared = map_.num_heads // map_.b.shape[1]
    b, c = (repeat(z[rows], "R G S -> R (G n) S", n=shared) for z in (map_.b, map_.c))
    sums = jnp.einsum("RNS,NSX->NRX", c, state) * _until(map_, rows)[:, :, None]
    sums = columns.add(sums, strip, map_.weights(rows, rows) @ one_hot)

    after = jnp.minimum(rows[0] + len(rows), map_.length - 1)
    kept = jnp.exp(map_.log_decays(after[None], rows[:1]))
    new = jnp.einsum("NC,CNS,CU->NSU", _left(map_, rows, after), b, one_hot)
    return sums[:, :, :-1], columns.add(state * kept, strip, new)


def _left(
    map_: StateMap, columns: Int[Array, "C"], row: Int[Array, ""]
) -> Float[Array, "N C"]:
    """Of dt_j B_j what is left at a later token: dt_j, decayed."""
    decay = jnp.exp(map_.log_decays(row[None], columns)[:, 0])
    return decay * map_.steps[columns].T


def _until(map_: StateMap, rows: Int[Array, "R"]) -> Float[Array, "N R"]:
    """What is left at each row of what the first one could read."""
    return jnp.exp(map_.log_decays(rows, rows[:1])[:, :, 0])
