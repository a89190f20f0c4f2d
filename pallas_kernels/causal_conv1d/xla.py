"""The causal convolution as K shifted multiplies, which XLA fuses into one pass.

The backward pass is written out: derived, it keeps one array for each tap. It goes over
memory three times: once for the gradient before the activation, in x's dtype, which
two passes over it turn into those of the inputs and of the taps.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def causal_conv1d(
    x: Float[Array, "B T C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, "C"] | None,
    initial_state: Float[Array, "B K-1 C"],
    starts: Bool[Array, "B T"] | None,
    activation: str | None,
) -> Float[Array, "B T C"]:
    """See `api.causal_conv1d`; the taps are summed in float32."""
    y = _taps(x, weight, bias, initial_state, starts)
    y = jax.nn.silu(y) if activation else y
    return y.astype(x.dtype)


def _taps(x, weight, bias, initial_state, starts) -> Float[Array, "B T C"]:
    """The weighted sum before the activation."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for back, before in enumerate(_before(x, initial_state)):
        tap = before.astype(dtype) * weight[-1 - back].astype(dtype)
        y = y + _where(_reached(starts, back), tap)
    return y


def _before(x, initial_state) -> list[Float[Array, "B T C"]]:
    """The inputs 0, 1, … K - 1 tokens before each token."""
    T, halo = x.shape[1], initial_state.shape[1]
    padded = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    return [padded[:, halo - back : halo - back + T] for back in range(halo + 1)]


def _reached(
    starts: Bool[Array, "B T"] | None, back: int
) -> Bool[Array, "B T 1"] | None:
    """Whether the input `back` tokens before each token is of its segment."""
    if starts is None or not back:
        return None
    begun = starts
    for i in range(1, back):
        begun = begun | jnp.pad(starts, [(0, 0), (i, 0)])[:, : starts.shape[1]]
    return ~begun[..., None]


def _where(reached, z):
    return z if reached is None else jnp.where(reached, z, 0)


def _forward(x, weight, bias, initial_state, starts, activation):
    y = causal_conv1d(x, weight, bias, initial_state, starts, activation)
    return y, (x, weight, bias, initial_state, starts)


def _backward(activation, residuals, dy):
    x, weight, bias, initial_state, starts = residuals
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    d = dy.astype(dtype)
    if activation:
        d = jax.vjp(jax.nn.silu, _taps(*residuals))[1](d)[0]
    d = d.astype(x.dtype)
    reached = [_reached(starts, back) for back in range(weight.shape[0])]
    dweight = [
        jnp.einsum("BTC,BTC->C", _where(seen, d.astype(dtype)), before.astype(dtype))
        for seen, before in zip(reached, _before(x, initial_state), strict=True)
    ]
    halo = initial_state.shape[1]
    early = [None if seen is None else seen[:, :halo] for seen in reached]
    dstate = _to_inputs(d[:, :halo], weight, early, halo)[:, :halo]
    return (
        _to_inputs(d, weight, reached, 0).astype(x.dtype),
        jnp.stack(dweight[::-1]).astype(weight.dtype),
        None if bias is None else d.sum((0, 1), dtype=dtype).astype(bias.dtype),
        dstate.astype(initial_state.dtype),
        None,
    )


def _to_inputs(
    d: Float[Array, "B T C"],
    weight: Float[Array, "K C"],
    reached: list[Bool[Array, "B T 1"] | None],
    before: int,
) -> Float[Array, "B I C"]:
    """Gradients of the inputs from `before` tokens before d's first to d's last one.

    Each comes from the tokens 0, 1, … K - 1 behind it, as far as d knows them.
    """
    dtype = jnp.promote_types(d.dtype, jnp.float32)
    inputs, total = before + d.shape[1], 0
    widths = [(0, 0), (before, len(weight) - 1), (0, 0)]
    d = jnp.pad(d, widths)
    for back, seen in enumerate(reached):
        behind = d[:, back : back + inputs].astype(dtype)
        if seen is not None:
            seen = jnp.pad(seen, widths)[:, back : back + inputs]
        total = total + _where(seen, behind * weight[-1 - back].astype(dtype))
    return total


causal_conv1d.defvjp(_forward, _backward)
