"""How the arrays of one SSD call are cut for a TPU, or why they cannot be."""

import dataclasses

import jax
import jax.numpy as jnp

CHUNK = 128  # Tokens that attend to each other: the width of a register and a matmul.
LANES = 128
Shaped = jax.Array | jax.ShapeDtypeStruct
_SPAN = 2048  # Tokens from a saved state to the next: 10 % of Nano-9B's inputs.
_LONG = 1024  # Tokens from which on a step of the grid may take four chunks.
_MAX_WIDTH = 1536  # Channels in one step of the grid: what is unrolled and kept.


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call. A step of the grid takes `heads` heads of one group.

    A group has `parts` such sets of heads, which share its b and c.
    """

    batch: int
    tokens: int
    groups: int
    parts: int
    heads: int
    head_dim: int
    state_dim: int
    interpret: bool
    chunks: int = 2  # In one step of the grid.

    @property
    def block(self) -> int:
        """Tokens of one step."""
        return CHUNK * self.chunks

    @property
    def width(self) -> int:
        """Channels of x in one step."""
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Blocks of time."""
        return -(-self.tokens // self.block)

    @property
    def blocks_per_span(self) -> int:
        """Blocks from one state saved for the backward kernel to the next."""
        return min(_SPAN // self.block, self.blocks)

    @property
    def ragged(self) -> bool:
        """Whether the last block reaches behind the last token."""
        return self.tokens % self.block != 0


def make(
    x: jax.Array | jax.ShapeDtypeStruct,
    b: jax.Array | jax.ShapeDtypeStruct,
    platform: str,
) -> Plan:
    """Chooses the heads of a step, for x [B T N P] and b [B T G S].

    Raises:
      NotImplementedError: These arrays do not fit the hardware; says why.
    """
    (B, T, N, P), (G, S) = x.shape, b.shape[2:]
    if platform not in ("tpu", "cpu"):
        raise NotImplementedError(
            f'"pallas_tpu" runs on TPU, and interpreted on CPU, not on {platform!r}.'
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"x must be bfloat16 or float32, not {x.dtype}.")
    rows = 32 // x.dtype.itemsize  # Of one register, down which channels run.
    if P % rows:
        raise NotImplementedError(
            f"A head of {P} channels is not a multiple of {rows}, as {x.dtype} needs."
        )
    if S % LANES and G > 1:
        raise NotImplementedError(
            f"A state of {S} is not a multiple of {LANES}, and there are {G} groups."
        )
    if S % rows:
        raise NotImplementedError(f"A state of {S} is not a multiple of {rows}.")
    per_group = N // G
    fitting = [
        heads
        for heads in range(1, per_group + 1)
        if per_group % heads == 0
        and heads * P <= _MAX_WIDTH
        and (heads * P % LANES == 0 or heads == N)
    ]
    if not fitting:
        raise NotImplementedError(
            f"No divisor of {per_group} heads of {P} channels a group makes a multiple"
            f" of {LANES} channels up to {_MAX_WIDTH}."
        )
    heads = max(fitting)
    return Plan(B, T, G, per_group // heads, heads, P, S, interpret=platform == "cpu")


def of_forward(plan: Plan, device_kind: str) -> Plan:
    """`plan` with the steps that measured best in the forward kernel: long on v6e."""
    return _with_long_steps(plan) if device_kind == "TPU v6 lite" else plan


def of_backward(plan: Plan) -> Plan:
    """`plan` with the steps that measured best in the backward kernel."""
    return _with_long_steps(plan)


def _with_long_steps(plan: Plan) -> Plan:
    """Four chunks in a step share what a step costs, in sequences worth it."""
    return dataclasses.replace(plan, chunks=4) if plan.tokens >= _LONG else plan
