"""SSD in plain XLA: matmuls inside a chunk, a scan between chunks.

Algorithm 1 of https://arxiv.org/abs/2405.21060; the comments name its four steps. x and
y stay as they lie in memory, tokens by heads by channels: what is made head by head is
turned within a chunk, which is in the processor's cache. There the skip is added, too:
alone it would be one more pass over memory.

The backward pass is written out: it keeps each chunk's inputs and first state, nothing
of size L x L, and takes the gradient of a decay as a sum of the terms that cross it.
Terms between two tokens enter as what the later one receives less what the earlier one
sends, from the same numbers and without the token's own, which no decay touches: only
rounding is left of those that do not cross, however strong the decay.
"""

import functools

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.ssd import chunks
from pallas_kernels.ssd.chunks import Chunks


def ssd(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    d: Float[Array, "N"],
    initial_state: Float[Array, "B N P S"],
    starts: Bool[Array, "B T"] | None,
    *,
    chunk_size: int,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """See `api.ssd`."""
    cut = chunks.cut(x, dt, a, b, c, starts, chunk_size)
    state = einops.rearrange(initial_state, "B (G r) P S -> B G S r P", G=b.shape[2])
    d = einops.rearrange(d, "(G r) -> G r 1", G=b.shape[2])
    y, state = _scan(cut, d, state)
    y = chunks.join(y, T=x.shape[1])
    return y, einops.rearrange(state, "B G S r P -> B (G r) P S")


@jax.custom_vjp
def _scan(cut: Chunks, d: Float[Array, "G r 1"], state: Float[Array, "B G S r P"]):
    return _forward(cut, d, state)[0]


def _forward(cut: Chunks, d: Float[Array, "G r 1"], state: Float[Array, "B G S r P"]):
    """All chunks in order: (outputs, last state), and what the backward pass needs."""

    def one_chunk(state, chunk):
        x, dt, log_decay, b, c, run = chunk
        decay = chunks.decay(log_decay, run)
        # 1. Within the chunk: attention whose mask is the decay between positions.
        scores = jnp.einsum("BGlS,BGmS->BGlm", c, b)[:, :, None]
        weights = scores * decay.between * dt[..., None, :]
        inside = jnp.einsum("BGrlm,BGrmP->BGrlP", weights, _by_head(x))
        # 2. What earlier chunks left behind, read through this chunk's decay.
        before = jnp.einsum("BGlS,BGSrP->BGlrP", c, state)
        before = einops.rearrange(before, "B G l r P -> B l G r P")
        y = _by_token(inside) + before * _by_token(decay.from_start) + d * x
        # 3. and 4. This chunk's own state, added to the decayed one it was given.
        x_end = x * _by_token(decay.to_end * dt[..., None])
        own = jnp.einsum("BGmS,BmGrP->BGSrP", b, x_end)
        return _per_state(decay.across) * state + own, (y, state)

    last, (y, states) = jax.lax.scan(one_chunk, state, cut)
    return (y, last), (cut, d, states)


def _backward(residuals, cotangents):
    """The chunks in reverse; `dz` is the cotangent of z."""
    (cut, d, states), (dy, dlast) = residuals, cotangents
    lower = jnp.tril(jnp.ones((cut.dt.shape[-1],) * 2, dy.dtype))
    earlier = jnp.tril(lower, -1)

    def one_chunk(dstate, inputs):
        (x, dt, log_decay, b, c, run), state, dy = inputs
        decay = chunks.decay(log_decay, run)
        scores = jnp.einsum("BGlS,BGmS->BGlm", c, b)[:, :, None]
        x, dy = _by_head(x), _by_head(dy)
        xdt = x * dt[..., None]

        dscores = jnp.einsum("BGrlP,BGrmP->BGrlm", dy, xdt) * decay.between
        pairs = dscores * (scores * earlier)
        dy_start = dy * decay.from_start
        dc = jnp.einsum("BGrlP,BGSrP->BGrlS", dy_start, state)
        dxdt_end = jnp.einsum("BGmS,BGSrP->BGrmP", b, dstate) * decay.to_end
        dxdt = jnp.einsum("BGrlm,BGrlP->BGrmP", scores * decay.between, dy) + dxdt_end
        db = jnp.einsum("BGrmP,BGSrP->BGmS", xdt * decay.to_end, dstate)
        # The terms of the loss that a token's decay is a factor of, by where they go.
        crossing = (
            _sum_last(pairs) - pairs.sum(-2) + _sum_last(dc * c[:, :, None]),
            _sum_last(dxdt_end * xdt),
            jnp.sum(dstate * state, axis=(2, 4)) * decay.across[..., 0, 0],
        )
        dscores = dscores.sum(2)
        dc = dc.sum(2) + jnp.einsum("BGlm,BGmS->BGlS", dscores, b)
        db += jnp.einsum("BGlm,BGlS->BGmS", dscores, c)
        dstate = _per_state(decay.across) * dstate
        dstate += jnp.einsum("BGlS,BGrlP->BGSrP", c, dy_start)
        dx = _by_token(dxdt * dt[..., None] + d[..., None] * dy)
        dd = _sum_last(dy * x).sum(-1)
        return dstate, (dx, _sum_last(dxdt * x), db, dc, dd, crossing)

    dstate, (dx, ddt, db, dc, dd, (to_later, to_end, across)) = jax.lax.scan(
        one_chunk, dlast, (cut, states, dy), reverse=True
    )
    matmul = functools.partial(jnp.matmul, precision="highest")
    dlog_decay = matmul(to_later, lower)  # Into l: all decays up to l.
    dlog_decay += matmul(to_end, earlier.T)  # Of m, into the state: all after m.
    dlog_decay += across[..., None]
    dd = dd.sum((0, 1))[..., None]
    return Chunks(dx, ddt, dlog_decay, db, dc, None), dd, dstate


_scan.defvjp(_forward, _backward)


def _by_head(z: Float[Array, "B L G r P"]) -> Float[Array, "B G r L P"]:
    return einops.rearrange(z, "B L G r P -> B G r L P")


def _by_token(z: Float[Array, "B G r L P"]) -> Float[Array, "B L G r P"]:
    return einops.rearrange(z, "B G r L P -> B L G r P")


def _per_state(across: Float[Array, "B G r 1 1"]) -> Float[Array, "B G 1 r 1"]:
    return einops.rearrange(across, "B G r 1 1 -> B G 1 r 1")


def _sum_last(terms: Float[Array, "B G r L X"]) -> Float[Array, "B G r L"]:
    """A sum as a matmul, which XLA on CPU runs several times faster than its own."""
    return jnp.einsum("BGrLX,X->BGrL", terms, jnp.ones(terms.shape[-1], terms.dtype))
