"""Maps of layers: against dense float64, the layers' own outputs, and by region."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from timeviper_jax.analysis import maps
from timeviper_jax.analysis.intermediates import (
    StateInputs,
    frame_regions,
    ids_there,
    layer_inputs,
    layer_map,
    walk,
)
from timeviper_jax.analysis.regions import region_means, region_sums
from timeviper_jax.llm.transv import Stage

LM = dataclasses.replace(tiny.LM, log_base=8.0)
SAMPLE = "tt" + "v" * 12 + "qqqaa"
T, TILE = len(SAMPLE), 8  # 19 tokens: the last tile is not full.
CLOSE = dict(rtol=2e-5, atol=2e-6)


_hidden = tiny.quick_jit(lambda llm, stream: llm(stream).hidden)
_mix = tiny.quick_jit(lambda block, x, layout: block.mix(x, layout))
_scan = tiny.quick_jit(
    lambda mixer, inputs, layout: mixer.scan(
        inputs.x, inputs.dt, inputs.b, inputs.c, layout, None
    )[0]
)


@pytest.fixture(scope="module")
def entering():
    """A model, and what enters each of its layers "M-*M"."""
    llm = tiny.build_lm(LM)
    stream = tiny.stream([SAMPLE], text=9, vision=12)
    return llm, dict(walk(llm, stream))


@pytest.fixture(scope="module")
def dense(entering):
    """By the definition, in float64: (map, its tiles' map) of each kind of layer."""
    llm, streams = entering
    state, attention = (layer_inputs(llm, i, streams[i]) for i in (0, 2))
    b, c, dt, a = (
        np.asarray(z, np.float64)
        for z in (state.b[0, :T], state.c[0, :T], state.dt[0, :T], state.a)
    )
    q, k = (np.asarray(z[0, :T], np.float64) for z in (attention.q, attention.k))
    return {
        "state": (
            dense_state(b, c, dt, a),
            maps.state_map(*map(jnp.asarray, (b, c, dt, a))),
        ),
        "undriven": (
            dense_state(b, c, dt, a, with_dt=False),
            layer_map(llm, 0, streams[0], with_dt=False),
        ),
        "attention": (
            dense_attention(q, k),
            maps.AttentionMap(q=jnp.asarray(q), k=jnp.asarray(k)),
        ),
    }


def dense_state(b, c, dt, a, with_dt=True):
    T, N = dt.shape
    found = np.zeros((N, T, T))
    for n in range(N):
        g = n // (N // b.shape[1])
        for i in range(T):
            for j in range(i + 1):
                decay = np.exp(np.sum(dt[j + 1 : i + 1, n]) * a[n])
                found[n, i, j] = c[i, g] @ b[j, g] * decay
                found[n, i, j] *= dt[j, n] if with_dt else 1
    return found


def dense_attention(q, k):
    T, N, H = q.shape
    k = np.repeat(k, N // k.shape[1], axis=1)
    logits = np.einsum("RNH,CNH->NRC", q, k) / np.sqrt(H)
    weights = np.where(np.tri(T, dtype=bool), np.exp(logits), 0)
    return weights / weights.sum(axis=-1, keepdims=True)


KINDS = ("state", "undriven", "attention")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_are_those_of_the_definition(dense, kind):
    expected, found = dense[kind]
    index = [0, 7, T - 1]
    np.testing.assert_allclose(
        maps.rows(found, index, tile=TILE), expected[:, index], **CLOSE
    )
    np.testing.assert_allclose(
        maps.columns(found, index, tile=TILE), expected[:, :, index], **CLOSE
    )
    some = maps.rows(found.heads([2, 1]), index, tile=TILE)
    np.testing.assert_allclose(some, expected[[2, 1]][:, index], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_sums_and_means_of_the_dense_map(dense, kind):
    expected, found = dense[kind]
    row_ids, column_ids = np.arange(T) // 5, np.arange(T)[::-1] % 3
    row_ids[4] = -1  # In no region.
    rows = np.eye(4)[row_ids] * (row_ids >= 0)[:, None]
    columns = np.eye(3)[column_ids]
    sums = np.einsum("NRC,RY,CX->NYX", expected, rows, columns)
    args = found, row_ids, column_ids
    np.testing.assert_allclose(region_sums(*args, tile=TILE), sums, **CLOSE)
    counts = np.outer(rows.sum(0), columns.sum(0))
    np.testing.assert_allclose(region_means(*args, tile=TILE), sums / counts, **CLOSE)
    sums = np.einsum("NRC,RY,CX->NYX", np.abs(expected), rows, columns)
    np.testing.assert_allclose(
        region_sums(*args, absolute=True, tile=TILE), sums, **CLOSE
    )


def test_attention_is_causal_and_adds_up_to_one(entering):
    llm, streams = entering
    rows = maps.rows(layer_map(llm, 2, streams[2]), range(T))
    np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-5)
    assert not rows[:, ~np.tri(T, dtype=bool)].any()


def test_a_map_times_values_is_what_the_layer_makes_of_them(entering):
    llm, streams = entering
    inputs = layer_inputs(llm, 0, streams[0])
    y = _scan(llm.block("mamba", 0).mixer, inputs, streams[0].layout)
    rows = maps.rows(layer_map(llm, 0, streams[0]), range(T), tile=TILE)
    assert not rows[:, ~np.tri(T, dtype=bool)].any()
    x = np.asarray(inputs.x[0, :T])
    expected = np.einsum("NRC,CNP->RNP", rows, x) + inputs.d[:, None] * x
    np.testing.assert_allclose(y[0, :T], expected, rtol=1e-4, atol=1e-5)

    inputs = layer_inputs(llm, 2, streams[2])
    block = llm.block("attention", 0)
    rows = maps.rows(layer_map(llm, 2, streams[2]), range(T), tile=TILE)
    values = jnp.repeat(inputs.v[0, :T], 2, axis=1)
    read = jnp.einsum("NRC,CNH->RNH", rows, values)[None]
    mixed = _mix(block, streams[2].x, streams[2].layout)
    np.testing.assert_allclose(
        block.mixer.out(read)[0], mixed[0, :T], rtol=1e-4, atol=1e-5
    )


def test_decays_are_exact_far_into_a_video():
    T = 40_000
    dt = jnp.full((T, 1), 0.5)
    ones = jnp.ones((T, 1, 1))
    found = maps.state_map(ones, ones, dt, jnp.array([-1.3]), with_dt=False)
    (row,) = maps.rows(found, [T - 1])[0]
    expected = np.exp(-1.3 * 0.5 * np.arange(20))
    np.testing.assert_allclose(row[::-1][:20], expected, rtol=1e-5)


def test_the_walk_ends_where_the_model_does(entering):
    llm, streams = entering
    stream = tiny.stream([SAMPLE], text=9, vision=12)
    assert sorted(streams) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(
        llm.norm(streams[4].x), _hidden(llm, stream), rtol=1e-5, atol=1e-5
    )


def test_regions_follow_the_tokens_that_are_kept():
    llm = tiny.build_lm(LM, transv=(Stage(layer=2, keep=0.5),))
    stream = tiny.stream([SAMPLE], text=9, vision=12)
    regions = frame_regions(np.asarray(stream.roles[0]), 2, num_groups=4)
    assert regions.names[:3] == ("system", "frames 0 to 1", "frame 2")
    assert regions.names[-2:] == ("instruction", "answer")
    expected = [0] * 2 + [1] * 4 + [2] * 2 + [3] * 4 + [4] * 2 + [5] * 3 + [6] * 2
    np.testing.assert_array_equal(regions.ids[:T], expected)
    np.testing.assert_array_equal(regions.ids[T:], -1)
    streams = dict(walk(llm, stream))
    np.testing.assert_array_equal(ids_there(regions, streams[1]), expected)
    kept = [2 + i * 11 // 5 for i in range(6)]
    kept = [0, 1, *kept, *range(14, 19)]
    np.testing.assert_array_equal(
        ids_there(regions, streams[2]), np.array(expected)[kept]
    )


def test_a_layer_without_a_map_says_which_have_one(entering):
    llm, streams = entering
    with pytest.raises(ValueError, match=r"Layer 1 is an MLP.*\[0, 2, 3\]"):
        layer_inputs(llm, 1, streams[1])
    assert isinstance(layer_inputs(llm, 3, streams[3]), StateInputs)


def test_packed_samples_have_no_map():
    stream = tiny.stream(["tvq|tvq"], text=8, vision=4, samples=2)
    with pytest.raises(ValueError, match="2 samples"):
        next(walk(tiny.build_lm(LM), stream))
