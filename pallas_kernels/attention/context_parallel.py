"""Attention over a sequence that is cut into contiguous shards along a mesh axis.

Keys and values travel around a ring of devices, with their segments; each device joins
what they give its own queries to what the others gave, as an online softmax does. So no
device ever holds more than two shards of keys. In the backward pass their gradients
travel along. Call it under jax.shard_map.

Under causality the first device has one shard to read and the last has all of them:
the ring takes as long as its last device.
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import blockwise, splash_tpu
from pallas_kernels.platform import target_platform

Implementation = Literal["splash_tpu", "blockwise"]
_FILES = {"splash_tpu": splash_tpu, "blockwise": blockwise}


class _Keys(NamedTuple):
    """What travels: a shard of keys and what is known of them."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    segment_ids: Int[Array, "B S"] | None
    mask: Bool[Array, "B S"] | None


class _Settings(NamedTuple):
    axis_name: str
    causal: bool
    scale: float
    implementation: Implementation


def attention_sharded(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    axis_name: str,
    causal: bool,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` of this device's queries to the keys of all shards.

    Args:
      q, k, v, causal, q_segment_ids, kv_segment_ids, kv_mask, scale: As in `attention`,
        of this device's shards of T and S.
      axis_name: The mesh axis along which T and S are cut, in order.
      implementation: What reads one shard; by default "splash_tpu" where it takes the
        arguments, else "blockwise". A named one is run or raises, never replaced.

    Raises:
      NotImplementedError: The named implementation does not take these arguments.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} is not one of {get_args(Implementation)}.")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("Give q_segment_ids and kv_segment_ids together, or neither.")
    keys = _Keys(k, v, kv_segment_ids, kv_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = lambda name: _ring(
        q, keys, q_segment_ids, _Settings(axis_name, causal, scale, name)
    )
    return run(implementation) if implementation else _first_that_takes(run)


def attention_to_shards(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    axis_name: str,
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    kv_mask: Bool[Array, "B S"],
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attention`, without causality, of a few queries to the keys of all shards.

    The queries are the same on every device, and so is what they read: each device
    reads its own keys, and what they give is joined.

    Args:
      q, k, v, q_segment_ids, kv_segment_ids, kv_mask, scale: As in `attention`, of
        all queries and of this device's shard of S.
      axis_name: The mesh axis along which S is cut.
    """
    if not k.shape[1]:
        return jnp.zeros_like(q)
    keys = _Keys(k, v, kv_segment_ids, kv_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _first_that_takes(
        lambda name: _joined(
            q, keys, q_segment_ids, _Settings(axis_name, False, scale, name)
        )
    )


def _first_that_takes(run: Callable[[Implementation], Array]) -> Array:
    """What suits the platform, if it takes the arguments."""
    if target_platform() == "tpu":
        try:
            return run("splash_tpu")
        except NotImplementedError as refusal:
            # The kernel says these arguments are not its own; XLA takes them all.
            logging.info("attention runs as 'blockwise': %s", refusal)
    return run("blockwise")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ring(q, keys: _Keys, q_segment_ids, settings: _Settings):
    return _forward(q, keys, q_segment_ids, settings)[0]


def _forward(
    q: Float[Array, "B T N H"],
    keys: _Keys,
    q_segment_ids: Int[Array, "B T"] | None,
    settings: _Settings,
):
    """The outputs, and what the backward pass needs."""
    part = _FILES[settings.implementation].part

    def one_shard(carry, distance):
        keys, out, log_total = carry
        rules = _rules(q, keys, q_segment_ids, distance, settings)
        new, new_log = part(q, keys.k, keys.v, **rules)
        joint = jnp.logaddexp(log_total, new_log)
        out *= jnp.exp(log_total - joint)[..., None]
        out += new * jnp.exp(new_log - joint)[..., None]
        return (_passed_on(keys, settings), out, joint), None

    out = jnp.zeros(q.shape, jnp.promote_types(q.dtype, jnp.float32))
    # Finite, so that what saw nothing yet has a weight of 0 and not NaN.
    log_total = jnp.full(q.shape[:3], jnp.finfo(out.dtype).min)
    devices = lax.axis_size(settings.axis_name)
    carry = keys, out, log_total
    (keys, out, log_total), _ = lax.scan(one_shard, carry, jnp.arange(devices))
    out = out.astype(q.dtype)
    return out, (q, keys, q_segment_ids, out, log_total)


def _backward(settings: _Settings, residuals, dout):
    q, keys, q_segment_ids, out, log_total = residuals
    part_gradients = _FILES[settings.implementation].part_gradients

    def one_shard(carry, distance):
        keys, dq, dk, dv = carry
        rules = _rules(q, keys, q_segment_ids, distance, settings)
        own = part_gradients(q, keys.k, keys.v, out, log_total, dout, **rules)
        dq, dk, dv = (sum_ + new for sum_, new in zip((dq, dk, dv), own, strict=True))
        keys, dk, dv = _passed_on((keys, dk, dv), settings)
        return (keys, dq, dk, dv), None

    zeros = (jnp.zeros(z.shape, log_total.dtype) for z in (q, keys.k, keys.v))
    devices = lax.axis_size(settings.axis_name)
    carry = keys, *zeros
    # After a whole turn keys and their gradients are back where they belong.
    (_, dq, dk, dv), _ = lax.scan(one_shard, carry, jnp.arange(devices))
    dkeys = _Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None)
    return dq.astype(q.dtype), dkeys, None


_ring.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _joined(q, keys: _Keys, q_segment_ids, settings: _Settings):
    return _joined_forward(q, keys, q_segment_ids, settings)[0]


def _joined_forward(
    q: Float[Array, "B T N H"],
    keys: _Keys,
    q_segment_ids: Int[Array, "B T"] | None,
    settings: _Settings,
):
    part = _FILES[settings.implementation].part
    rules = _own_rules(keys, q_segment_ids, settings)
    out, log_own = part(q, keys.k, keys.v, **rules)
    peak = lax.pmax(log_own, settings.axis_name)
    log_total = peak + jnp.log(lax.psum(jnp.exp(log_own - peak), settings.axis_name))
    own = out * jnp.exp(log_own - log_total)[..., None]
    out = lax.psum(own, settings.axis_name).astype(q.dtype)
    return out, (q, keys, q_segment_ids, out, log_total)


def _joined_backward(settings: _Settings, residuals, dout):
    q, keys, q_segment_ids, out, log_total = residuals
    # Each device may have used what was read in its own way.
    dout = lax.psum(dout, settings.axis_name)
    dq, dk, dv = _FILES[settings.implementation].part_gradients(
        *(q, keys.k, keys.v, out, log_total, dout),
        **_own_rules(keys, q_segment_ids, settings),
    )
    dkeys = _Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None)
    return dq.astype(q.dtype), dkeys, None


_joined.defvjp(_joined_forward, _joined_backward)


def _own_rules(keys: _Keys, q_segment_ids, settings: _Settings) -> dict:
    """How queries see the keys of this device."""
    return {
        "causal": False,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": keys.segment_ids,
        "kv_mask": keys.mask,
        "q_offset": 0,
        "kv_length": keys.k.shape[1],
        "scale": settings.scale,
    }


def _rules(q, keys: _Keys, q_segment_ids, distance, settings: _Settings) -> dict:
    """How this device's queries see keys that came from `distance` devices before."""
    here, devices = (f(settings.axis_name) for f in (lax.axis_index, lax.axis_size))
    T, S = q.shape[1], keys.k.shape[1]
    return {
        "causal": settings.causal,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": keys.segment_ids,
        "kv_mask": keys.mask,
        "q_offset": here * T - (here - distance) % devices * S,
        "kv_length": S,
        "scale": settings.scale,
    }


def _passed_on(tree, settings: _Settings):
    """Each device's arrays, on the next device of the ring."""
    devices = lax.axis_size(settings.axis_name)
    to_the_next = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(
        lambda z: lax.ppermute(z, settings.axis_name, to_the_next), tree
    )
