"""The least that a mesh must exchange in a step, by term, as arithmetic.

Bytes that one chip takes in. Layers are recomputed in the backward pass from what
entered them, so that sharded weights are gathered twice; sums go around rings.
"""

import math

import jax.numpy as jnp

from timeviper_jax import sharding
from timeviper_jax.benchmarks.fit import program
from timeviper_jax.benchmarks.fit.program import Program

# The state enters the kernels and leaves them in float32.
_STATE_BYTES = 4


def least_bytes(step: Program) -> dict[str, int]:
    """By term, of a step whose rows go through in as many parts as the stage says."""
    part = {
        "weights": _weights(step),
        "gradients": _gradients(step),
        "states_and_halos": _states(step),
        "keys_and_values": _keys(step),
        "tensor_parallel": _activations(step),
        "transv": _moved(step),
        "embedding_and_head": _words(step),
    }
    return {term: round(size * step.stage.accumulate) for term, size in part.items()}


def layer_inputs(step: Program) -> int:
    """What entered the layers of a part, which the backward pass starts from."""
    tokens = sum(number for _, number in _tokens(step))
    return round(tokens * step.cfg.llm.embed_dim * _width(step))


def joined(size: int | float, shards: int) -> int | float:
    """What a device lacks of an array of this size of which it has a shard."""
    return size * (shards - 1) / shards


def _gathered(
    step: Program, path: str, shape: tuple[int, ...]
) -> tuple[int | float, int]:
    """A parameter's bytes where it is used, and over how many shards it is gathered."""
    spec, mesh = sharding.spec_of(path), step.mesh.shape
    axes = [name for entry in spec for name in _names(entry)]
    other = "context" if path.startswith("llm/") else "tensor"
    whole = ("fsdp", other)
    shards = math.prod(mesh[name] for name in axes if name in whole)
    kept = math.prod(mesh[name] for name in axes if name not in whole)
    part = step.cfg.vision if path.startswith("vision/") else step.cfg.llm
    return math.prod(shape) / kept * jnp.dtype(part.dtype).itemsize, shards


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _is_words(path: str) -> bool:
    return path in ("llm/embed/embedding", "llm/head/kernel")


def _weights(step: Program) -> int | float:
    total = 0.0
    params, frozen = step.arguments.state.params, step.arguments.frozen
    for path, array in {**params, **frozen}.items():
        if not _is_words(path) and _is_read(step, path):
            # What stands still before all that moves is not computed again.
            times = 1 if path.startswith("vision/") and path in frozen else 2
            total += times * joined(*_gathered(step, path, array.shape))
    return total


def _is_read(step: Program, path: str) -> bool:
    return not (step.stage.task.cached and path.startswith("vision/"))


def _gradients(step: Program) -> int | float:
    """Each chip's part of the sum over all that share no tokens."""
    mesh, total = step.mesh.shape, 0.0
    for path, array in step.arguments.state.params.items():
        size, shards = _gathered(step, path, array.shape)
        split = {name for entry in sharding.spec_of(path) for name in _names(entry)}
        copies = math.prod(mesh[name] for name in {"data", "context"} - split)
        if not _is_words(path):
            total += joined(size, shards)
        total += 2 * joined(size / shards, copies)
    return total


def _tokens(step: Program) -> list[tuple[str, int | float]]:
    """The kind of every layer, and how many tokens of it a chip has in a part."""
    llm, mesh = step.cfg.llm, step.mesh.shape
    rows = _rows(step)
    return [
        (kind, rows * tokens / mesh["context"])
        for span, tokens in zip(
            llm.segments, program.segment_tokens(step.cfg, step.stage), strict=True
        )
        for kind, _ in llm.layers[slice(*span)]
    ]


def _rows(step: Program) -> int | float:
    mesh = step.mesh.shape
    shards = mesh["data"] * mesh["fsdp"]
    return step.stage.batch_size / step.stage.accumulate / shards


def _width(step: Program) -> int:
    return jnp.dtype(step.cfg.llm.dtype).itemsize


def _states(step: Program) -> int | float:
    """A state, its decay and the convolution's last inputs, from the shard before.

    Forward, again when a layer is recomputed, and backward.
    """
    llm, mesh = step.cfg.llm, step.mesh.shape
    if mesh["context"] == 1:
        return 0.0
    state = llm.ssm_heads * (llm.ssm_head_dim * llm.ssm_state + 1) * _STATE_BYTES
    inputs = llm.ssm_heads * llm.ssm_head_dim + 2 * llm.ssm_groups * llm.ssm_state
    halo = (llm.conv_kernel - 1) * inputs * _width(step)
    layers = llm.pattern.count("M")
    return 3 * layers * _rows(step) * (state + halo) / mesh["tensor"]


def _keys(step: Program) -> int | float:
    """Keys and values of all other shards: forward, recomputed, and with gradients."""
    llm, mesh = step.cfg.llm, step.mesh.shape
    token = 2 * llm.num_kv_heads * llm.head_dim * _width(step) / mesh["tensor"]
    tokens = sum(number for kind, number in _tokens(step) if kind == "attention")
    return 4 * (mesh["context"] - 1) * tokens * token


def _activations(step: Program) -> int | float:
    """What a block adds is summed over `tensor`, as is the gradient of its input."""
    tokens = sum(number for _, number in _tokens(step))
    token = step.cfg.llm.embed_dim * _width(step)
    return 2 * 2 * joined(tokens * token, step.mesh.shape["tensor"])


def _moved(step: Program) -> int | float:
    """The tokens that each shard holds after a stage, and the gradients of those."""
    mesh = step.mesh.shape
    if mesh["context"] == 1:
        return 0.0
    before, *after = program.segment_tokens(step.cfg, step.stage)
    # Those that stay and those that go; at first the vision tokens to their places.
    moved = (before + len(after) * before) / mesh["context"]
    token = step.cfg.llm.embed_dim * _width(step) / mesh["tensor"]
    return 2 * _rows(step) * moved * token


def _words(step: Program) -> int | float:
    """Embeddings of a row's tokens from their channels, answers to their words.

    Of the channels that it has, a device looks up the words of all of context.
    """
    mesh, llm, task = step.mesh.shape, step.cfg.llm, step.stage.task
    before, *_ = program.segment_tokens(step.cfg, step.stage)
    token = llm.embed_dim * _width(step)
    embedded = _rows(step) * before / mesh["context"] * token
    answers = _rows(step) * task.answer_tokens / mesh["context"] * token
    shards = mesh["fsdp"] * mesh["context"]
    to_all = (shards - 1) * answers
    summed = joined(embedded + shards * answers, mesh["tensor"])
    table = llm.vocab_size * token / (mesh["fsdp"] * mesh["tensor"])
    moved = joined(embedded, mesh["fsdp"]) + joined(table, mesh["context"]) + to_all
    return 2 * moved + 2 * summed
