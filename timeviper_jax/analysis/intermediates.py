"""Named intermediates of the language model, made again from what enters a layer.

    for layer, stream in walk(llm, stream):
        if llm.cfg.layers[layer][0] == "attention":
            map_ = layer_map(llm, layer, stream)

The model is run block by block, with its TransV stages, and holds no hooks: what is not
asked for costs nothing. Rows hold one sample each.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from timeviper_jax.analysis.maps import AttentionMap, Map, state_map
from timeviper_jax.data.examples import Role
from timeviper_jax.layers.attention import Attention
from timeviper_jax.layers.layout import Layout
from timeviper_jax.layers.mamba2 import Mamba2
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.llm.stream import Stream


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateInputs:
    """What the state space of a Mamba-2 layer is given, after the convolution."""

    x: Float[Array, "B T N P"]
    dt: Float[Array, "B T N"]
    a: Float[Array, "N"]
    b: Float[Array, "B T G S"]
    c: Float[Array, "B T G S"]
    d: Float[Array, "N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Queries, keys and values as they meet: scaled and turned by position."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]


def walk(llm: HybridLM, stream: Stream) -> Iterator[tuple[int, Stream]]:
    """Each layer's number and what enters it, and last what leaves the last layer."""
    if stream.num_segments > 1:
        raise ValueError(
            f"A row of {stream.num_segments} samples has no map of its own; give each"
            " sample a row."
        )
    graph, params = nnx.split(llm)
    stages = {stage.layer: number for number, stage in enumerate(llm.cfg.transv)}
    for layer, (kind, index) in enumerate(llm.cfg.layers):
        if layer in stages:
            stream = _thin(graph, params, stages[layer], stream)
        yield layer, stream
        x = _block(graph, params, kind, index, stream.x, stream.layout)
        stream = dataclasses.replace(stream, x=x)
    yield len(llm.cfg.layers), stream


def layer_map(
    llm: HybridLM, layer: int, stream: Stream, *, row: int = 0, with_dt: bool = True
) -> Map:
    """The map of one layer, over the tokens that row `row` has there.

    Args:
      llm: The model.
      layer: An attention or Mamba-2 layer.
      stream: What enters it, as `walk` gives it.
      row: Of the batch.
      with_dt: Whether a Mamba-2 layer's map holds the factor dt_j.
    """
    inputs = layer_inputs(llm, layer, stream)
    length = int(np.count_nonzero(stream.segment_ids[row]))
    if isinstance(inputs, AttentionInputs):
        return AttentionMap(q=inputs.q[row, :length], k=inputs.k[row, :length])
    dt, b, c = (part[row, :length] for part in (inputs.dt, inputs.b, inputs.c))
    return state_map(b, c, dt, inputs.a, with_dt=with_dt)


def layer_inputs(
    llm: HybridLM, layer: int, stream: Stream
) -> AttentionInputs | StateInputs:
    """Named intermediates of an attention or Mamba-2 layer."""
    kind, index = llm.cfg.layers[layer]
    if kind == "mlp":
        mixing = [i for i, (kind, _) in enumerate(llm.cfg.layers) if kind != "mlp"]
        raise ValueError(
            f"Layer {layer} is an MLP, which mixes no tokens; those that do are"
            f" {mixing}."
        )
    return _inputs(*nnx.split(llm), kind, index, stream.x, stream.layout)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _block(
    graph: nnx.GraphDef,
    params: nnx.State,
    kind: str,
    index: int | Int[Array, ""],
    x: Float[Array, "B T D"],
    layout: Layout,
) -> Float[Array, "B T D"]:
    """One program for all layers of a kind."""
    return x + nnx.merge(graph, params).block(kind, index).mix(x, layout)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _thin(graph: nnx.GraphDef, params: nnx.State, stage: int, stream: Stream) -> Stream:
    return nnx.merge(graph, params).thin(stage, stream)[0]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _inputs(
    graph: nnx.GraphDef,
    params: nnx.State,
    kind: str,
    index: int | Int[Array, ""],
    x: Float[Array, "B T D"],
    layout: Layout,
) -> AttentionInputs | StateInputs:
    block = nnx.merge(graph, params).block(kind, index)
    read = attention_inputs if kind == "attention" else state_inputs
    return read(block.mixer, block.norm(x), layout)


def attention_inputs(
    mixer: Attention, x: Float[Array, "B T D"], layout: Layout
) -> AttentionInputs:
    """Of normed residuals."""
    q, k, v = mixer.project(x, layout.counts())
    return AttentionInputs(q=q, k=k, v=v)


def state_inputs(
    mixer: Mamba2, x: Float[Array, "B T D"], layout: Layout
) -> StateInputs:
    """Of normed residuals."""
    return state_inputs_of(
        mixer,
        mixer.conv_x(mixer.in_x(x), layout, None)[0],
        mixer.step_size(x, layout),
        mixer.conv_b(mixer.in_b(x), layout, None)[0],
        mixer.conv_c(mixer.in_c(x), layout, None)[0],
    )


def state_inputs_of(
    mixer: Mamba2,
    x: Float[Array, "B T X"],
    dt: Float[Array, "B T N"],
    b: Float[Array, "B T Y"],
    c: Float[Array, "B T Y"],
) -> StateInputs:
    """What was convolved, by heads and groups, with the layer's own rates."""
    groups = lambda m: rearrange(m, "B T (G S) -> B T G S", S=mixer.cfg.state_dim)
    return StateInputs(
        x=rearrange(x, "B T (N P) -> B T N P", P=mixer.cfg.head_dim),
        dt=dt,
        a=-jnp.exp(mixer.a_log[...].astype(jnp.float32)),
        b=groups(b),
        c=groups(c),
        d=mixer.d[...].astype(jnp.float32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions:
    """What the tokens of a sample are parts of: `ids` are indices of `names`."""

    names: tuple[str, ...]
    ids: Int[np.ndarray, "T"]
    num_groups: int

    @property
    def groups(self) -> slice:
        """The regions that are groups of frames."""
        return slice(1, 1 + self.num_groups)


def frame_regions(
    roles: Int[np.ndarray, "T"], tokens_per_frame: int, *, num_groups: int = 0
) -> Regions:
    """System text, consecutive groups of frames, instruction, answer; padding is -1.

    `num_groups` of 0 makes each frame a group of its own.
    """
    is_vision = roles == Role.VISION
    frames = int(np.count_nonzero(is_vision)) // tokens_per_frame
    groups = min(num_groups or frames, frames)
    frame = (np.cumsum(is_vision) - 1) // tokens_per_frame
    ids = np.full(len(roles), -1)
    ids[roles == Role.TEXT] = 0
    ids[is_vision] = 1 + frame[is_vision] * groups // max(frames, 1)
    ids[roles == Role.INSTRUCTION] = groups + 1
    ids[roles == Role.ANSWER] = groups + 2
    first = -(-np.arange(groups + 1) * frames // max(groups, 1))
    named = (
        f"frame {a}" if b == a + 1 else f"frames {a} to {b - 1}"
        for a, b in zip(first, first[1:], strict=False)
    )
    names = ("system", *named, "instruction", "answer")
    return Regions(names=names, ids=ids, num_groups=groups)


def ids_there(
    regions: Regions, stream: Stream, *, row: int = 0
) -> Int[np.ndarray, "T"]:
    """The regions of the tokens that a row still has, by where they stood at first."""
    positions = np.asarray(stream.positions[row])
    return regions.ids[positions[positions >= 0]]
