"""How the arrays of one SSD call are cut for a GPU, or why they cannot be."""

import dataclasses

import jax

Shaped = jax.Array | jax.ShapeDtypeStruct
_CHUNK = 256  # States of a chunk of Nano-9B are then as many bytes as its x and y.
_HEAD_DIM_OF_4_WARPS = 96
# Tokens in one matmul: what a warp group's tensor core instruction takes. In float32
# registers hold half as many.
_TILES = {"bfloat16": 64, "float32": 32}
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
    tile: int
    interpret: bool

    @property
    def narrow(self) -> bool:
        """Whether operands are bfloat16; those of float32 come in two parts of TF32."""
        return self.tile == _TILES["bfloat16"]

    @property
    def warps(self) -> int:
        """Warps of a program; of the largest, twice as many share the registers."""
        return 4 if self.narrow and self.head_dim <= _HEAD_DIM_OF_4_WARPS else 8

    @property
    def part(self) -> int:
        """The most channels, or rows of a state, that one matmul sums over."""
        return 128 if self.narrow else 32

    @property
    def heads(self) -> int:
        """Heads of all groups."""
        return self.groups * self.heads_per_group

    @property
    def tiles(self) -> int:
        """Tiles in a chunk."""
        return min(_CHUNK, _round_up(self.tokens, self.tile)) // self.tile

    @property
    def chunk(self) -> int:
        """Tokens from one stored state to the next."""
        return self.tiles * self.tile

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
    if x.dtype.name not in _TILES:
        raise NotImplementedError(f"x must be bfloat16 or float32, not {x.dtype}.")
    if P % 16 or P > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"A head of {P} channels is not a multiple of 16 up to {_MAX_HEAD_DIM}."
        )
    if S not in _STATE_DIMS:
        raise NotImplementedError(f"A state of {S} is not one of {_STATE_DIMS}.")
    interpret = platform == "cpu"
    return Plan(B, T, G, N // G, P, S, _TILES[x.dtype.name], interpret)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
