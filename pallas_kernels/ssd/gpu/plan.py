"""How the arrays of one SSD call are cut for a GPU, or why they cannot be."""

import dataclasses

import jax
import jax.numpy as jnp

TILE = 64  # Tokens in one matmul: what a warp group's tensor core instruction takes.
Shaped = jax.Array | jax.ShapeDtypeStruct
_TILES = 4  # Tiles in a chunk. States of 256 tokens are as many bytes as x and y.
_MAX_HEAD_DIM = 128  # What registers hold of a state of 128, in float32.
_STATE_DIMS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    batch: int
    tokens: int
    groups: int
    heads_per_group: int
    head_dim: int
    state_dim: int
    interpret: bool

    @property
    def heads(self) -> int:
        """Heads of all groups."""
        return self.groups * self.heads_per_group

    @property
    def tiles(self) -> int:
        """Tiles in a chunk."""
        return min(_TILES, -(-self.tokens // TILE))

    @property
    def chunk(self) -> int:
        """Tokens from one stored state to the next."""
        return self.tiles * TILE

    @property
    def chunks(self) -> int:
        """Chunks of the sequence; the last may reach behind the last token."""
        return -(-self.tokens // self.chunk)

    @property
    def padding(self) -> int:
        """Tokens by which the last chunk does."""
        return self.chunks * self.chunk - self.tokens


def make(x: Shaped, b: Shaped, platform: str) -> Plan:
    """Sizes for x [B T N P] and b [B T G S].

    Raises:
      NotImplementedError: These arrays do not fit the hardware; says why.
    """
    (B, T, N, P), (G, S) = x.shape, b.shape[2:]
    if platform not in ("gpu", "cpu"):
        raise NotImplementedError(
            f'"pallas_gpu" runs on GPU, and interpreted on CPU, not on {platform!r}.'
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"x must be bfloat16 or float32, not {x.dtype}.")
    if P % 16 or P > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"A head of {P} channels is not a multiple of 16 up to {_MAX_HEAD_DIM}."
        )
    if S not in _STATE_DIMS:
        raise NotImplementedError(f"A state of {S} is not one of {_STATE_DIMS}.")
    return Plan(B, T, G, N // G, P, S, interpret=platform == "cpu")
