"""Tiny models and their inputs, made without compiling anything."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from timeviper_jax.data.examples import Role
from timeviper_jax.llm.hybrid import HybridConfig, HybridLM
from timeviper_jax.llm.stream import Stream, make_stream

ROLES = {
    "t": Role.TEXT,
    "v": Role.VISION,
    "q": Role.INSTRUCTION,
    "a": Role.ANSWER,
}
# Half the compile time for programs that run a few times.
_FAST = {"xla_backend_optimization_level": 0}

LM = HybridConfig(
    pattern="M-*M",
    vocab_size=29,
    embed_dim=24,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ssm_heads=4,
    ssm_head_dim=8,
    ssm_groups=2,
    ssm_state=8,
    chunk_size=8,
)
# The plain transformer of the same width: positions, biases, gates.
QWEN = HybridConfig(
    pattern="*-*-",
    vocab_size=29,
    embed_dim=24,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=100.0,
    qkv_bias=True,
    gated_mlp=True,
)
FAMILIES = {"hybrid": LM, "plain": QWEN}


def build(create: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """`create()` with parameters from numpy, none of them special: gates are open."""
    module = nnx.eval_shape(create)
    rng = np.random.default_rng(seed)
    filled = [
        (path, param.replace(jnp.asarray(_draw(rng, path, param.shape), param.dtype)))
        for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))
    ]
    nnx.update(module, nnx.from_flat_state(filled))
    return module


def _draw(rng: np.random.Generator, path: tuple, shape: tuple) -> np.ndarray:
    if path[-1] == "a_log":
        return rng.uniform(-1, 1, shape)
    if path[-1] == "dt_bias":
        return rng.uniform(-3, 0, shape)
    noise = rng.normal(size=shape)
    if path[-1] in ("scale", "d"):
        return 1 + 0.2 * noise
    return {"alpha": 0.7, "embedding": noise}.get(path[-1], 0.2 * noise)


def build_lm(cfg: HybridConfig = LM, **changes: object) -> HybridLM:
    cfg = dataclasses.replace(cfg, **changes)
    return build(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))


def quick_jit(f: Callable) -> Callable:
    """`f(module, *args)` compiled, in little time rather than well."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=_FAST)
    def run(graph, params, *args):
        return f(nnx.merge(graph, params), *args)

    return lambda module, *args: run(*nnx.split(module), *args)


def gradient(loss: Callable) -> Callable:
    """`loss(module, *args) -> (value, aux)` to `(gradients, aux)`, not compiled."""

    def run(module, *args):
        graph, params = nnx.split(module)
        return jax.grad(lambda p: loss(nnx.merge(graph, p), *args), has_aux=True)(
            params
        )

    return run


def stream(
    rows: Sequence[str],
    *,
    text: int,
    vision: int = 0,
    samples: int = 1,
    dim: int = LM.embed_dim,
) -> Stream:
    """Rows like "tvvvqa|tvqqa": samples of t(ext), v(ision), q(uestion), a(nswer).

    What a sample's tokens hold depends on the sample alone, wherever it stands.
    """
    T = text + vision
    roles, segment_ids = np.zeros((2, len(rows), T), np.int32)
    x = np.zeros((len(rows), T, dim), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(filter(None, row.split("|")), start=1):
            here = slice(start, start + len(sample))
            roles[b, here] = [ROLES[c] for c in sample]
            segment_ids[b, here] = segment
            x[b, here] = embeddings(sample, dim)
            start = here.stop
    return make_stream(
        jnp.asarray(x),
        jnp.asarray(roles),
        jnp.asarray(segment_ids),
        num_segments=samples,
        vision_capacity=vision,
    )


def embeddings(sample: str, dim: int = LM.embed_dim) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(sample.encode()))
    return rng.normal(size=(len(sample), dim)).astype(np.float32)
