"""Public entry point of the SSD op: checks arguments, then picks an implementation."""

import logging
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import target_platform
from pallas_kernels.segments import segment_starts
from pallas_kernels.ssd import (
    associative_scan,
    pallas_gpu,
    pallas_tpu,
    reference,
    scan,
)

Implementation = Literal[
    "pallas_tpu", "pallas_gpu", "scan", "associative_scan", "reference"
]

# The first that takes the arguments is run. "pallas_gpu" compiles for GPUs, but has
# never run on one: until it has, it is for those who name it.
_PREFERRED: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("scan",),
    "gpu": ("scan",),
    "tpu": ("pallas_tpu", "scan"),
}


def ssd(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    *,
    d: Float[Array, "N"] | None = None,
    initial_state: Float[Array, "B N P S"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int = 64,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """Runs Mamba-2's selective state space over a sequence.

    For each head n in group g, starting from `initial_state`:

      state_t = exp(a_n dt_t) state_{t-1} + dt_t x_t b_{g,t}^T
      y_t     = state_t c_{g,t} + d_n x_t

    A position with dt = 0 leaves the state as it was: mask padding by zeroing dt.

    Args:
      x: Inputs, N heads of P channels.
      dt: Step sizes, already positive (after softplus and clipping).
      a: Decay rates, negative.
      b: Input maps, one per group of N / G heads.
      c: Output maps, grouped like `b`.
      d: Weights of the skip from x to y; no skip by default.
      initial_state: State before the first token; zeros by default.
      segment_ids: Packed sequences. The state starts from zero where the id changes,
        except to 0, which is padding; the first token continues `initial_state`.
      chunk_size: Tokens per chunk. Affects speed, not the result; on CPU about S, up
        to 64, is best. The kernels have their own.
      implementation: Which one to run. By default the fastest on this platform; a
        named one is run or raises, never replaced.

    Returns:
      The outputs in x's dtype, and the state after the last token in float32.

    Raises:
      NotImplementedError: The named implementation does not take these arguments.
    """
    _check(x, dt, a, b, c, d, initial_state, segment_ids)
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1.")
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} is not one of {get_args(Implementation)}.")
    B, _, N, P = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((B, N, P, b.shape[-1]), jnp.float32)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    args = (x, dt, a, b, c, d, initial_state, starts, chunk_size)
    if implementation is not None:
        return _run(implementation, *args)
    *kernels, fallback = _PREFERRED[target_platform()]
    for name in kernels:
        try:
            return _run(name, *args)
        except NotImplementedError as refusal:
            # The kernel says these arguments are not its own; XLA takes them all.
            logging.info("ssd runs as %r: %s", fallback, refusal)
    return _run(fallback, *args)


def _run(name: Implementation, x, dt, a, b, c, d, initial_state, starts, chunk_size):
    """Runs one implementation. A kernel takes arrays as they are; some add the skip."""
    skip = jnp.zeros_like(a) if d is None else d
    kernels = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
    if name in kernels:
        return kernels[name].ssd(x, dt, a, b, c, skip, initial_state, starts)
    if name == "scan":
        wide = (*_accumulator(x, dt, a, b, c, skip, initial_state), starts)
        y, state = scan.ssd(*wide, chunk_size=chunk_size)
        return y.astype(x.dtype), state
    wide = (*_accumulator(x, dt, a, b, c, initial_state), starts)
    if name == "associative_scan":
        y, state = associative_scan.ssd(*wide, chunk_size=chunk_size)
    else:
        y, state = reference.ssd(*wide)
    return _add_skip(y, x, d).astype(x.dtype), state


def ssd_step(
    x: Float[Array, "B N P"],
    dt: Float[Array, "B N"],
    a: Float[Array, "N"],
    b: Float[Array, "B G S"],
    c: Float[Array, "B G S"],
    state: Float[Array, "B N P S"],
    *,
    d: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B N P"], Float[Array, "B N P S"]]:
    """One token of `ssd`: its output, and the state after it in float32."""
    _check(x, dt, a, b, c, d, state)
    y, state = reference.step(*_accumulator(x, dt, a, b, c, state))
    return _add_skip(y, x, d).astype(x.dtype), state


def _check(x, dt, a, b, c, d, state, segment_ids=None) -> None:
    """Names the argument whose shape does not fit x and b."""
    *BT, N, P = x.shape
    *_, G, S = b.shape
    if N % G:
        raise ValueError(
            f"{N} heads do not divide into {G} groups: x {x.shape}, b {b.shape}."
        )
    for name, array, shape in (
        ("dt", dt, (*BT, N)),
        ("a", a, (N,)),
        ("b", b, (*BT, G, S)),
        ("c", c, (*BT, G, S)),
        ("d", d, (N,)),
        ("state", state, (x.shape[0], N, P, S)),
        ("segment_ids", segment_ids, (*BT,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} {array.shape} must be {shape} for x {x.shape}, b {b.shape}."
            )


def _accumulator(*arrays: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Everything in float32 (float64 stays): the state, its decay and all sums."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return [z.astype(dtype) for z in arrays]


def _add_skip(y, x, d):
    return y if d is None else y + d[:, None].astype(y.dtype) * x.astype(y.dtype)
