"""SSD in plain XLA: matmuls inside a chunk, a scan between chunks.

Algorithm 1 of https://arxiv.org/abs/2405.21060; the comments name its four steps. The
backward pass is written out: it keeps each chunk's inputs and first state, nothing of
size L x L, and takes the gradient of a decay as a sum of the terms that cross it, so
that nothing cancels, however strong the decay.
"""

import functools

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
    initial_state: Float[Array, "B N P S"],
    starts: Bool[Array, "B T"] | None,
    *,
    chunk_size: int,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """See `api.ssd`."""
    cut = chunks.cut(x, dt, a, b, c, starts, chunk_size)
    state = chunks.split_heads(initial_state, G=b.shape[2])
    y, state = _scan(cut, state)
    return chunks.join(y, T=x.shape[1]), chunks.merge_heads(state)


@jax.custom_vjp
def _scan(cut: Chunks, state: Float[Array, "B G r P S"]):
    return _forward(cut, state)[0]


def _forward(cut: Chunks, state: Float[Array, "B G r P S"]):
    """All chunks in order: (outputs, last state), and what the backward pass needs."""

    def one_chunk(state, chunk):
        xdt, log_decay, b, c, run = chunk
        decay = chunks.decay(log_decay, run)
        # 1. Within the chunk: attention whose mask is the decay between positions.
        scores = jnp.einsum("BGlS,BGmS->BGlm", c, b)[:, :, None]
        y = jnp.einsum("BGrlm,BGrmP->BGrlP", scores * decay.between, xdt)
        # 2. What earlier chunks left behind, read through this chunk's decay.
        y += jnp.einsum("BGlS,BGrPS->BGrlP", c, state) * decay.from_start
        # 3. and 4. This chunk's own state, added to the decayed one it was given.
        own = jnp.einsum("BGmS,BGrmP->BGrPS", b, xdt * decay.to_end)
        return decay.across * state + own, (y, state)

    last, (y, states) = jax.lax.scan(one_chunk, state, cut)
    return (y, last), (cut, states)


def _backward(residuals, cotangents):
    """The chunks in reverse; `dz` is the cotangent of z."""

    def one_chunk(dstate, inputs):
        (xdt, log_decay, b, c, run), state, dy = inputs
        decay = chunks.decay(log_decay, run)
        scores = jnp.einsum("BGlS,BGmS->BGlm", c, b)[:, :, None]

        dscores = jnp.einsum("BGrlP,BGrmP->BGrlm", dy, xdt) * decay.between
        dy_start = dy * decay.from_start
        dc = jnp.einsum("BGrlP,BGrPS->BGrlS", dy_start, state)
        dxdt_end = jnp.einsum("BGmS,BGrPS->BGrmP", b, dstate) * decay.to_end
        dxdt = jnp.einsum("BGrlm,BGrlP->BGrmP", scores * decay.between, dy) + dxdt_end
        db = jnp.einsum("BGrmP,BGrPS->BGmS", xdt * decay.to_end, dstate)
        # The terms of the loss that a token's decay is a factor of, by where they go.
        crossing = (
            _sum_across(dscores * scores),
            _sum_last(dc * c[:, :, None]),
            _sum_last(dxdt_end * xdt),
            jnp.sum(dstate * state * decay.across, axis=(-2, -1)),
        )
        dscores = dscores.sum(2)
        dc = dc.sum(2) + jnp.einsum("BGlm,BGmS->BGlS", dscores, b)
        db += jnp.einsum("BGlm,BGlS->BGmS", dscores, c)
        dstate = decay.across * dstate
        dstate += jnp.einsum("BGlS,BGrlP->BGrPS", c, dy_start)
        return dstate, (dxdt, db, dc, crossing)

    (cut, states), (dy, dlast) = residuals, cotangents
    dstate, (dxdt, db, dc, crossing) = jax.lax.scan(
        one_chunk, dlast, (cut, states, dy), reverse=True
    )
    inside, from_start, to_end, across = crossing
    lower = jnp.tril(jnp.ones((dxdt.shape[-2],) * 2, dxdt.dtype))
    matmul = functools.partial(jnp.matmul, precision="highest")
    dlog_decay = inside + across[..., None]
    dlog_decay += matmul(from_start, lower)  # State into l: all decays up to l.
    dlog_decay += matmul(to_end, jnp.triu(lower.T, 1))  # m into state: all after m.
    return Chunks(dxdt, dlog_decay, db, dc, None), dstate


_scan.defvjp(_forward, _backward)


def _sum_across(terms: Float[Array, "B G r L L"]) -> Float[Array, "B G r L"]:
    """For each token t, the sum of the terms from an m < t to an l >= t."""
    lower = jnp.tril(jnp.ones((terms.shape[-1],) * 2, terms.dtype))
    before = jnp.einsum("BGrlm,mt->BGrlt", terms, jnp.triu(lower.T, 1))
    return jnp.sum(before * lower, axis=-2)


def _sum_last(terms: Float[Array, "B G r L X"]) -> Float[Array, "B G r L"]:
    """A sum as a matmul, which XLA on CPU runs several times faster than its own."""
    return jnp.einsum("BGrLX,X->BGrL", terms, jnp.ones(terms.shape[-1], terms.dtype))
