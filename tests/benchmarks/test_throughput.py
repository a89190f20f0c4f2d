"""What a step of decoding moves, against arithmetic by hand."""

import jax
import jaxtyping
import pytest

from timeviper_jax import flops
from timeviper_jax.benchmarks import throughput

GIB = 2**30
SIZES = dict(rows=32, context=32_768, answer=1024)


@pytest.fixture(autouse=True)
def shapes_for_arrays():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_step_reads_weights_keys_and_values_and_moves_states():
    """Each of 32 rows has read 32,768 tokens and written half of 1,024."""
    tokens = 32 * (32_768 + 512 + 1)
    nano = throughput.bytes_a_step(throughput.step(preset="nano_9b", **SIZES))
    qwen = throughput.bytes_a_step(throughput.step(preset="qwen2_7b", **SIZES))
    # Layers that attend, keys and values, heads, width, bytes; one slot is written too.
    assert nano["keys_and_values"] == pytest.approx(
        (tokens + 32) * 4 * 2 * 8 * 128 * 2 / GIB, abs=1e-3
    )
    assert qwen["keys_and_values"] == pytest.approx(
        (tokens + 32) * 28 * 2 * 4 * 128 * 2 / GIB, abs=1e-3
    )
    # All but the embedding, of which a token reads a row.
    assert nano["weights"] == pytest.approx(
        (8_888_227_328 - 131_072 * 4480) * 2 / GIB, abs=1e-3
    )
    states = 27 * 32 * (128 * 80 * 128 * 4 + 3 * (10_240 + 2 * 1024) * 2)
    assert nano["states"] == pytest.approx(2 * states / GIB, abs=1e-3)
    assert qwen["states"] == 0


def test_a_step_counts_each_weight_once_a_row_and_each_key_twice_a_head():
    call = throughput.step(preset="tiny", rows=3, context=40, answer=8)
    paths = jax.tree.leaves_with_path(call.program.args)
    values = [call.values(0).get(jax.tree_util.keystr(path)) for path, _ in paths]
    found = flops.count(call.program.trace().jaxpr, values)
    # How many tokens are written depends on them: one is counted.
    assert not found.exact
    kernels = [
        z
        for path, z in jax.tree.leaves_with_path(call.program.args[0]["llm"])
        if "kernel" in jax.tree_util.keystr(path) and "conv" not in str(path)
    ]
    weights = sum(z.size for z in kernels)
    assert 2 * 3 * weights < found.flops < 4 * 3 * weights
