"""Cross-entropy with a vocabulary so large that its logits never stand all together.

Tokens go through the head some at a time, forward and backward. Under a mesh the
vocabulary stays split as the head's parameters are: each device has its words for the
tokens of all rows, and what they add up to is a number a token.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from timeviper_jax import sharding

# So many logits stand at once: 128 MiB of them.
_AT_ONCE = 2**25
_VOCABULARY = ("tensor", "fsdp", "context")
# Rows and tokens are split over these, and every device sees them all.
_TOKENS = ("fsdp", "context")


@jax.named_scope("head")
def cross_entropy(
    hidden: Float[Array, "B A D"],
    head: Float[Array, "D vocab"],
    targets: Int[Array, "B A"],
    *,
    dtype: str,
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """The loss of each target in float32, and whether its logit is the largest.

    Logits are `hidden @ head`, multiplied in `dtype` and summed in float32.
    """
    run = functools.partial(_losses, dtype=dtype)
    if sharding.active_mesh() is None:
        return run(hidden, head, targets, axes=())
    return jax.shard_map(
        functools.partial(_on_shards, run),
        mesh=sharding.active_mesh(),
        in_specs=(sharding.TOKENS, P(None, _VOCABULARY), sharding.TOKENS),
        out_specs=sharding.TOKENS,
        check_vma=False,
    )(hidden, head, targets)


def _on_shards(run, hidden, head, targets):
    own = targets.shape
    for dim, name in enumerate(_TOKENS):
        hidden, targets = lax.all_gather((hidden, targets), name, axis=dim, tiled=True)
    of_all = run(hidden, head, targets, axes=_VOCABULARY)
    first = [
        lax.axis_index(name) * size for name, size in zip(_TOKENS, own, strict=True)
    ]
    return jax.tree.map(lambda z: lax.dynamic_slice(z, first, own), of_all)


def _losses(
    hidden: Float[Array, "B A D"],
    head: Float[Array, "D words"],
    targets: Int[Array, "B A"],
    *,
    axes: tuple[str, ...],
    dtype: str,
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """A part of the tokens after the other, each computed again going backwards."""
    shape, tokens = targets.shape, targets.size
    parts = max(1, -(-tokens * head.shape[1] // _AT_ONCE))
    one = functools.partial(_part, head=head, axes=axes, dtype=dtype)
    hidden, targets = hidden.reshape(tokens, -1), targets.reshape(tokens)
    if parts == 1:
        losses, correct = one(hidden, targets)
    else:
        behind = -tokens % parts
        hidden = jnp.pad(hidden, ((0, behind), (0, 0)))
        targets = jnp.pad(targets, (0, behind))
        cut = lambda z: z.reshape(parts, -1, *z.shape[1:])
        some = jax.checkpoint(lambda z: one(*z))
        losses, correct = lax.map(some, (cut(hidden), cut(targets)))
    return tuple(z.reshape(-1)[:tokens].reshape(shape) for z in (losses, correct))


def _part(
    hidden: Float[Array, "A D"],
    targets: Int[Array, " A"],
    *,
    head: Float[Array, "D words"],
    axes: tuple[str, ...],
    dtype: str,
) -> tuple[Float[Array, " A"], Bool[Array, " A"]]:
    over = lambda reduce, z: reduce(z, axes) if axes else z
    logits = jnp.matmul(
        hidden.astype(dtype), head.astype(dtype), preferred_element_type=jnp.float32
    )
    words = head.shape[1]
    first = lax.axis_index(axes) * words if axes else 0
    largest = lax.stop_gradient(jnp.max(logits, axis=-1))
    peak = over(lax.pmax, largest)
    # Of equal logits the first counts, as argmax has it.
    found = jnp.where(largest == peak, first + jnp.argmax(logits, axis=-1), _NOWHERE)
    correct = over(lax.pmin, found) == targets

    own = targets - first
    mine = (own >= 0) & (own < words)
    wanted = jnp.take_along_axis(logits, jnp.where(mine, own, 0)[:, None], axis=1)[:, 0]
    total = jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1)
    total, wanted = over(lax.psum, (total, jnp.where(mine, wanted, 0.0)))
    return jnp.log(total) + peak - wanted, correct


_NOWHERE = jnp.iinfo(jnp.int32).max
