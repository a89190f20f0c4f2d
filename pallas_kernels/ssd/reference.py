"""The SSD recurrence, written as the paper states it. Slow, and always right."""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def ssd(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    initial_state: Float[Array, "B N P S"],
    starts: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """See `api.ssd`. A token that starts a segment forgets the state first."""
    time_first = [jnp.moveaxis(z, 1, 0) for z in (x, dt, b, c)]
    if starts is not None:
        time_first.append(starts.T)

    def one_token(state, inputs):
        x, dt, b, c, *start = inputs
        if start:
            state = jnp.where(start[0][:, None, None, None], 0, state)
        y, state = step(x, dt, a, b, c, state)
        return state, y

    state, y = jax.lax.scan(one_token, initial_state, tuple(time_first))
    return jnp.moveaxis(y, 0, 1), state


def step(
    x: Float[Array, "B N P"],
    dt: Float[Array, "B N"],
    a: Float[Array, "N"],
    b: Float[Array, "B G S"],
    c: Float[Array, "B G S"],
    state: Float[Array, "B N P S"],
) -> tuple[Float[Array, "B N P"], Float[Array, "B N P S"]]:
    """One token: the state decays, takes in x b^T and is read by c."""
    heads_per_group = x.shape[1] // b.shape[1]
    b, c = (einops.repeat(z, "B G S -> B (G r) S", r=heads_per_group) for z in (b, c))
    decay = jnp.exp(a * dt)[..., None, None]
    state = decay * state + jnp.einsum("BN,BNP,BNS->BNPS", dt, x, b)
    return jnp.einsum("BNPS,BNS->BNP", state, c), state
