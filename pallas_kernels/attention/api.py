"""Public entry point of attention: checks arguments, then picks an implementation."""

import functools
import logging
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import blockwise, cudnn, splash_tpu, xla
from pallas_kernels.platform import target_platform

Implementation = Literal["splash_tpu", "cudnn", "xla", "blockwise"]

_FILES = {
    "splash_tpu": splash_tpu,
    "cudnn": cudnn,
    "xla": xla,
    "blockwise": blockwise,
}
# Splash takes queries in blocks of 128: a decoded token would be padding for the most.
_FEW_QUERIES = 128


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | Float[Array, "A B K S H"],
    v: Float[Array, "B S K H"] | Float[Array, "A B K S H"],
    *,
    causal: bool,
    layer: Int[Array, ""] | int | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    q_offset: Int[Array, ""] | int = 0,
    kv_length: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of N query heads on K key heads, N / K to each.

    Query t sees key s where every rule that was asked for allows it: s <= q_offset + t
    (causal), s < kv_length, equal segment ids, kv_mask. A query that sees no key reads
    zeros. The softmax is in float32.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      causal: Whether a query sees only the keys up to its own position.
      layer: Where k and v are the caches of several layers, stacked, with a head's
        keys side by side: which one is read. "blockwise" reads its tiles where they
        lie, and copies no cache.
      q_segment_ids: Packed sequences; goes with `kv_segment_ids`.
      kv_segment_ids: The same for keys.
      kv_mask: False hides a key from every query of its row.
      q_offset: The position of the first query among the keys.
      kv_length: How many keys exist; the rest of a cache is ignored.
      scale: Multiplies the logits; H ** -0.5 by default.
      implementation: Which one to run; a named one is run or raises, never replaced.
        By default the first that takes the arguments of those that suit the platform.
        The cost of "splash_tpu" and "blockwise" follows `kv_length`.

    Raises:
      NotImplementedError: The named implementation does not take these arguments.
    """
    _check(q, k, v, layer, q_segment_ids, kv_segment_ids, kv_mask)
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} is not one of {get_args(Implementation)}.")
    rules = {
        "causal": causal,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "kv_mask": kv_mask,
        "q_offset": q_offset,
        "kv_length": _keys(k) if kv_length is None else kv_length,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
    }
    run = functools.partial(_run, q=q, k=k, v=v, layer=layer, rules=rules)
    if implementation is not None:
        return run(implementation)
    *kernels, fallback = _preferred(q.shape[1], cached=kv_length is not None)
    for name in kernels:
        try:
            return run(name)
        except NotImplementedError as refusal:
            # The kernel says these arguments are not its own; XLA takes them all.
            logging.info("attention runs as %r: %s", fallback, refusal)
    return run(fallback)


def _run(name: Implementation, *, q, k, v, layer, rules) -> Float[Array, "B T N H"]:
    if name == "blockwise":
        return blockwise.attention(q, k, v, layer=layer, **rules)
    if layer is not None:
        k, v = (jnp.swapaxes(z[layer], 1, 2) for z in (k, v))
    return _FILES[name].attention(q, k, v, **rules)


def _preferred(queries: int, cached: bool) -> tuple[Implementation, ...]:
    """What suits the platform, the best first; the last takes all arguments."""
    platform = target_platform()
    fallback = "blockwise" if cached or platform == "cpu" else "xla"
    if platform == "tpu" and queries >= _FEW_QUERIES:
        return "splash_tpu", fallback
    if platform == "gpu" and not cached:
        return "cudnn", fallback
    return (fallback,)


def _keys(k: Float[Array, "..."]) -> int:
    """How many keys there are: S of B S K H, or of stacked caches A B K S H."""
    return k.shape[1 if k.ndim == 4 else 3]


def _check(q, k, v, layer, q_segment_ids, kv_segment_ids, kv_mask) -> None:
    """Names the argument whose shape does not fit q and the keys' B S K."""
    if (k.ndim == 5) != (layer is not None):
        raise ValueError(f"{layer=} goes with stacked caches, and k is {k.shape}.")
    B, T, N, H = q.shape
    K, S = k.shape[2], _keys(k)
    if N % K:
        raise ValueError(
            f"{N} query heads do not divide among {K} key heads: q {q.shape},"
            f" k {k.shape}."
        )
    keys = (B, S, K, H) if layer is None else (len(k), B, K, S, H)
    for name, array, shape in (
        ("k", k, keys),
        ("v", v, keys),
        ("q_segment_ids", q_segment_ids, (B, T)),
        ("kv_segment_ids", kv_segment_ids, (B, S)),
        ("kv_mask", kv_mask, (B, S)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} {array.shape} must be {shape} for q {q.shape}, k {k.shape}."
            )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("Give q_segment_ids and kv_segment_ids together, or neither.")
