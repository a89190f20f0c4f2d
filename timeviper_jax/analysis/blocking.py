"""A forward pass in which some text cannot see vision from a layer on.

What is blocked, layer by layer, for the *receiving* tokens:

- In an attention layer the keys of vision tokens are masked out of their softmax.
- A Mamba-2 layer runs a second state beside its own, for which vision tokens do not
  exist: their dt is 0, so that they neither write to the state nor let it decay. The
  receiving tokens read that state, and all others the layer's own. In the convolution
  before it they see zeros in place of vision tokens.
- A transfer of TransV gives them nothing.

What a receiving token knows of the video then comes from layers before, or from other
text. All other tokens, vision too, are computed as ever; they see the receiving tokens
as these now are. Vision can also leave altogether: at a layer the sequence closes up
over what is left, as TransV does. Where something begins is an argument of the compiled
program, so that one of them serves all layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import attention
from timeviper_jax.analysis.intermediates import attention_inputs, state_inputs_of
from timeviper_jax.data.examples import Role
from timeviper_jax.layers.attention import Attention
from timeviper_jax.layers.layout import Layout
from timeviper_jax.layers.mamba2 import CausalConv, Mamba2
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.llm.stream import Stream, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cuts:
    """What is cut: `receivers` see no vision from layer `blocked_from` on.

    They are marked by where tokens stood at first. All vision tokens leave before
    layer `dropped_at`. A layer that is not there cuts nothing.
    """

    receivers: Bool[Array, "B T"]
    blocked_from: int | Int[Array, ""]
    dropped_at: int | Int[Array, ""]


def run_cut(llm: HybridLM, stream: Stream, cuts: Cuts) -> Stream:
    """The stream after the last layer, normed, where `cuts` hold."""
    stages = {stage.layer: number for number, stage in enumerate(llm.cfg.transv)}
    for layer, (kind, index) in enumerate(llm.cfg.layers):
        stream = _drop_vision(stream, layer == cuts.dropped_at)
        if layer in stages:
            thinned, _, _ = llm.thin(stages[layer], stream)
            receives = _receives(thinned, cuts, layer)
            x = jnp.where(receives, _as_before(stream, thinned), thinned.x)
            stream = dataclasses.replace(thinned, x=x)
        receives = _receives(stream, cuts, layer)
        block = llm.block(kind, index)
        x = block.norm(stream.x)
        if kind == "attention":
            x = _attend(block.mixer, x, stream.layout, stream.is_vision, receives)
        elif kind == "mamba":
            x = _scan(block.mixer, x, stream.layout, stream.is_vision, receives)
        else:
            x = block.mixer(x)
        stream = dataclasses.replace(stream, x=stream.x + x)
    return dataclasses.replace(stream, x=llm.norm(stream.x))


def _receives(stream: Stream, cuts: Cuts, layer: int) -> Bool[Array, "B T 1"]:
    chosen = take(cuts.receivers, jnp.maximum(stream.positions, 0))
    chosen &= (stream.positions >= 0) & ~stream.is_vision
    return (chosen & (layer >= cuts.blocked_from))[..., None]


def _drop_vision(stream: Stream, now: bool | Bool[Array, ""]) -> Stream:
    """Without vision tokens, closed up, in rows of the same length; if `now`."""
    kept = (stream.segment_ids > 0) & ~(now & stream.is_vision)
    index = jnp.argsort(~kept, axis=1, stable=True)
    real = take(kept, index)
    pick = lambda values, padding: jnp.where(real, take(values, index), padding)
    return dataclasses.replace(
        stream,
        x=jnp.where(real[..., None], take(stream.x, index), 0),
        roles=pick(stream.roles, Role.PAD),
        segment_ids=pick(stream.segment_ids, 0),
        positions=pick(stream.positions, -1),
    )


def _as_before(before: Stream, after: Stream) -> Float[Array, "B T D"]:
    """The tokens that are left after a stage, as they were before it."""
    # Padding stands in the place of no token, behind the last one.
    places = jnp.where(before.positions >= 0, before.positions, before.x.shape[1])
    whole = jax.vmap(lambda x, at: jnp.zeros_like(x).at[at].set(x, mode="drop"))(
        before.x, places
    )
    return take(whole, jnp.maximum(after.positions, 0))


def _attend(
    mixer: Attention,
    x: Float[Array, "B T D"],
    layout: Layout,
    is_vision: Bool[Array, "B T"],
    receives: Bool[Array, "B T 1"],
) -> Float[Array, "B T D"]:
    parts = attention_inputs(mixer, x, layout)
    masks = layout.valid, layout.valid & ~is_vision
    sees, blind = (
        attention(parts.q, parts.k, parts.v, causal=True, kv_mask=mask)
        for mask in masks
    )
    return mixer.out(jnp.where(receives[..., None], blind, sees))


def _scan(
    mixer: Mamba2,
    x: Float[Array, "B T D"],
    layout: Layout,
    is_vision: Bool[Array, "B T"],
    receives: Bool[Array, "B T 1"],
) -> Float[Array, "B T D"]:
    def convolve(conv: CausalConv, inputs: Float[Array, "B T X"]):
        sees, _ = conv(inputs, layout, None)
        blind, _ = conv(jnp.where(is_vision[..., None], 0, inputs), layout, None)
        return jnp.where(receives, blind, sees)

    dt = mixer.step_size(x, layout)
    parts = state_inputs_of(
        mixer,
        convolve(mixer.conv_x, mixer.in_x(x)),
        dt,
        convolve(mixer.conv_b, mixer.in_b(x)),
        convolve(mixer.conv_c, mixer.in_c(x)),
    )
    steps = dt, jnp.where(is_vision[..., None], 0, dt)
    sees, blind = (
        mixer.scan(parts.x, step, parts.b, parts.c, layout, None)[0] for step in steps
    )
    y = jnp.where(receives[..., None], blind, sees)
    return mixer.out(mixer.norm(y.reshape(*y.shape[:2], -1), mixer.in_z(x)))
